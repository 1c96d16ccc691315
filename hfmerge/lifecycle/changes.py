"""From a ledger to the plan of a change: add, unmerge, subtract, replace, reorder, rebase.

A change makes the wanted list of models. `plan_models` looks for a kept state of the first models of this list, and
plans a merge of the list from there. The executor runs the plan like any other. So the result has the bytes of a merge
of the wanted list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.behaviour import CHOICES
from hfmerge.checkpoint.custom_code import own_code
from hfmerge.checkpoint.model import Model
from hfmerge.engine.plan import Plan
from hfmerge.engine.planner import make_plan
from hfmerge.errors import HfMergeError, LedgerError
from hfmerge.ledger.entry import Entry, Material, material_reference, recipe_of, short
from hfmerge.ledger.repository import Merged
from hfmerge.lifecycle.archive_restore import planned_from
from hfmerge.lifecycle.missing_sources import check_unchanged
from hfmerge.lifecycle.start_state import Start, starts
from hfmerge.methods import MergeMethod, registry
from hfmerge.recipe.recipe import ModelEntry
from hfmerge.recipe.united import UNION
from hfmerge.recipe.weights import Weight, shown
from hfmerge.validation.wording import parameter


@dataclass(frozen=True)
class Wishes:
    """What a user may ask for beside a change: `stream` and `state` of a `Recipe`; a `state` of None: as before."""

    stream: bool = False
    state: str | int | None = None


AS_BEFORE = Wishes()


@dataclass(frozen=True)
class Change:
    """A planned change: the plan for the executor, and the facts for the ledger entry.

    Attributes:
        action, subjects: as of a ledger entry.
        how: one line on how the result is computed and what is read.
        kept: materials that stay, in order, up to the first one that is new.
        plan: for the executor.
        exact: of a subtraction whose gap is to be measured, the plan of the merge that never saw the models.
    """

    action: str
    subjects: tuple[str, ...]
    how: str
    kept: tuple[Material, ...]
    plan: Plan
    exact: Plan | None = None


def first_merge(plan: Plan) -> Change:
    """The `Change` of a plan that starts a new merge."""
    names = tuple(delta.source.name for delta in plan.deltas)
    return Change("merge", names, f"merged {len(names)} models in order of arrival", (), plan)


def plan_add(merged: Merged, models: Sequence[ModelEntry], *, wishes: Wishes = AS_BEFORE) -> Change:
    """Plan to merge further models after those a merge holds.

    Args:
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: no model named. RecipeError: faults of the new models.
    """
    if not models:
        raise LedgerError("add: name at least one model.")
    last = merged.last
    plan, how = plan_models(merged, [*last.models, *models], wishes=wishes)
    names = tuple(delta.source.name for delta in plan.deltas[len(last.models) :])
    return Change("add", names, how, last.models, plan)


def plan_unmerge(merged: Merged, names: Sequence[str], *, wishes: Wishes = AS_BEFORE) -> Change:
    """Plan the merge of all models but `names`.

    Args:
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: a name is not in the merge, or nothing would be left.
    """
    last = merged.last
    gone = [last.find(name) for name in dict.fromkeys(names)]
    if not gone:
        raise LedgerError(f"unmerge: name the model with {parameter('remove')}.")
    kept = [model for i, model in enumerate(last.models) if i not in gone]
    if not kept:
        raise LedgerError(
            f"{merged.snapshot.label}: holds no other model; the base {last.base.label} is what is left."
        )
    plan, how = plan_models(merged, kept, wishes=wishes)
    return Change("unmerge", tuple(last.models[i].name for i in sorted(set(gone))), how, tuple(kept), plan)


def plan_subtract(
    merged: Merged, names: Sequence[str], *, measure: bool = False, wishes: Wishes = AS_BEFORE
) -> Change:
    """Plan to subtract models approximately, for a method in which later models depend on earlier ones. No removal.

    The models stay in the ledger. They also stay in the carried state of a fold, and later changes stay orthogonal to
    them. A later `plan_unmerge` can still remove them exactly.

    Args:
        measure: also merge again without them, to measure the gap.
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: a name is not in the merge, was subtracted before, nothing would be left, or the method removes
            models exactly at the same price, or knows no subtraction.
    """
    last = merged.last
    name = last.method.name
    method = registry().get(name, MergeMethod)
    exactly = f"leave out {parameter('mode')}"
    if method.additive:
        raise LedgerError(f"{name} keeps exact sums, so a removal is exact at the same cost; {exactly}.")
    if not method.subtractable:
        raise LedgerError(f"{name} keeps no term of a single model that could be subtracted; {exactly}.")
    subtracted = [last.find(given) for given in dict.fromkeys(names)]
    if again := [last.models[i].label for i in subtracted if last.models[i].subtracted]:
        raise LedgerError(f"{again[0]} was subtracted before; to remove it exactly, {exactly}.")
    wanted = [replace(model, subtracted=model.subtracted or i in subtracted) for i, model in enumerate(last.models)]
    if all(model.subtracted for model in wanted):
        raise LedgerError(
            f"{merged.snapshot.label}: holds no other model; the base {last.base.label} is what is left."
        )
    plan, how = plan_models(merged, wanted, wishes=wishes)
    exact = None
    if measure:
        exact, _ = plan_models(merged, [model for model in wanted if not model.subtracted], wishes=wishes)
    subjects = tuple(last.models[i].name for i in sorted(set(subtracted)))
    return Change("subtract", subjects, how, tuple(wanted), plan, exact)


def leading(wanted: Sequence[Material | ModelEntry]) -> tuple[Material, ...]:
    """The models before the first new one: a kept state can replace only these."""
    found: list[Material] = []
    for model in wanted:
        if not isinstance(model, Material):
            break
        found.append(model)
    return tuple(found)


def plan_replay(merged: Merged, *, never: bool = False) -> Plan:
    """Plan the last entry's merge again from its sources, without any kept state.

    Args:
        never: without the models that were subtracted, as if they had never been there.
    """
    last = merged.last
    if never:
        last = replace(last, models=tuple(model for model in last.models if not model.subtracted))
    everything = [last.base, *last.models]

    def make(refs: Mapping[str, str], copies: Mapping[str, Path]) -> Plan:
        recipe = recipe_of(last, refs, merged.consent)
        return make_plan(recipe, origin=merged.snapshot.label, code_was_run=last.ran_code, copies=copies)

    plan = planned_from(merged, everything, make)
    warnings = []
    for material, source in zip(everything, [plan.base, *(delta.source for delta in plan.deltas)], strict=True):
        warnings += check_unchanged(material, source)
    return replace(plan, warnings=(*warnings, *plan.warnings))


def plan_models(
    merged: Merged, wanted: Sequence[Material | ModelEntry], *, base: str | None = None, wishes: Wishes = AS_BEFORE
) -> tuple[Plan, str]:
    """Plan the merge of a list of models; the result is that of a first merge of this list.

    Args:
        wanted: all models of the result in order, each with its weight: models of the merge, and new models.
        base: reference of another base; None: the merge's.
        wishes: what the user asks for beside the change.

    Returns:
        The plan, and one line that says which sources it reads and why.

    Raises:
        LedgerError: a source has vanished or changed. RecipeError: faults of the new models.
    """
    last = merged.last
    common = leading(wanted) if base is None else ()
    warnings: list[str] = []
    method = registry().get(last.method.name, MergeMethod)
    for start in starts(merged, method, common, len(wanted), warnings):
        try:
            plan = _plan_from(merged, start, wanted, base, wishes)
        except HfMergeError as error:
            if not start.leaving:
                raise
            # a model that leaves cannot be read, and there is no other state to subtract it from
            names = ", ".join(model.label for model in start.leaving)
            warnings.append(f"{names} cannot be subtracted, so the models that stay are read instead: {error}")
            continue
        if _made_without(last, plan, start.prior.count):
            warnings.append("the kept state was made without code of the models' own, so the models are read instead.")
            continue
        if start.untied != bool(plan.untied):
            # an end of a tie has sums of its own in one of them alone
            warnings.append("the kept state is of a merge with other tied weights, so the models are read instead.")
            continue
        break
    else:
        start, plan = None, _plan_from(merged, None, wanted, base, wishes)
    warnings += _unchanged(last, plan, wanted, base, start)
    plan = replace(plan, warnings=(*warnings, *plan.warnings))
    return plan, _how(last, start, plan, method)


def _plan_from(
    merged: Merged, start: Start | None, wanted: Sequence[Material | ModelEntry], base: str | None, wishes: Wishes
) -> Plan:
    """The plan that continues from one kept state, or starts without one."""
    last = merged.last
    trust = _trusts(merged, wanted, base)
    leaving = start.leaving if start else ()
    kept = [model for model in wanted if isinstance(model, Material)]
    bases = [last.base] if base is None else []

    def make(refs: Mapping[str, str], copies: Mapping[str, Path]) -> Plan:
        recipe = recipe_of(replace(last, models=()), refs, merged.consent, base=base)
        models = tuple(_entry(model, refs) if isinstance(model, Material) else model for model in wanted)
        # a model that has left takes its tokenizer, template and generation config with it
        there = {"base", UNION, *(model.alias or model.name for model in kept)}
        named = {key: value for key in CHOICES if isinstance(value := getattr(recipe, key), str)}
        gone: dict[str, Any] = {key: None for key, value in named.items() if value not in there}
        state = recipe.state if wishes.state is None else wishes.state
        recipe = replace(recipe, **gone, state=state, stream=wishes.stream)
        return make_plan(
            replace(recipe, models=models, trust_remote_code=trust),
            prior=start.prior if start else None,
            leaving=[_entry(model, refs) for model in leaving],
            origin=merged.snapshot.label,
            code_was_run=last.ran_code,
            copies=copies,
        )

    return planned_from(merged, [*bases, *kept, *leaving], make)


def _trusts(merged: Merged, wanted: Sequence[Material | ModelEntry], base: str | None) -> bool:
    """Whether models' code is run: the caller must allow it, and the merge ran code before or a new model is named."""
    new = base is not None or any(isinstance(model, ModelEntry) for model in wanted)
    return merged.consent.trust_remote_code and (new or merged.last.ran_code)


