"""Changes of a merge beyond adding and taking out, each one action: replace, reorder, rebase.

Like `changes`, none computes anything: each makes the list of models that is wanted, and `plan_models` plans the merge
that was asked for this list in the first place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hfmerge.changes import Change, leading, plan_models
from hfmerge.checkpoint.source import Source
from hfmerge.errors import LedgerError
from hfmerge.ledger.entry import Material, short
from hfmerge.ledger.repository import Merged
from hfmerge.recipe.recipe import ModelEntry
from hfmerge.recipe.weights import shown


def plan_replace(merged: Merged, old: str, new: str, *, weight: float | None = None, stream: bool = False) -> Change:
    """Plan the merge with another model, or another revision, in the place of one that it holds.

    Args:
        old: name of a model of the merge.
        new: reference.
        weight: of the new one; None: the old one's.
        stream: see `Recipe.stream`.

    Raises:
        LedgerError: `old` is not in the merge, or `new` is what is there already.
        RecipeError: faults of the new model.
    """
    last = merged.last
    place = last.find(old)
    gone = last.models[place]
    entry = ModelEntry(new, gone.weight if weight is None else weight)
    wanted: list[Material | ModelEntry] = [*last.models]
    wanted[place] = entry
    plan, how = plan_models(merged, wanted, stream=stream)
    came = plan.deltas[place].source
    if entry.weight == gone.weight and _same(came, gone):
        raise LedgerError(f"{merged.pinned.label}: holds {gone.label} already, with this weight; nothing to replace.")
    weighs = "" if entry.weight == gone.weight else f", its weight {shown(gone.weight)} by {shown(entry.weight)}"
    said = f"{gone.label} replaced by {_label(came)}{weighs}, at place {place + 1} of {len(wanted)}; {how}"
    return Change("replace", (gone.name, came.name), said, leading(wanted), plan)


def plan_reorder(merged: Merged, names: Sequence[str], *, stream: bool = False) -> Change:
    """Plan the merge of the same models in another order.

    Args:
        names: of all models, in the new order.
        stream: see `Recipe.stream`.

    Raises:
        LedgerError: a name is not in the merge, is given twice, is missing, or the order is the present one.
    """
    models = merged.last.models
    order = [merged.last.find(name) for name in names]
    if twice := [names[at] for at, i in enumerate(order) if i in order[:at]]:
        raise LedgerError(f"reorder: {twice[0]} is named twice.")
    if absent := [model.name for i, model in enumerate(models) if i not in order]:
        raise LedgerError(f"reorder: name all models in their new order; {', '.join(absent)} missing.")
    if order == sorted(order):
        raise LedgerError(f"{merged.pinned.label}: its models are in this order already.")
    wanted = [models[i] for i in order]
    plan, how = plan_models(merged, wanted, stream=stream)
    return Change("reorder", tuple(model.name for model in wanted), how, tuple(wanted), plan)


def plan_rebase(merged: Merged, base: str, *, stream: bool = False) -> Change:
    """Plan the merge of the same models on another base, or another revision of it; every change is taken anew.

    Args:
        base: reference of a full model.
        stream: see `Recipe.stream`.

    Raises:
        LedgerError: it is the present base. RecipeError: a model does not fit the new base.
    """
    last = merged.last
    plan, how = plan_models(merged, last.models, base=base, stream=stream)
    if _same(plan.base, last.base):
        raise LedgerError(f"{merged.pinned.label}: {last.base.label} is its base already.")
    return Change(
        "rebase", (plan.base.name,), f"base {last.base.label} replaced by {_label(plan.base)}; {how}", (), plan
    )


def plan_without(
    merged: Merged, gone: Sequence[int], parts: Mapping[int, str], subjects: Sequence[str], *, stream: bool = False
) -> Change:
    """Plan to take out models, and to put merges without some of theirs in the place of the merges with them.

    Args:
        gone: indices of models that leave as a whole.
        parts: index of a merge -> reference of the same merge without some models.
        subjects: names of all models that are taken out, here and there.
        stream: see `Recipe.stream`.

    Raises:
        LedgerError: nothing would be left.
    """
    models = merged.last.models
    stay = [i for i in range(len(models)) if i not in gone]
    if not stay:
        raise LedgerError(f"{merged.pinned.label}: holds no other model; {merged.last.base.label} is what is left.")
    wanted = [ModelEntry(parts[i], models[i].weight) if i in parts else models[i] for i in stay]
    plan, how = plan_models(merged, wanted, stream=stream)
    notes = [f"{models[i].label} taken out" for i in gone]
    for at, i in enumerate(stay):
        if i in parts:
            notes.append(f"{models[i].label} replaced by {_label(plan.deltas[at].source)}, the same merge without it")
    return Change("unmerge", tuple(subjects), f"{', '.join(notes)}; {how}", leading(wanted), plan)


def _same(source: Source, material: Material) -> bool:
    """Whether a source is, for sure, what a material was; folders are told apart by their digests only later."""
    under = source.beneath
    beneath = None if under is None else f"{under.name}@{under.pinned.commit}"
    commit = source.pinned.commit
    return commit is not None and (source.name, commit, beneath) == (material.name, material.commit, material.beneath)


def _label(source: Source) -> str:
    """As in a ledger, which never holds the path of a folder."""
    return short(f"{source.name}@{source.pinned.commit}") if source.pinned.commit else source.name
