"""How a verb runs: references pinned, a plan built into a folder, ledger and card recorded, the result published."""

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
from typing import TYPE_CHECKING

from hfmerge.checkpoint.digests import Digester
from hfmerge.checkpoint.streaming.session import Streamed
from hfmerge.engine.device import Device, device_for
from hfmerge.engine.environment import environment
from hfmerge.engine.executor import Outcome, run
from hfmerge.engine.fingerprint import work_of
from hfmerge.engine.options import NO_CONSENT, Consent, RunOptions
from hfmerge.engine.plan import Plan
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.storage import for_machines, stand_ins
from hfmerge.engine.workspace import Workspace, full_disk, recover, workspace
from hfmerge.errors import HfMergeError, OutputError, PushError
from hfmerge.hub.download import pin
from hfmerge.hub.reference import parse_ref
from hfmerge.ledger.card import restrictive
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.repository import Merged, note_places, open_merged
from hfmerge.ledger.seen import follow, refuse_rewritten
from hfmerge.lifecycle.admission import admit_change, own_destination
from hfmerge.lifecycle.archive_write import keep_sources
from hfmerge.lifecycle.changes import Change
from hfmerge.lifecycle.gap import gap_of
from hfmerge.lifecycle.publish import Pushed, publish, push_folder, with_disks
from hfmerge.lifecycle.push_target import Destination
from hfmerge.lifecycle.record import (
    adopt_card,
    keep_foreign_files,
    local_sources,
    other_arithmetic,
    readable_card,
    record,
    refuse_unknown_files,
)
from hfmerge.recipe.recipe import ModelEntry, Recipe, load_recipe
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from hfmerge.learning.learn import Learned

NOTHING_KEPT = "cannot resume: what only goes to the Hub is not kept here; name an output folder, or start anew."


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
        repeated: `entry` is of an earlier run of the same command; this one only finished what that one left undone.
    """

    folder: Path | None
    entry: Entry
    warnings: tuple[str, ...]
    pushed: Pushed | None
    seconds: Mapping[str, float]
    processes: int = 1
    reused: int = 0
    streamed: Streamed | None = None
    repeated: bool = False


def opened_merge(merged: str | Path, sources: Mapping[str, str] | None, ranks: Ranks, options: RunOptions) -> Merged:
    """An existing merge, made whole if a killed run left it in two places, and with the history that this user saw.

    Raises:
        LedgerError: no ledger, a broken one, or one that was rewritten since it was seen.
    """
    ranks.on_main(partial(recover, merged))
    ref = pinned_ref(str(merged), ranks)
    opened = ranks.each(lambda: open_merged(ref, sources, options.consent))
    # as it was asked for: a history is remembered by its branch, not by the commit that stands for it in this run
    asked = dataclasses.replace(opened.pinned, place=parse_ref(str(merged))[0])
    ranks.on_main(partial(refuse_rewritten, dataclasses.replace(opened, pinned=asked)))
    return opened


def pinned_ref(ref: str, ranks: Ranks) -> str:
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


def pinned_recipe(recipe: Recipe, ranks: Ranks) -> Recipe:
    models = tuple(ModelEntry(pinned_ref(entry.model, ranks), entry.weight) for entry in recipe.models)
    return dataclasses.replace(recipe, base=pinned_ref(recipe.base, ranks), models=models)


def given_recipe(recipe: Recipe | str | Path, consent: Consent = NO_CONSENT) -> tuple[Recipe, str]:
    """The recipe a verb was called with, which is its caller's consent like `consent`, and its name in messages."""
    asked, origin = (recipe, "recipe") if isinstance(recipe, Recipe) else (load_recipe(recipe), str(recipe))
    asked = dataclasses.replace(
        asked,
        trust_remote_code=asked.trust_remote_code or consent.trust_remote_code,
        allow_pickle=asked.allow_pickle or consent.allow_pickle,
    )
    return asked, origin


