"""The public verbs that merge. Each wires the parts together and returns a small result; none of them prints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from hfmerge.admitting import admit_change, admit_merge
from hfmerge.changes import plan_add, plan_subtract, plan_unmerge
from hfmerge.digesting import Digester
from hfmerge.disks import for_machines
from hfmerge.errors import LedgerError, OutputError
from hfmerge.nesting import find_removal, removed_already, without_parts
from hfmerge.options import DEFAULT, RunOptions
from hfmerge.planned import Plan
from hfmerge.planning import make_plan
from hfmerge.publishing import publish, with_disks
from hfmerge.recipe import ModelEntry, Recipe
from hfmerge.repeating import added, finish, in_place
from hfmerge.revising import plan_without
from hfmerge.running import (
    NOTHING_KEPT,
    MergeResult,
    apply_change,
    build,
    device_of,
    folder_for,
    given_recipe,
    opened_merge,
    pinned_recipe,
    pinned_ref,
    push_written,
    result_of,
    weights_found,
)
from hfmerge.runtime import processes
from hfmerge.targets import destination


def plan(recipe: Recipe | str | Path) -> Plan:
    """What a merge would do, from headers alone; downloads no weights.

    Raises:
        RecipeError: every problem of the recipe and its models at once.
    """
    asked, origin = given_recipe(recipe)
    return make_plan(asked, origin=origin)


def merge(
    recipe: Recipe | str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Merge the models of a recipe into a new folder, with ledger and card, and publish it if asked.

    Args:
        recipe: a `Recipe` or the path of a YAML file.
        output, push_to, private: instead of the recipe's.
        create_pr: publish as a pull request.
        overwrite: replace in `push_to` what hfmerge did not make as part of this merge: a base or source, a model.
        publish_private: names of inputs, private or gated or gone, of which the result may all the same go where more
            people may read it (see `privacy`). Without, a new repository is private if an input is.
        options: how the run uses the machine.

    Raises:
        HfMergeError: see `hfmerge.errors`; nothing half-written remains.
    """
    asked, origin = given_recipe(recipe, options.consent)
    target, repo_id = output or asked.output, push_to or asked.push_to
    if target is None and repo_id is None:
        raise OutputError(f"{origin}: says neither `output` nor `push_to`; name a folder or a repository.")
    if target is None and options.resume:
        raise OutputError(NOTHING_KEPT)
    start = time.monotonic()
    private = asked.private if private is None else private
    to = destination(
        repo_id, private=private, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private
    )
    with processes() as ranks, Digester() as digester:
        # one process hashes what is here while it plans; several share the hashing later
        early = digester.start if ranks.world == 1 else None
        ranks = with_disks(ranks, target, options.storage)
        admit_merge(asked, to, ranks, options)
        pinned = pinned_recipe(asked, ranks)
        planned = ranks.each(partial(make_plan, pinned, origin=origin, on_source=early))
        device = device_of(planned, ranks, options)
        planned = for_machines(planned, ranks, device)
        with folder_for(target, planned, ranks, device, replace=False, resume=options.resume) as place:
            planned, learned = weights_found(planned, place, ranks, options)
            entry, seconds, notes, outcome = build(
                planned, place, ranks, None, None, digester, options, learned=learned
            )  # fmt: skip
            pushed = publish(planned, place.folder, ranks, to) if target is None and to else None
        if target is not None and to is not None:
            pushed = ranks.on_main(partial(push_written, Path(target), to))
        return result_of(target, entry, planned, pushed, start, seconds, notes, world=ranks.world, outcome=outcome)


def add(
    merged: str | Path,
    models: Sequence[str | ModelEntry],
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
    """Merge further models into an existing merge, continuing from its carried state.

    Args:
        merged: `org/name[@revision]` or a folder.
        models: references, or entries with a weight.
        output: a new folder; without it a folder is replaced in one rename, and a Hub ID needs `push_to`.
        push_to: repository; pushing to the merge's own guards against a concurrent push.
        create_pr, overwrite, publish_private: as for `merge`.
        sources: name of a model that was merged from a folder -> where that lies now.
        stream: see `Recipe.stream`.
        options: as for `merge`.

    Raises:
        HfMergeError: see `hfmerge.errors`; the existing merge stays as it was.
    """
    given = [m if isinstance(m, ModelEntry) else ModelEntry(m) for m in models]
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks, options)
        entries = [ModelEntry(pinned_ref(entry.model, ranks), entry.weight) for entry in given]
        if in_place(opened, output, to) and ranks.on_main(partial(added, opened, entries)):
            return finish(opened, to, ranks)
        make = partial(plan_add, opened, entries, stream=stream)
        return apply_change(opened, make, ranks, output, to, options, new=[entry.model for entry in entries])


def unmerge(
    merged: str | Path,
    remove: str | Sequence[str],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    inner_to: str | None = None,
    mode: Literal["exact", "subtract"] = "exact",
    measure: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Take models out: the result has the bytes of the merge that never saw them.

    Repeated when it is done, it succeeds, computes nothing, and finishes what a killed run left: states of the models
    on the branch of states, folders beside the merge's own, the tag. So do `add`, `replace` and `restore`.

    Args:
        merged, output, push_to, create_pr, overwrite, publish_private, sources, stream, options: as for `add`.
        mode: "subtract" is for methods whose result depends on the order: opcm and mdm_oc_subspace, of which nothing
            but the models that leave is read, and mdm_oc. It is approximate and no removal: what later models were
            projected off stays, and so do the models in the state and in the ledger, which records the gap.
        measure: of a subtraction, also merge again without the models, to measure the gap.
        remove: names as the ledger lists them; also of models within a merge that was merged, which is then merged
            again without them and replaced.
        inner_to: `org/name` or `./folder` for such an inner merge; None: a folder beside the result.

    Raises:
        LedgerError: not in the merge, or nothing would be left. HfMergeError: see `hfmerge.errors`.
    """
    names = [remove] if isinstance(remove, str) else list(remove)
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    if measure and mode == "exact":
        raise LedgerError("unmerge: there is no gap to measure unless models are subtracted (mode: subtract).")
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks, options)
        if mode == "subtract":
            make = partial(plan_subtract, opened, names, measure=measure, stream=stream)
            return apply_change(opened, make, ranks, output, to, options)
        if in_place(opened, output, to) and removed_already(opened, names):
            return finish(opened, to, ranks)
        removal = find_removal(opened.last, names)
        if not removal.within:
            make = partial(plan_unmerge, opened, names, stream=stream)
            return apply_change(opened, make, ranks, output, to, options, without=names)
        admit_change(opened, to, ranks, options, without=names)()
    inner = partial(
        unmerge, stream=stream, overwrite=overwrite, publish_private=publish_private,
        options=dataclasses.replace(options, resume=None),
    )  # fmt: skip
    folder = Path(output) if output is not None else opened.pinned.folder
    gone, parts = without_parts(opened, removal, inner, inner_to=inner_to, folder=folder)
    with processes() as ranks:
        make = partial(plan_without, opened, gone, parts, removal.subjects, stream=stream)
        return apply_change(opened, make, ranks, output, to, options, without=names, new=list(parts.values()))