def _made_without(last: Entry, plan: Plan, count: int) -> bool:
    """Whether code is run now that was not run for what the state holds: the base and the first `count` models."""
    held = (plan.base, *(delta.source for delta in (*plan.deltas[:count], *plan.leaving)))
    return plan.recipe.trust_remote_code and not last.ran_code and any(own_code(one, whole=False) for one in held)


def _entry(model: Material, refs: Mapping[str, str]) -> ModelEntry:
    return ModelEntry(material_reference(model, refs), model.weight, model.subtracted, alias=model.alias)


def _unchanged(
    last: Entry, plan: Plan, wanted: Sequence[Material | ModelEntry], base: str | None, start: Start | None
) -> list[str]:
    """Compare the listed digests of all sources with those of the merged files (see `check_unchanged`)."""
    known = [(last.base, plan.base)] if base is None else []
    both = zip(wanted, plan.deltas, strict=True)
    known += [(one, delta.source) for one, delta in both if isinstance(one, Material)]
    leaving = start.leaving if start else ()
    known += [(one, delta.source) for one, delta in zip(leaving, plan.leaving, strict=True)]
    return [warning for material, source in known for warning in check_unchanged(material, source)]


def _how(last: Entry, start: Start | None, plan: Plan, method: type[MergeMethod]) -> str:
    name, total = last.method.name, len(plan.deltas)
    if plan.subtracted:
        names = ", ".join(plan.deltas[i].source.name for i in plan.subtracted)
        where = f"the kept state after model {start.prior.count}" if start else f"the merge of all {total} models"
        return f"{names} approximately subtracted from {where}; a part of each stays in the weights"
    if start is None:
        why = "no kept state fits" if method.is_fold else f"{name} needs all models at once"
        sources = "the one pinned source" if total == 1 else f"all {total} pinned sources"
        return f"merged again from {sources} ({why})"
    count, held = start.prior.count, len(start.prior.held) or start.prior.count
    later, gone = total - count, [model.label for model in start.leaving]
    if gone:
        read = f"; {later} of {total} models read" if later else ""
        how = "subtracted from" if any(delta in plan.read for delta in plan.leaving) else "left out of the factors in"
        return f"{', '.join(gone)} {how} the exact sums of the kept state after model {held}{read}"
    if not later:
        return f"taken from the kept state after model {held}; no model is read"
    return f"continued from the kept state after model {held}; {later} of {total} models read"


