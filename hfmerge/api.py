"""The public verbs. Each wires the parts together and returns a small result; none of them prints."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hfmerge.card import restrictive
from hfmerge.changes import Change, plan_add, plan_unmerge
from hfmerge.digesting import Digester
from hfmerge.disks import for_machines, stand_ins
from hfmerge.errors import HfMergeError, OutputError, PushError, RecipeError, VerificationError
from hfmerge.execute import Outcome, run
from hfmerge.fetching import pin
from hfmerge.hub import Pushed, push_folder
from hfmerge.identity import work_of
from hfmerge.ledger import Entry
from hfmerge.merged import Merged, open_merged
from hfmerge.options import DEFAULT, RunOptions
from hfmerge.planned import Plan
from hfmerge.planning import make_plan
from hfmerge.publishing import Destination, publish, with_disks
from hfmerge.recipe import ModelEntry, Recipe, load_recipe
from hfmerge.recording import adopt_card, keep_foreign_files, readable_card, record
from hfmerge.runtime import Ranks, processes
from hfmerge.source import parse_ref
from hfmerge.streaming import Streamed
from hfmerge.verifying import Report, verify_merge
from hfmerge.workspace import Workspace, full_disk, recover, workspace


@dataclass(frozen=True)
class MergeResult:
    """What a verb made.

    Attributes:
        folder: the output, None when it only went to the Hub.
        entry: the ledger entry written.
        warnings: what the user should know.
        pushed: where it was published, or None.
        seconds: wall time of the computation and of everything.
        processes: how many took part.
        reused: chunks of tensors taken over from a run that was killed; those of a second pass count again.
        streamed: what was read from the Hub without keeping it; None where that was not asked for.
    """

    folder: Path | None
    entry: Entry
    warnings: tuple[str, ...]
    pushed: Pushed | None
    seconds: Mapping[str, float]
    processes: int = 1
    reused: int = 0
    streamed: Streamed | None = None


def plan(recipe: Recipe | str | Path) -> Plan:
    """What a merge would do, from headers alone; downloads no weights.

    Raises:
        RecipeError: every problem of the recipe and its models at once.
    """
    asked, origin = _recipe(recipe)
    return make_plan(asked, origin=origin)


def merge(
    recipe: Recipe | str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Merge the models of a recipe into a new folder, with ledger and card, and publish it if asked.

    Args:
        recipe: a `Recipe` or the path of a YAML file.
        output, push_to, private: instead of the recipe's.
        create_pr: publish as a pull request.
        options: how the run uses the machine.

    Raises:
        HfMergeError: see `hfmerge.errors`; nothing half-written remains.
    """
    asked, origin = _recipe(recipe)
    target, repo_id = output or asked.output, push_to or asked.push_to
    if target is None and repo_id is None:
        raise OutputError(f"{origin}: says neither `output` nor `push_to`; name a folder or a repository.")
    start = time.monotonic()
    private = asked.private if private is None else private
    destination = Destination(repo_id, private, create_pr) if repo_id is not None else None
    with processes() as ranks, Digester() as digester:
        # one process hashes what is here while it plans; several share the hashing later
        early = digester.start if ranks.world == 1 else None
        ranks = with_disks(ranks, target, options.storage)
        pinned = _pinned_recipe(asked, ranks)
        planned = for_machines(ranks.each(partial(make_plan, pinned, origin=origin, on_source=early)), ranks)
        with _folder(target, planned, ranks, replace=False, resume=options.resume) as place:
            entry, seconds, _, outcome = _build(planned, place, ranks, None, None, digester, options)
            pushed = publish(planned, place.folder, ranks, destination) if target is None and destination else None
        if target is not None and destination is not None:
            pushed = ranks.on_main(partial(_push_written, Path(target), destination))
        return _result(target, entry, planned, pushed, start, seconds, world=ranks.world, outcome=outcome)


