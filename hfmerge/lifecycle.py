"""More public verbs on an existing merge: what it is made of (replace, reorder, rebase, restore), and its past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from hfmerge.comparing import Difference, compare
from hfmerge.errors import LedgerError
from hfmerge.ledger import Entry
from hfmerge.merged import Merged, open_merged
from hfmerge.options import DEFAULT, RunOptions
from hfmerge.repeating import finish, in_place, replaced
from hfmerge.restoring import restore_step
from hfmerge.revising import plan_rebase, plan_reorder, plan_replace
from hfmerge.running import MergeResult, apply_change, opened_merge, pinned_ref
from hfmerge.runtime import processes
from hfmerge.steps import Step, steps_of
from hfmerge.targets import destination
from hfmerge.workspace import recover


def replace(
    merged: str | Path,
    old: str,
    new: str,
    *,
    weight: float | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Put another model, or another revision, in the place of one: the bytes are those of the merge with it.

    Args:
        merged, output, push_to, create_pr, overwrite, publish_private, sources, stream, options: as for `add`.
        old: name as the ledger lists it.
        new: reference.
        weight: of the new model; None: that of the old one.

    Raises:
        LedgerError: not in the merge, or there already. HfMergeError: see `hfmerge.errors`; the merge stays as it was.
    """
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks, options)
        ref = pinned_ref(new, ranks)
        if in_place(opened, output, to) and ranks.on_main(partial(replaced, opened, old, ref, weight)):
            return finish(opened, to, ranks)
        make = partial(plan_replace, opened, old, ref, weight=weight, stream=stream)
        return apply_change(opened, make, ranks, output, to, options, new=[ref], without=[old])


def reorder(
    merged: str | Path,
    models: Sequence[str],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Merge the same models in another order.

    Args:
        merged, output, push_to, create_pr, overwrite, publish_private, sources, stream, options: as for `add`.
        models: names of all models, in the new order.

    Raises:
        LedgerError: a name is missing, twice, or not in the merge. HfMergeError: see `hfmerge.errors`.
    """
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks, options)
        make = partial(plan_reorder, opened, models, stream=stream)
        return apply_change(opened, make, ranks, output, to, options)


def rebase(
    merged: str | Path,
    base: str,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Merge the same models on another base or another revision of it.

    Args:
        merged, output, push_to, create_pr, overwrite, publish_private, sources, stream, options: as for `add`.
        base: reference.

    Raises:
        LedgerError: it is the base already. RecipeError: a model does not fit it.
    """
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks, options)
        ref = pinned_ref(base, ranks)
        make = partial(plan_rebase, opened, ref, stream=stream)
        return apply_change(opened, make, ranks, output, to, options, base=ref)


def restore(
    merged: str | Path,
    step: int,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Go back to an earlier step: its files come from the Hub's history, and nothing is computed.

    Args:
        merged, output, push_to, create_pr, overwrite, publish_private, sources, options: as for `add`; pushing to the
            merge's own repository copies the files there, without downloading them.
        step: number of the step.

    Raises:
        LedgerError: no such step, or no repository that still holds it.
    """
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    with processes() as ranks:
        work = partial(restore_step, str(merged), step, output=output, to=to, sources=sources, options=options)
        return ranks.on_main(work)


def history(merged: str | Path) -> tuple[Step, ...]:
    """The steps of a merge, oldest first; on the Hub with who brought them and when.

    Raises:
        LedgerError: no ledger or a broken one. SourceError: the merge cannot be reached.
    """
    recover(merged)
    return steps_of(open_merged(str(merged)))[0]


def diff(merged: str | Path, before: int | str | Path | None = None, after: int | None = None) -> Difference:
    """What differs between two steps of a merge, or between the last steps of two merges.

    Args:
        before: number of a step, negative ones count from the end, or another merge; None: the last step but one.
        after: number of the later step; None: the last.

    Raises:
        LedgerError: no such step.
    """
    opened = _open(merged)
    if isinstance(before, str | Path):
        if after is not None:
            raise LedgerError("diff: compare two steps of one merge, or two merges.")
        return compare(opened.last, _open(before).last)
    if before is None and len(opened.entries) == 1:
        raise LedgerError(f"{opened.pinned.label}: has only one step; name another merge to compare it with.")
    return compare(_step(opened, -2 if before is None else before), _step(opened, -1 if after is None else after))


def _open(merged: str | Path) -> Merged:
    recover(merged)
    return open_merged(str(merged))


def _step(opened: Merged, number: int) -> Entry:
    count = len(opened.entries)
    at = number - 1 if number > 0 else count + number
    if number == 0 or not 0 <= at < count:
        raise LedgerError(f"{opened.pinned.label}: has no step {number}; its ledger has steps 1 to {count}.")
    return opened.entries[at]