def plan_replace(
    merged: Merged, old: str, new: str, *, weight: Weight | None = None, wishes: Wishes = AS_BEFORE
) -> Change:
    """Plan to replace a model of the merge by another model or another revision of it.

    Args:
        old: name of a model of the merge.
        new: reference.
        weight: of the new one; None: the old one's.
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: `old` is not in the merge, or `new` is the same model.
        RecipeError: faults of the new model.
    """
    last = merged.last
    place = last.find(old)
    replaced = last.models[place]
    entry = ModelEntry(new, replaced.weight if weight is None else weight, alias=replaced.alias)
    wanted: list[Material | ModelEntry] = [*last.models]
    wanted[place] = entry
    plan, how = plan_models(merged, wanted, wishes=wishes)
    came = plan.deltas[place].source
    if entry.weight == replaced.weight and _same(came, replaced):
        raise LedgerError(
            f"{merged.snapshot.label}: holds {replaced.label} already, with this weight; nothing to replace."
        )
    weighs = (
        "" if entry.weight == replaced.weight else f", its weight {shown(replaced.weight)} by {shown(entry.weight)}"
    )
    said = f"{replaced.label} replaced by {_label(came)}{weighs}, at place {place + 1} of {len(wanted)}; {how}"
    return Change("replace", (replaced.name, came.name), said, leading(wanted), plan)