def device_of(planned: Plan, ranks: Ranks, options: RunOptions) -> Device:
    """What will compute in this process; a device that cannot is refused here, before anything is loaded."""
    return ranks.each(lambda: device_for(options.device, spectral=planned.method.matrixwise))


@contextlib.contextmanager
def folder_for(
    target: str | Path | None, planned: Plan, ranks: Ranks, device: Device, *, replace: bool, resume: bool | None
) -> Iterator[Workspace]:
    """The folder to build in, held by one process a disk: a workspace that becomes `target`, or a temporary one."""
    # the folder may be the current one, which is another once it was replaced
    made = None if target is None else Path(target).absolute()
    with contextlib.ExitStack() as stack:
        places = ranks.together(
            lambda: stack.enter_context(_place(target, planned, device, replace, resume)) if ranks.leads else None
        )
        place = places[ranks.on_disk(ranks.disk)[0]]
        assert place is not None
        yield place
        ranks.each(stack.close)
    if made is not None:
        ranks.on_main(partial(follow, made))


def _place(
    target: str | Path | None, planned: Plan, device: Device, replace: bool, resume: bool | None
) -> contextlib.AbstractContextManager[Workspace]:
    if target is None and resume:
        raise OutputError(NOTHING_KEPT)
    if target is None:
        return _temporary(planned)
    work = work_of(planned, device)
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
            yield Workspace(Path(name).absolute(), None, None)


def apply_change(
    opened: Merged,
    make: Callable[[], Change],
    ranks: Ranks,
    output: str | Path | None,
    to: Destination | None,
    options: RunOptions,
    *,
    new: Sequence[str] = (),
    without: Sequence[str] = (),
    base: str | None = None,
) -> MergeResult:
    """Plan a change of a merge, carry it out and publish it.

    Args:
        new, without, base: what the change is about; see `admit_change`.
    """
    target: str | Path | None = output
    if target is None and opened.pinned.folder is not None:
        target = opened.pinned.folder
    if target is None and to is None:
        name = opened.pinned.name
        where = f"{parameter('push_to', name)}, or {parameter('output', 'FOLDER')}"
        raise PushError(f"{name}: lies on the Hub; say where the result goes: {where}.")
    start = time.monotonic()
    replace = (
        opened.pinned.folder is not None and target is not None and Path(target).resolve() == opened.pinned.folder
    )
    if replace:
        ranks.on_main(partial(refuse_unknown_files, opened))
    check_readers = admit_change(opened, to, ranks, options, new=new, without=without, base=base)
    ranks = with_disks(ranks, target, options.storage)
    change = ranks.each(make)
    check_readers()
    device = device_of(change.plan, ranks, options)
    change = dataclasses.replace(change, plan=for_machines(change.plan, ranks, device))
    if change.action in ("unmerge", "subtract") and options.notify is not None and ranks.main:
        need = change.plan.estimate
        options.notify(
            f"{change.action}: {change.how}; reads {need.read / 1e9:.2f} GB, {need.download / 1e9:.2f} to load"
        )
    _tell_mixture(opened, change.plan, device, ranks, options)
    destination = own_destination(opened, to) if to is not None else None
    stays = to is not None and to.repo_id.lower() == opened.pinned.name.lower() and target is None
    with folder_for(target, change.plan, ranks, device, replace=replace, resume=options.resume) as place:
        plan, learned = weights_found(change.plan, place, ranks, options, opened, change.action)
        change = dataclasses.replace(change, plan=plan)
        entry, seconds, notes, outcome = build(
            change.plan, place, ranks, opened, change, None, options, learned=learned, stays=stays
        )  # fmt: skip
        if replace:
            ranks.on_main(partial(keep_foreign_files, opened, place.folder))
        pushed = publish(change.plan, place.folder, ranks, destination) if target is None and destination else None
    if target is not None and destination is not None:
        pushed = ranks.on_main(partial(push_written, Path(target), destination))
    return result_of(target, entry, change.plan, pushed, start, seconds, notes, world=ranks.world, outcome=outcome)


