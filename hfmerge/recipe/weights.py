"""A model's weight: one number, or several by patterns on the names of output parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hfmerge.validation.values import Section, factor, show, text


WRITTEN_OUT = 3
"""So many patterns are shown one by one; of more only the range of their weights."""


@dataclass(frozen=True)
class PatternWeights:
    """Weights by pattern: the first pattern that fits a parameter's name gives its weight.

    Attributes:
        pairs: fnmatch pattern and weight, in order; the last pattern is `*`.
    """

    pairs: tuple[tuple[str, float], ...]

    def place(self, name: str) -> int:
        """Index of the pair that counts for a parameter (stored key of the base)."""
        return _first_fit(tuple(pattern for pattern, _ in self.pairs), name)

    def unused(self, names: Iterable[str]) -> list[str]:
        """The patterns, but the last, that count for none of these parameters."""
        used = {self.place(name) for name in names}
        return [pattern for i, (pattern, _) in enumerate(self.pairs[:-1]) if i not in used]


@lru_cache(maxsize=4096)
def _first_fit(patterns: tuple[str, ...], name: str) -> int:
    """The first pattern that fits a name; cached, because a parameter may be visited a few rows at a time."""
    return next(i for i, pattern in enumerate(patterns) if fnmatch.fnmatchcase(name, pattern))


Weight = float | PatternWeights


def read_weight(section: Section, key: str) -> Weight | None:
    """The weight under a key that is there, None if it is faulty; every fault of a mapping is a problem of its own.

    A mapping of `*` alone is the number it holds.
    """
    value = section.data[key]
    if not isinstance(value, Mapping):
        return section.read(key, factor, None)
    inner, before = Section(value, section.at(key), section.problems), len(section.problems)
    pairs: dict[str, float] = {}
    for name in value:
        try:
            pattern = text(name)
        except ValueError as error:
            section.report(key, f"a pattern {error}")
            continue
        if pattern in pairs:
            inner.report(pattern, "given twice; keep one")
        pairs[pattern] = inner.read(name, factor, 0.0)
    patterns = list(pairs)
    if not value:
        section.report(key, 'must not be empty; give a number, or patterns of which the last is "*"')
    elif "*" in patterns[:-1]:
        section.report(key, f'{show(patterns[patterns.index("*") + 1])} never counts, as it comes after "*"; move it')
    elif patterns and patterns[-1] != "*":
        section.report(key, 'must end with the pattern "*", for all other parameters')
    if len(section.problems) > before:
        return None
    return pairs["*"] if len(pairs) == 1 else PatternWeights(tuple(pairs.items()))


def weight_at(weight: Weight, name: str) -> float:
    """The weight of one parameter (stored key of the base)."""
    return weight.pairs[weight.place(name)][1] if isinstance(weight, PatternWeights) else weight


def values_of(weight: Weight) -> tuple[float, ...]:
    """All numbers that a weight may be."""
    return tuple(value for _, value in weight.pairs) if isinstance(weight, PatternWeights) else (weight,)


def written(weight: Weight) -> float | dict[str, float]:
    """As a recipe writes it."""
    return dict(weight.pairs) if isinstance(weight, PatternWeights) else weight


def stored(weight: Weight) -> float | list[list[Any]]:
    """As the ledger, whose keys are sorted, holds it: a number as it is, patterns as a list of pairs."""
    return [[pattern, value] for pattern, value in weight.pairs] if isinstance(weight, PatternWeights) else weight


def restored(value: float | list[list[Any]]) -> Weight:
    """Inverse of `stored`."""
    if not isinstance(value, list):
        return value
    return PatternWeights(tuple((pattern, float(weight)) for pattern, weight in value))


def shown(weight: Weight) -> str:
    """In a few words: `0.5`, `encoder.*: 0.4, *: 0.6`, or `0.31 to 0.92 by 13 patterns`."""
    if not isinstance(weight, PatternWeights):
        return f"{weight:g}"
    if len(weight.pairs) <= WRITTEN_OUT:
        return ", ".join(f"{pattern}: {value:g}" for pattern, value in weight.pairs)
    values = values_of(weight)
    return f"{min(values):g} to {max(values):g} by {len(values)} patterns"