def plan_reorder(merged: Merged, names: Sequence[str], *, wishes: Wishes = AS_BEFORE) -> Change:
    """Plan the merge of the same models in another order.

    Args:
        names: of all models, in the new order.
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: a name is not in the merge, is given twice, is missing, or the order is the present one.
    """
    models = merged.last.models
    order = [merged.last.find(name, guess=True) for name in names]
    if twice := [names[at] for at, i in enumerate(order) if i in order[:at]]:
        raise LedgerError(f"reorder: {twice[0]} is named twice.")
    if absent := [model.name for i, model in enumerate(models) if i not in order]:
        raise LedgerError(f"reorder: name all models in their new order; {', '.join(absent)} missing.")
    if order == sorted(order):
        raise LedgerError(f"{merged.snapshot.label}: its models are in this order already.")
    wanted = [models[i] for i in order]
    plan, how = plan_models(merged, wanted, wishes=wishes)
    return Change("reorder", tuple(model.name for model in wanted), how, tuple(wanted), plan)


def plan_rebase(merged: Merged, base: str, *, wishes: Wishes = AS_BEFORE) -> Change:
    """Plan the merge of the same models on another base, or another revision of it; every change is taken anew.

    Args:
        base: reference of a full model.
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: it is the present base. RecipeError: a model does not fit the new base.
    """
    last = merged.last
    plan, how = plan_models(merged, last.models, base=base, wishes=wishes)
    if _same(plan.base, last.base):
        raise LedgerError(f"{merged.snapshot.label}: {last.base.label} is its base already.")
    return Change(
        "rebase", (plan.base.name,), f"base {last.base.label} replaced by {_label(plan.base)}; {how}", (), plan
    )


def plan_without(
    merged: Merged,
    removed: Sequence[int],
    parts: Mapping[int, str],
    subjects: Sequence[str],
    *,
    wishes: Wishes = AS_BEFORE,
) -> Change:
    """Plan to remove models, and to replace inner merges by merges without some of their models.

    Args:
        removed: indices of models that leave as a whole.
        parts: index of an inner merge -> reference of the same merge without some of its models.
        subjects: names of all removed models, those of inner merges included.
        wishes: what the user asks for beside the change.

    Raises:
        LedgerError: nothing would be left.
    """
    models = merged.last.models
    stay = [i for i in range(len(models)) if i not in removed]
    if not stay:
        raise LedgerError(f"{merged.snapshot.label}: holds no other model; {merged.last.base.label} is what is left.")
    wanted = [ModelEntry(parts[i], models[i].weight, alias=models[i].alias) if i in parts else models[i] for i in stay]
    plan, how = plan_models(merged, wanted, wishes=wishes)
    notes = [f"{models[i].label} taken out" for i in removed]
    for at, i in enumerate(stay):
        if i in parts:
            notes.append(f"{models[i].label} replaced by {_label(plan.deltas[at].source)}, the same merge without it")
    return Change("unmerge", tuple(subjects), f"{', '.join(notes)}; {how}", leading(wanted), plan)


def _same(source: Model, material: Material) -> bool:
    """Whether a source certainly is the material; folders are compared by their digests later."""
    under = source.beneath
    beneath = None if under is None else f"{under.name}@{under.snapshot.commit}"
    commit = source.snapshot.commit
    return commit is not None and (source.name, commit, beneath) == (material.name, material.commit, material.beneath)


def _label(source: Model) -> str:
    """The source's label as a ledger has it: without the path of a folder."""
    return short(f"{source.name}@{source.snapshot.commit}") if source.snapshot.commit else source.name