def add(
    merged: str | Path,
    models: Sequence[str | ModelEntry],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
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
        sources: name of a model that was merged from a folder -> where that lies now.
        stream: see `Recipe.stream`.
        options: as for `merge`.

    Raises:
        HfMergeError: see `hfmerge.errors`; the existing merge stays as it was.
    """
    given = [m if isinstance(m, ModelEntry) else ModelEntry(m) for m in models]
    with processes() as ranks:
        opened = _opened(merged, sources, ranks)
        entries = [ModelEntry(_pinned_ref(entry.model, ranks), entry.weight) for entry in given]
        make = partial(plan_add, opened, entries, stream=stream)
        return _change(opened, make, ranks, output, push_to, create_pr, options)


def unmerge(
    merged: str | Path,
    remove: str | Sequence[str],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Take models out: the result has the bytes of the merge that never saw them.

    Args:
        merged, output, push_to, create_pr, sources, stream, options: as for `add`.
        remove: names as the ledger lists them.

    Raises:
        LedgerError: not in the merge, or nothing would be left. HfMergeError: see `hfmerge.errors`.
    """
    names = [remove] if isinstance(remove, str) else list(remove)
    with processes() as ranks:
        opened = _opened(merged, sources, ranks)
        make = partial(plan_unmerge, opened, names, stream=stream)
        return _change(opened, make, ranks, output, push_to, create_pr, options)


def verify(merged: str | Path, *, replay: bool = False, sources: Mapping[str, str] | None = None) -> Report:
    """Check ledger, files and card of a merge; with `replay`, merge again and compare bytes. See `Report.ok`."""
    return verify_merge(str(merged), replay=replay, sources=sources)


def push(
    folder: str | Path, repo_id: str, *, private: bool | None = None, create_pr: bool = False, check: bool = True
) -> Pushed:
    """Publish a merge folder.

    Args:
        check: verify the folder first, so that nothing is published that its ledger does not describe.

    Raises:
        VerificationError: the folder is not what its ledger says. PushError: see `hub.push_folder`.
    """
    if check:
        report = verify_merge(str(folder))
        if not report.ok:
            raise VerificationError(f"{folder}: not pushed; {report.culprits[0]}")
    pushed = push_folder(Path(folder), repo_id, private=private, create_pr=create_pr)
    adopt_card(Path(folder), repo_id)
    return pushed


def _recipe(recipe: Recipe | str | Path) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, "recipe"
    return load_recipe(recipe), str(recipe)


def _opened(merged: str | Path, sources: Mapping[str, str] | None, ranks: Ranks) -> Merged:
    """An existing merge, made whole if a killed run left it in two places."""
    ranks.on_main(partial(recover, merged))
    ref = _pinned_ref(str(merged), ranks)
    return ranks.each(lambda: open_merged(ref, sources))


def _pinned_ref(ref: str, ranks: Ranks) -> str:
    """The reference as rank 0 sees it now, pinned to a commit, so that all processes read the same thing."""
    if ranks.world == 1:
        return ref
    return ranks.on_main(lambda: _pin_text(ref))


def _pin_text(ref: str) -> str:
    try:
        places = [pin(place) for place in parse_ref(ref)]
    except HfMergeError:
        # planning meets the same fault and reports it together with all others
        return ref
    return "+".join(f"{p.name}@{p.commit}" if p.commit else p.place.text for p in places)


def _pinned_recipe(recipe: Recipe, ranks: Ranks) -> Recipe:
    models = tuple(ModelEntry(_pinned_ref(entry.model, ranks), entry.weight) for entry in recipe.models)
    return dataclasses.replace(recipe, base=_pinned_ref(recipe.base, ranks), models=models)


@contextlib.contextmanager
def _folder(
    target: str | Path | None, planned: Plan, ranks: Ranks, *, replace: bool, resume: bool | None
) -> Iterator[Workspace]:
    """The folder to build in, held by one process a disk: a workspace that becomes `target`, or a temporary one."""
    with contextlib.ExitStack() as stack:
        places = ranks.together(
            lambda: stack.enter_context(_place(target, planned, replace, resume)) if ranks.leads else None
        )
        place = places[ranks.on_disk(ranks.disk)[0]]
        assert place is not None
        yield place
        ranks.each(stack.close)


def _place(
    target: str | Path | None, planned: Plan, replace: bool, resume: bool | None
) -> contextlib.AbstractContextManager[Workspace]:
    if target is None and resume:
        raise OutputError("--resume: what only goes to the Hub is not kept here; name an --output, or leave it out.")
    if target is None:
        return _temporary(planned)
    work = work_of(planned)
    return workspace(Path(target), needed=planned.estimate.disk, replace=replace, work=work, resume=resume)


@contextlib.contextmanager
def _temporary(planned: Plan) -> Iterator[Workspace]:
    """A folder for a result that only goes to the Hub."""
    with tempfile.TemporaryDirectory(prefix="hfmerge-") as name:
        free = shutil.disk_usage(name).free
        if free < planned.estimate.disk:
            raise OutputError(
                f"{name}: {planned.estimate.disk / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; set TMPDIR."
            )
        with full_disk(Path(name)):
            yield Workspace(Path(name).absolute(), None)


def _change(
    opened: Merged,
    make: Callable[[], Change],
    ranks: Ranks,
    output: str | Path | None,
    push_to: str | None,
    create_pr: bool,
    options: RunOptions,
) -> MergeResult:
    target: str | Path | None = output
    if target is None and opened.pinned.folder is not None:
        target = opened.pinned.folder
    if target is None and push_to is None:
        name = opened.pinned.name
        raise PushError(f"{name}: lies on the Hub; say where the result goes: --push-to {name}, or --output FOLDER.")
    start = time.monotonic()
    ranks = with_disks(ranks, target, options.storage)
    change = ranks.each(make)
    change = dataclasses.replace(change, plan=for_machines(change.plan, ranks))
    replace = (
        opened.pinned.folder is not None and target is not None and Path(target).resolve() == opened.pinned.folder
    )
    own = push_to is not None and push_to.lower() == opened.pinned.name.lower()
    parent = opened.pinned.commit if own else None
    destination = Destination(push_to, None, create_pr, parent) if push_to is not None else None
    with _folder(target, change.plan, ranks, replace=replace, resume=options.resume) as place:
        entry, seconds, notes, outcome = _build(change.plan, place, ranks, opened, change, None, options)
        if replace:
            ranks.on_main(partial(keep_foreign_files, opened, place.folder))
        pushed = publish(change.plan, place.folder, ranks, destination) if target is None and destination else None
    if target is not None and destination is not None:
        pushed = ranks.on_main(partial(_push_written, Path(target), destination))
    return _result(target, entry, change.plan, pushed, start, seconds, notes, world=ranks.world, outcome=outcome)


def _result(
    target: str | Path | None,
    entry: Entry,
    planned: Plan,
    pushed: Pushed | None,
    start: float,
    seconds: float,
    notes: tuple[str, ...] = (),
    *,
    world: int,
    outcome: Outcome,
) -> MergeResult:
    licences = restrictive([entry.base, *entry.models])
    times = {"merging": seconds, "total": time.monotonic() - start}
    folder = Path(target) if target is not None else None
    unverified = outcome.streamed.unverified if outcome.streamed is not None else ()
    unchecked = [f"{file.name}: not compared with the digest that the Hub lists: {file.why}" for file in unverified]
    warnings = (*planned.warnings, *notes, *unchecked, *licences)
    return MergeResult(folder, entry, warnings, pushed, times, world, outcome.reused, outcome.streamed)


def _build(
    planned: Plan,
    place: Workspace,
    ranks: Ranks,
    opened: Merged | None,
    change: Change | None,
    digester: Digester | None,
    options: RunOptions,
) -> tuple[Entry, float, tuple[str, ...], Outcome]:
    """Run a plan into a folder and add ledger and card; also seconds of the run, warnings, and what the run told."""
    existing = readable_card(opened) if opened else None
    start = time.monotonic()
    outcome = run(planned, place.folder, ranks, digester, journal=place.journal, options=options)
    seconds = time.monotonic() - start
    with stand_ins(planned, place.folder, ranks):
        entry, notes = ranks.on_main(partial(record, planned, place.folder, outcome, opened, change, existing))
    return entry, seconds, notes, outcome


def _push_written(folder: Path, destination: Destination) -> Pushed:
    """Publish a folder that is complete already: a failure costs nothing but the push."""
    try:
        pushed = destination.push(folder)
    except HfMergeError as error:
        raise PushError(
            f"{error} The merge itself is in {folder}; `hfmerge push {folder} {destination.repo_id}` tries again."
        ) from error
    adopt_card(folder, destination.repo_id)
    return pushed


__all__ = [
    "MergeResult",
    "Pushed",
    "RecipeError",
    "Report",
    "RunOptions",
    "add",
    "merge",
    "plan",
    "push",
    "unmerge",
    "verify",
]
