"""The weights of a mergekit file, a number or several by filters on the names of tensors, as weights of a recipe."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hfmerge.recipe.mergekit.syntax import constant
from hfmerge.recipe.weights import PatternWeights, Weight
from hfmerge.validation.values import Section, number, show, text


def model_weight(scopes: Sequence[Section]) -> Weight | None:
    """A model's weight, None if it is faulty, which is then reported.

    Args:
        scopes: parameters that hold for the model, the strongest first; what one leaves open the next may say.
    """
    pairs: dict[str, float] = {}
    given = [scope for scope in scopes if "weight" in scope.data]
    for scope in given:
        before = len(scope.problems)
        found = scope.read("weight", _by_filter, None)
        if len(scope.problems) > before:
            return None
        if found is None:
            value = scope.read("weight", lambda setting: number(constant(setting)), None)
            if value is None:
                return None
            found = [("*", value)]
        for pattern, value in found:
            pairs.setdefault(pattern, value)
        if "*" in pairs:
            break
    else:
        if given:
            filters = ", ".join(show(pattern[1:-1]) for pattern in pairs)
            given[0].report("weight", f"has no value but for the filter {filters}; add one without a filter")
        return None
    same = all(value == pairs["*"] for value in pairs.values())
    return pairs["*"] if same else PatternWeights(tuple(pairs.items()))


def weight_sums(weights: Sequence[Weight]) -> list[float] | None:
    """Sums of the weights that meet in a tensor; None where it depends on the names which of them meet."""
    kinds = dict.fromkeys(tuple(p for p, _ in w.pairs) for w in weights if isinstance(w, PatternWeights))
    if len(kinds) > 1:
        return None
    patterns = next(iter(kinds), ("*",))
    tables = [dict(w.pairs) if isinstance(w, PatternWeights) else dict.fromkeys(patterns, w) for w in weights]
    return [math.fsum(table[pattern] for table in tables) for pattern in patterns]


def _by_filter(setting: Any) -> list[tuple[str, float]] | None:
    """Patterns and numbers of a list of filters; the first filter that is part of a name counts. None: no such list.

    Without a `*` at its end the list leaves names open, for which mergekit looks elsewhere.

    Raises:
        ValueError: something in it is no number, or not of this form.
    """
    items = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(items, list | tuple) or not any(isinstance(item, Mapping) for item in items):
        return None
    pairs: list[tuple[str, float]] = []
    for item in items:
        if not isinstance(item, Mapping) or "value" not in item or not set(item) <= {"value", "filter"}:
            raise ValueError("must be a value or a list of {filter, value}")
        value, part = number(constant(item["value"])), item.get("filter")
        if part in (None, "*"):
            return [*pairs, ("*", value)]
        pairs.append((f"*{glob.escape(text(part))}*", value))
    return pairs
