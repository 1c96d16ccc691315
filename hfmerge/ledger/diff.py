"""Compares two steps of a merge, or two merges, by their ledgers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.ledger.entry import Entry, Material
from hfmerge.recipe.weights import Weight, stored


@dataclass(frozen=True)
class Difference:
    """Differences between two steps, A and B. Fields that are equal are empty or None.

    Attributes:
        before, after: the steps.
        added, removed: models of B alone, and of A alone.
        replaced: pairs of models: two revisions of one repository or folder, or two models at the same place.
        subtracted: models of B that were approximately subtracted since A, and so are still part of its state.
        order: names of the models that both hold, as A and as B orders them; None if alike.
        weights: models of B with another weight, and that of A.
        base: both bases, if they are different.
        method: "name", "version", "norm" or an option -> its values; None where there is none.
        settings: dtype, patterns, vocabulary, ... -> their values.
        norms: "merged", "scale", or label of a model of both -> its norms.
        products: file -> "added", "removed" or "changed".
        environment: versions and device -> their values.
    """

    before: Entry
    after: Entry
    added: tuple[Material, ...]
    removed: tuple[Material, ...]
    replaced: tuple[tuple[Material, Material], ...]
    subtracted: tuple[Material, ...]
    order: tuple[tuple[str, ...], tuple[str, ...]] | None
    weights: tuple[tuple[Material, Weight], ...]
    base: tuple[Material, Material] | None
    method: Mapping[str, tuple[Any, Any]]
    settings: Mapping[str, tuple[Any, Any]]
    norms: Mapping[str, tuple[float, float]]
    products: Mapping[str, str]
    environment: Mapping[str, tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """True when both describe the same files."""
        return not self.products

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "before": self.before.step,
            "after": self.after.step,
            "added": [model.identity for model in self.added],
            "removed": [model.identity for model in self.removed],
            "replaced": [[old.identity, new.identity] for old, new in self.replaced],
            "subtracted": [model.identity for model in self.subtracted],
            "order": None if self.order is None else [list(names) for names in self.order],
            "weights": {model.identity: [stored(old), stored(model.weight)] for model, old in self.weights},
            "base": None if self.base is None else [base.identity for base in self.base],
            "method": {name: list(pair) for name, pair in self.method.items()},
            "settings": {name: list(pair) for name, pair in self.settings.items()},
            "norms": {name: list(pair) for name, pair in self.norms.items()},
            "products": dict(self.products),
            "environment": {name: list(pair) for name, pair in self.environment.items()},
        }


def compare(before: Entry, after: Entry) -> Difference:
    """The differences that lead from the merge at `before` to the merge at `after`."""
    pairs = _pairs(before.models, after.models)
    same = [(a, b) for a, b in pairs if _key(a) == _key(b)]
    replaced = tuple((a, b) for a, b in pairs if _key(a) != _key(b))
    removed = [a for a, _ in pairs]
    come = [b for _, b in pairs]
    firsts = tuple(a.name for a in before.models if a in removed)
    places = {id(b): a.name for a, b in pairs}
    seconds = tuple(places[id(b)] for b in after.models if id(b) in places)
    norms = {b.label: (_norm(a), _norm(b)) for a, b in same if _norm(a) != _norm(b)}
    for name, key in (("merged", "merged_norm"), ("scale", "scale")):
        values = float(getattr(before.scalars, key)), float(getattr(after.scalars, key))
        if values[0] != values[1]:
            norms[name] = values
    return Difference(
        before,
        after,
        added=tuple(b for b in after.models if b not in come),
        removed=tuple(a for a in before.models if a not in removed),
        replaced=replaced,
        subtracted=tuple(b for a, b in same if b.subtracted and not a.subtracted),
        order=None if firsts == seconds else (firsts, seconds),
        weights=tuple((b, a.weight) for a, b in pairs if a.weight != b.weight),
        base=(before.base, after.base) if _key(before.base) != _key(after.base) else None,
        method=_apart(_method(before), _method(after)),
        settings=_apart(before.settings, after.settings),
        norms=norms,
        products=_files(before.products, after.products),
        environment=_apart(before.environment, after.environment),
    )


def _key(material: Material) -> tuple[str, str | None]:
    return material.identity, material.beneath


def _norm(material: Material) -> float:
    return (material.squared_norm or 0.0) ** 0.5


def _method(entry: Entry) -> dict[str, Any]:
    method = entry.method
    return {"name": method.name, "version": method.version, "norm": method.norm, **method.options}


def _pairs(before: Sequence[Material], after: Sequence[Material]) -> list[tuple[Material, Material]]:
    """Models that are the same, or stand for the same: by identity, then by name, then by place among equally many."""
    left, right = list(before), list(after)
    pairs = []
    rules = (_key, lambda material: material.name)
    for rule in rules:
        for a in list(left):
            match = next((b for b in right if rule(b) == rule(a)), None)
            if match is not None:
                pairs.append((a, match))
                left.remove(a)
                right.remove(match)
    if len(before) == len(after):
        for a in list(left):
            match = after[before.index(a)]
            if match in right:
                pairs.append((a, match))
                left.remove(a)
                right.remove(match)
    return sorted(pairs, key=lambda pair: after.index(pair[1]))


def _apart(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys((*before, *after))
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _files(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in sorted({*before, *after}):
        if name not in after:
            found[name] = "removed"
        elif name not in before:
            found[name] = "added"
        elif before[name] != after[name]:
            found[name] = "changed"
    return found
