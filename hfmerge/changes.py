"""From a ledger to a plan: what to do so that a model is added to, or was never in, a merge.

Neither verb computes anything itself. Both make the recipe of the wanted set of models and look for a kept state of a
common beginning; the executor then does what it does for any merge. So the result is that of merging the wanted set,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hfmerge.errors import LedgerError
from hfmerge.ledger import Entry, Material, recipe_of
from hfmerge.merged import Merged, check_materials, nearest_state
from hfmerge.methods import FoldMethod, MergeMethod, registry
from hfmerge.planned import Plan, Prior
from hfmerge.planning import make_plan
from hfmerge.recipe import ModelEntry


@dataclass(frozen=True)
class Change:
    """A planned change of a merge.

    Attributes:
        action: "add" or "unmerge".
        subjects: names of the models it adds or removes.
        how: one line on how the result is computed and what is read.
        kept: materials that stay, in order.
        plan: for the executor.
    """

    action: str
    subjects: tuple[str, ...]
    how: str
    kept: tuple[Material, ...]
    plan: Plan


def plan_add(merged: Merged, models: Sequence[ModelEntry], *, stream: bool = False) -> Change:
    """Plan to merge further models after those a merge holds.

    Args:
        stream: see `Recipe.stream`.

    Raises:
        LedgerError: no model named. RecipeError: faults of the new models.
    """
    if not models:
        raise LedgerError("add: name at least one model.")
    last = merged.last
    plan, how = _plan(merged, list(last.models), tuple(models), stream)
    names = tuple(delta.source.name for delta in plan.deltas[len(last.models) :])
    return Change("add", names, how, last.models, plan)


def plan_unmerge(merged: Merged, names: Sequence[str], *, stream: bool = False) -> Change:
    """Plan the merge of all models but `names`.

    Args:
        stream: see `Recipe.stream`.

    Raises:
        LedgerError: a name is not in the merge, or nothing would be left.
    """
    last = merged.last
    gone = [last.find(name) for name in dict.fromkeys(names)]
    if not gone:
        raise LedgerError("unmerge: name the model with --remove.")
    kept = [model for i, model in enumerate(last.models) if i not in gone]
    if not kept:
        raise LedgerError(f"{merged.pinned.label}: holds no other model; the base {last.base.label} is what is left.")
    plan, how = _plan(merged, kept, (), stream)
    return Change("unmerge", tuple(last.models[i].name for i in sorted(set(gone))), how, tuple(kept), plan)


def plan_replay(merged: Merged) -> Plan:
    """Plan the last entry's merge again from its sources, without any kept state."""
    last = merged.last
    recipe = recipe_of(last, merged.refs)
    everything = [last.base, *last.models]
    check_materials(last, merged.refs, everything, everything)
    return make_plan(recipe, origin=merged.pinned.label)


def _plan(merged: Merged, kept: list[Material], new: tuple[ModelEntry, ...], stream: bool) -> tuple[Plan, str]:
    last = merged.last
    warnings: list[str] = []
    method = registry().get(last.method["name"], MergeMethod)
    prior: Prior | None = None
    if issubclass(method, FoldMethod) and last.method["version"] == method.version:
        prior = nearest_state(merged, kept, warnings)
    start = prior.count if prior else 0
    # heads are copied from their sources again, whatever stands in the state
    read = [last.base, *(model for i, model in enumerate(kept) if i >= start or model.head)]
    check_materials(last, merged.refs, [last.base, *kept], read)
    recipe = recipe_of(replace(last, models=tuple(kept)), merged.refs)
    recipe = replace(recipe, models=(*recipe.models, *new), stream=stream)
    plan = make_plan(recipe, prior=prior, origin=merged.pinned.label)
    plan = replace(plan, warnings=(*warnings, *plan.warnings))
    return plan, _how(last, prior, len(plan.deltas), issubclass(method, FoldMethod))


def _how(last: Entry, prior: Prior | None, total: int, fold: bool) -> str:
    name = last.method["name"]
    if prior is None:
        why = "no kept state fits" if fold else f"{name} needs all models at once"
        return f"merged again from all {total} pinned sources ({why})"
    if prior.count == total:
        return f"taken from the kept state after model {total}; no model is read"
    later = total - prior.count
    return f"continued from the kept state after model {prior.count}; {later} of {total} models read"