def _tell_mixture(opened: Merged, planned: Plan, device: Device, ranks: Ranks, options: RunOptions) -> None:
    """Say that a change goes on from a state of other arithmetic than it will be computed with."""
    apart = other_arithmetic(planned, opened, environment(device))
    if apart and options.notify is not None and ranks.main:
        options.notify(
            f"the kept state was made with {'; '.join(apart)}: the last bits will be of both. Compute where it was "
            "made, or merge all models again, for bytes that one of them gives alone."
        )


def weights_found(
    planned: Plan,
    place: Workspace,
    ranks: Ranks,
    options: RunOptions,
    opened: Merged | None = None,
    action: str = "merge",
) -> tuple[Plan, Learned | None]:
    """The plan with learned weights, if its recipe asks for them, and what is kept of learning.

    How far it came is noted in the journal of `place`, for who goes on from a killed run.
    """
    if planned.recipe.learn is None:
        return planned, None
    from hfmerge.learning.learn import learn

    return learn(
        planned, ranks, journal=place.journal, shelf=options.rows, opened=opened, action=action, notify=options.notify,
        device=options.device,
    )  # fmt: skip


def result_of(
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


def build(
    planned: Plan,
    place: Workspace,
    ranks: Ranks,
    opened: Merged | None,
    change: Change | None,
    digester: Digester | None,
    options: RunOptions,
    *,
    learned: Learned | None = None,
    stays: bool = False,
) -> tuple[Entry, float, tuple[str, ...], Outcome]:
    """Run a plan into a folder and add ledger and card; also seconds of the run, warnings, and what the run told.

    Args:
        learned: how the plan's weights were found, where they were learned.
        stays: see `keep_sources`; the other arguments as elsewhere.
    """
    existing = readable_card(opened) if opened else None
    start = time.monotonic()
    outcome = run(planned, place.folder, ranks, digester, journal=place.journal, options=options)
    seconds = time.monotonic() - start
    copies, lost = _kept(planned, place.folder, ranks, outcome, opened, change, options, stays)
    with stand_ins(planned, place.folder, ranks):
        exact = change.exact if change is not None else None
        gap = ranks.on_main(partial(gap_of, planned, outcome, place.folder, exact)) if planned.subtracted else None
        known = ranks.on_main(partial(learned.keep, place.folder)) if learned is not None else None
        entry, notes = ranks.on_main(
            partial(record, planned, place.folder, outcome, opened, change, existing, gap, copies, known)
        )
        places = local_sources(planned, entry, opened)
        ranks.on_main(partial(note_places, entry, place.output, places))
    return entry, seconds, (*lost, *_left_out(planned, outcome), *notes), outcome


def _kept(
    planned: Plan,
    folder: Path,
    ranks: Ranks,
    outcome: Outcome,
    opened: Merged | None,
    change: Change | None,
    options: RunOptions,
    stays: bool,
) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """Copies of the sources, if they are to be kept (see `keep_sources`)."""
    if not planned.recipe.keep_sources:
        return (), ()
    if options.notify is not None and ranks.main:
        options.notify(f"keeping copies of {1 + len(planned.deltas)} sources beside the state")
    return keep_sources(planned, folder, ranks, outcome, opened, change, stays=stays)


def _left_out(planned: Plan, outcome: Outcome) -> list[str]:
    """A warning for each model whose change was left out somewhere."""
    return [
        f"{delta.source.pinned.label}: in {count} parameters its change is a combination of those of earlier models, "
        f"so {planned.method.name} leaves it out there."
        for delta, count in zip(planned.deltas, outcome.dependent, strict=True)
        if count
    ]


def push_written(folder: Path, destination: Destination) -> Pushed:
    """Publish a folder that is complete already: a failure costs nothing but the push."""
    try:
        pushed = push_folder(folder, destination)
    except HfMergeError as error:
        raise PushError(
            f"{error} The merge itself is in {folder}; `hfmerge push {folder} {destination.repo_id}` tries again."
        ) from error
    adopt_card(folder, destination.repo_id)
    return pushed
