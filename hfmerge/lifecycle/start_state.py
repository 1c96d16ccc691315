"""Finds the kept state from which a change of a merge starts, and the models that are subtracted from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hfmerge.engine.plan import KeptState, Prior
from hfmerge.ledger.entry import Entry, Material, same_model
from hfmerge.ledger.repository import Merged, state_path
from hfmerge.methods import MergeMethod
from hfmerge.recipe.values import FITS


@dataclass(frozen=True)
class Start:
    """A state to continue from, and the models in it that are subtracted, as `Prior.held` counts them.

    Attributes:
        untied: see `Entry.is_untied`.
    """

    prior: Prior
    leaving: tuple[Material, ...] = ()
    untied: bool = False


def starts(
    merged: Merged, method: type[MergeMethod], common: Sequence[Material], total: int, warnings: list[str]
) -> Iterator[Start]:
    """The kept states from which a merge of `total` models may start. The state with least left to read comes first.

    If the fold depends on the order, a state must hold exactly the first models of `common`. The state of an additive
    fold may have any order and may hold models that leave. A leaving model is read, at the cost of a new model,
    unless only its factors have to be dropped. A missing or corrupt state gives a warning and is not used.

    Args:
        common: the first models of the wanted list that the merge holds already, with their weights.
        total: number of models in the wanted list.
        warnings: list to which warnings on unusable states are added.
    """
    last = merged.last
    if not method.is_fold or last.method.version != method.version:
        return
    if last.settings["vocabulary"] == "union" or "learn" in last.settings:
        # the rows of the output, or all weights, depend on all models, so no earlier state fits
        return
    if last.method.norm in FITS and not method.fits_from_state:
        # the scale is found from the changes of all models
        return
    candidates: list[tuple[int, int, Entry, KeptState, int, list[int | None]]] = []
    for entry, state in _kept(merged):
        models = entry.models[: state.count]
        if method.additive:
            places = [_place(model, common) for model in models]
            covered = next((i for i in range(len(common)) if i not in places), len(common))
            held: list[int | None] = [i if i is not None and i < covered else None for i in places]
        elif len(common) >= len(models) and all(map(same_model, models, common)):
            covered, held = len(models), list(range(len(models)))
        else:
            continue
        # NaN and Inf cannot be subtracted from a sum
        if None in held and last.settings["allow_nonfinite"]:
            continue
        gone = [model for model, i in zip(models, held, strict=True) if i is None]
        cost = total - covered + sum(not _left_out(model) for model in gone)
        if covered and cost < total:
            candidates.append((cost, len(candidates), entry, state, covered, held))
    for _, _, entry, state, covered, held in sorted(candidates, key=lambda each: each[:2]):
        path = state_path(merged.snapshot, state, warnings)
        if path is None:
            continue
        models = entry.models[: state.count]
        leaving = tuple(model for model, i in zip(models, held, strict=True) if i is None)
        norms = {i: float(model.squared_norm or 0.0) for model, i in zip(models, held, strict=True) if i is not None}
        numbers = iter(range(-1, -1 - len(leaving), -1))
        order = tuple(next(numbers) if i is None else i for i in held)
        prior = Prior(
            covered,
            path,
            tuple(norms[i] for i in range(covered)),
            () if order == tuple(range(covered)) else order,
        )
        yield Start(prior, leaving, entry.is_untied)


def _kept(merged: Merged) -> list[tuple[Entry, KeptState]]:
    """States that still lie beside the weights, with an entry that says what is in them; the newest first."""
    last = merged.last
    wanted = {state.sha256 for state in last.states}
    result = []
    for entry in reversed(merged.entries):
        same = entry.method == last.method and entry.base.identity == last.base.identity
        if not same or any(entry.settings[key] != last.settings[key] for key in ("include", "exclude", "vocabulary")):
            continue
        for state in sorted(entry.states, key=lambda state: -state.count):
            if state.sha256 in wanted:
                wanted.remove(state.sha256)
                result.append((entry, state))
    return result


def _left_out(model: Material) -> bool:
    """Whether a model leaves exact sums without being read; whole tensors of an adapter, if it has any, are few."""
    return model.kind == "adapter" and model.beneath is None


def _place(model: Material, models: Sequence[Material]) -> int | None:
    return next((i for i, other in enumerate(models) if same_model(model, other)), None)
