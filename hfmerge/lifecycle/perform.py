"""Carries out jobs. For every verb that makes a merge, the job is planned, run, recorded and published here."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.checkpoint.digests import Digester
from hfmerge.engine.device import Device, device_for
from hfmerge.engine.environment import environment
from hfmerge.engine.executor import Outcome, run
from hfmerge.engine.fingerprint import work_of
from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.engine.plan import Plan
from hfmerge.engine.planner import make_plan
from hfmerge.engine.storage import for_machines, stand_ins
from hfmerge.engine.workspace import Workspace, full_disk, workspace
from hfmerge.errors import HfMergeError, LedgerError, OutputError, PushError
from hfmerge.ledger.card import restrictive
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.repository import Merged, note_places
from hfmerge.ledger.seen import follow
from hfmerge.lifecycle.admission import admit_job, own_destination
from hfmerge.lifecycle.archive_write import keep_sources
from hfmerge.lifecycle.changes import (
    Change,
    first_merge,
    plan_add,
    plan_rebase,
    plan_reorder,
    plan_replace,
    plan_subtract,
    plan_unmerge,
    plan_without,
)
from hfmerge.lifecycle.gap import gap_of
from hfmerge.lifecycle.job import Job
from hfmerge.lifecycle.nested import Removal, find_removal, inner_jobs, removed_already
from hfmerge.lifecycle.publish import publish, with_disks
from hfmerge.lifecycle.record import (
    keep_foreign_files,
    local_sources,
    other_arithmetic,
    readable_card,
    record_result,
    refuse_unknown_files,
)
from hfmerge.lifecycle.repeat import already_added, already_replaced, finish, in_place
from hfmerge.lifecycle.restore import restore_step
from hfmerge.lifecycle.session import MergeResult, Session, push_written, session
from hfmerge.validation.wording import parameter, size


if TYPE_CHECKING:
    from hfmerge.learning.learn import Learned

PLANS: Mapping[str, Callable[[Job, Merged], Change]] = {
    "add": lambda job, merged: plan_add(merged, job.models, stream=job.stream),
    "unmerge": lambda job, merged: _plan_unmerge(job, merged),
    "subtract": lambda job, merged: plan_subtract(merged, job.names, measure=job.measure, stream=job.stream),
    "replace": lambda job, merged: plan_replace(
        merged, job.names[0], job.models[0].model, weight=job.weight, stream=job.stream
    ),
    "reorder": lambda job, merged: plan_reorder(merged, job.names, stream=job.stream),
    "rebase": lambda job, merged: plan_rebase(merged, str(job.base), stream=job.stream),
}
"""Action -> the plan of a job that changes a merge."""
DONE: Mapping[str, Callable[[Job, Merged], bool]] = {
    "add": lambda job, merged: already_added(merged, job.models),
    "unmerge": lambda job, merged: removed_already(merged, job.names),
    "replace": lambda job, merged: already_replaced(merged, job.names[0], job.models[0].model, job.weight),
}
"""Action -> whether the merge's last step is this very job, for actions that may be repeated."""


@dataclass(frozen=True)
class Made:
    """What a run left in its folder: the new entry, seconds of the run, warnings, and what the run told."""

    entry: Entry
    seconds: float
    notes: tuple[str, ...]
    outcome: Outcome


def perform(job: Job, options: RunOptions = DEFAULT) -> MergeResult:
    """Carry out a job.

    Call sequence, on all ranks: open the merge that is changed; pin all references; stop if its last step is this very
    job; make inner merges again; then `_carry_out`: check that the result may be written to its target; plan; run;
    record; publish. A job "restore" needs no plan and no run: after the pins, `restore_step` does the rest.

    Raises:
        HfMergeError: see `hfmerge.errors`; the merge stays as it was, and nothing half-written remains.
    """
    if job.action == "restore":
        with session(options) as here:
            return here.on_main(partial(restore_step, job, options))
    started = time.monotonic()
    if job.recipe is not None:
        check_place(job, None, options)
        with session(options) as here, Digester() as digester:
            snapshot = dataclasses.replace(job, recipe=here.pinned_recipe(job.recipe))
            return _carry_out(snapshot, None, dataclasses.replace(here, digester=digester), started)
    with session(options) as here:
        merged = here.open(str(job.merged), job.sources)
        job = pinned_job(job, here)
        done = DONE.get(job.action)
        if done is not None and in_place(merged, job.output, job.to) and here.on_main(partial(done, job, merged)):
            return finish(merged, job.to, here.ranks)
        removal = find_removal(merged.last, job.names) if job.action == "unmerge" else None
        if removal is None or not removal.within:
            check_place(job, merged, options)
            return _carry_out(job, merged, here, started)
        admit_job(job, merged, here)()
    # an inner merge is made anew by a job of its own, which opens a session of its own
    job = dataclasses.replace(job, parts=_inner_made(job, merged, removal, options))
    with session(options) as here:
        check_place(job, merged, options)
        return _carry_out(job, merged, here, started)


def pinned_job(job: Job, here: Session) -> Job:
    """A job with all references of new models pinned to commits."""
    base = None if job.base is None else here.pinned(job.base)
    return dataclasses.replace(job, models=tuple(map(here.pinned_model, job.models)), base=base)


def _inner_made(job: Job, merged: Merged, removal: Removal, options: RunOptions) -> dict[int, str | None]:
    """Carry out the jobs of inner merges: place of each in the outer one -> reference of the new one (`Job.parts`)."""
    parts: dict[int, str | None] = {}
    for i, inner in inner_jobs(job, merged, removal).items():
        if not isinstance(inner, Job):
            parts[i] = inner
            continue
        try:
            made = perform(inner, dataclasses.replace(options, resume=None))
        except HfMergeError as error:
            names = " and ".join(identity.rpartition("@")[0] for identity in removal.within[i])
            label = merged.last.models[i].label
            raise LedgerError(f"{names}: cannot be taken out of {label}, in which it was merged: {error}") from error
        parts[i] = f"{made.pushed.repo_id}@{made.pushed.commit}" if made.pushed is not None else inner.output
    return parts


def planned(job: Job, merged: Merged | None, here: Session) -> Change:
    """The plan of a job, the same on all ranks.

    Raises:
        LedgerError, RecipeError: what cannot be done, before any work.
    """
    if merged is not None:
        return PLANS[job.action](job, merged)
    assert job.recipe is not None
    # one process hashes what is here while it plans; several share the hashing later
    early = here.digester.start if here.digester is not None and here.ranks.world == 1 else None
    return first_merge(make_plan(job.recipe, origin=job.origin, on_source=early))


def _plan_unmerge(job: Job, merged: Merged) -> Change:
    if not job.parts:
        return plan_unmerge(merged, job.names, stream=job.stream)
    removal = find_removal(merged.last, job.names)
    gone = sorted({*removal.removed, *(i for i, ref in job.parts.items() if ref is None)})
    parts = {i: ref for i, ref in job.parts.items() if ref is not None}
    return plan_without(merged, gone, parts, removal.subjects, stream=job.stream)


def target_of(job: Job, merged: Merged | None) -> Path | None:
    """Folder of the result; None if the result is only published."""
    if job.output is not None:
        return Path(job.output)
    return merged.snapshot.folder if merged is not None else None


def lies_at(merged: Merged, folder: Path) -> bool:
    return folder.resolve() == merged.snapshot.folder


def check_place(job: Job, merged: Merged | None, options: RunOptions) -> None:
    target = target_of(job, merged)
    if target is None and job.to is None:
        if merged is None:
            raise OutputError(f"{job.origin}: says neither `output` nor `push_to`; name a folder or a repository.")
        name = merged.snapshot.name
        there = "org/name" if merged.snapshot.subfolder is not None else name
        where = f"{parameter('push_to', there)}, or {parameter('output', 'FOLDER')}"
        raise PushError(f"{name}: lies on the Hub; say where the result goes: {where}.")
    if target is None and options.resume:
        raise OutputError(
            "cannot resume: a run that only publishes leaves no unfinished work here; "
            "name an output folder, or start anew."
        )


def _carry_out(job: Job, merged: Merged | None, here: Session, started: float) -> MergeResult:
    """Plan, run, record and publish a job that is neither done already nor holds other jobs."""
    target, to, options = target_of(job, merged), job.to, here.options
    # the merge whose folder the result replaces
    replaced_one = merged if merged is not None and target is not None and lies_at(merged, target) else None
    if replaced_one is not None:
        here.on_main(partial(refuse_unknown_files, replaced_one))
    check_readers = admit_job(job, merged, here)
    here = dataclasses.replace(here, ranks=with_disks(here.ranks, target, options.storage))
    change = here.each(partial(planned, job, merged, here))
    check_readers()
    device = here.each(lambda: device_for(options.device, spectral=change.plan.method.needs == "matrix"))
    change = dataclasses.replace(change, plan=for_machines(change.plan, here.ranks, device))
    _announce(change, merged, device, here)
    stays = False
    if merged is not None and to is not None:
        to = own_destination(merged, to)
        stays = target is None and to.repo_id.lower() == merged.snapshot.name.lower()
    with _folder_for(target, change.plan, here, device, replace=replaced_one is not None) as place:
        change, learned = _with_weights(change, merged, place, here)
        made = _run(change, merged, place, here, learned, stays=stays)
        if replaced_one is not None:
            here.on_main(partial(keep_foreign_files, replaced_one, place.folder))
        pushed = publish(change.plan, place.folder, here.ranks, to) if target is None and to is not None else None
    if target is not None and to is not None:
        pushed = here.on_main(partial(push_written, target, to))
    streamed = made.outcome.streamed
    unchecked = [
        f"{file.name}: not compared with the digest that the Hub lists: {file.why}"
        for file in (streamed.unverified if streamed is not None else ())
    ]
    licences = restrictive([made.entry.base, *made.entry.models])
    return MergeResult(
        target,
        made.entry,
        tuple(dict.fromkeys((*change.plan.warnings, *made.notes, *unchecked, *licences))),
        pushed,
        {"merging": made.seconds, "total": time.monotonic() - started},
        here.ranks.world,
        made.outcome.reused,
        streamed,
    )


def _announce(change: Change, merged: Merged | None, device: Device, here: Session) -> None:
    """Tell the user what a removal reads, and warn if the kept state was computed with other arithmetic."""
    if change.action in ("unmerge", "subtract"):
        need = change.plan.estimate
        loads = f", downloads {size(need.download)}" if need.download else ""
        here.tell(f"{change.action}: {change.how}; reads {size(need.read)}{loads}")
    if merged is not None and (apart := other_arithmetic(change.plan, merged, environment(device))):
        here.tell(
            f"the kept state was made with {'; '.join(apart)}: the last bits of the result will depend on both. "
            "For bytes that depend on one alone, compute where the state was made, or merge all models again."
        )


@contextlib.contextmanager
def _folder_for(
    target: Path | None, plan: Plan, here: Session, device: Device, *, replace: bool
) -> Iterator[Workspace]:
    """The folder to build in, held by one process a disk: a workspace that becomes `target`, or a temporary one."""
    # the target may be the current folder, which is a different folder after it was replaced
    made, ranks = None if target is None else target.absolute(), here.ranks
    with contextlib.ExitStack() as stack:

        def enter() -> Workspace | None:
            if not ranks.leads:
                return None
            if target is None:
                return stack.enter_context(_temporary(plan))
            work = work_of(plan, device)
            needed, resume = plan.estimate.disk, here.options.resume
            return stack.enter_context(workspace(target, needed=needed, replace=replace, work=work, resume=resume))

        place = ranks.together(enter)[ranks.on_disk(ranks.disk)[0]]
        assert place is not None
        yield place
        ranks.each(stack.close)
    if made is not None:
        ranks.on_main(partial(follow, made))


@contextlib.contextmanager
def _temporary(plan: Plan) -> Iterator[Workspace]:
    """A folder for a result that only goes to the Hub."""
    with tempfile.TemporaryDirectory(prefix="hfmerge-") as name:
        free = shutil.disk_usage(name).free
        if free < plan.estimate.disk:
            raise OutputError(
                f"{name}: {plan.estimate.disk / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; set TMPDIR."
            )
        with full_disk(Path(name)):
            yield Workspace(Path(name).absolute(), None, None)


def _with_weights(
    change: Change, merged: Merged | None, place: Workspace, here: Session
) -> tuple[Change, Learned | None]:
    """The change with learned weights in its plan, if its recipe asks for them, and the record of learning.

    The progress of learning is noted in the journal of `place`, so that a killed run can be continued.
    """
    if change.plan.recipe.learn is None:
        return change, None
    from hfmerge.learning.learn import learn

    options = here.options
    plan, learned = learn(
        change.plan, here.ranks, journal=place.journal, shelf=options.rows, opened=merged, action=change.action,
        notify=options.notify, device=options.device,
    )  # fmt: skip
    return dataclasses.replace(change, plan=plan), learned


def _run(
    change: Change, merged: Merged | None, place: Workspace, here: Session, learned: Learned | None, *, stays: bool
) -> Made:
    """Run a plan into a folder, and record it there: copies of sources, ledger and card.

    Args:
        learned: how the plan's weights were found, where they were learned.
        stays: the result goes only to the repository that `merged` is (see `keep_sources`).
    """
    plan, ranks = change.plan, here.ranks
    existing = readable_card(merged) if merged is not None else None
    start = time.monotonic()
    outcome = run(plan, place.folder, ranks, here.digester, journal=place.journal, options=here.options)
    seconds = time.monotonic() - start
    copies: tuple[str | None, ...] = ()
    lost: tuple[str, ...] = ()
    if plan.recipe.keep_sources:
        here.tell(f"keeping copies of {1 + len(plan.deltas)} sources beside the state")
        copies, lost = keep_sources(change, place.folder, ranks, outcome, merged, stays=stays)
    with stand_ins(plan, place.folder, ranks):
        gap = here.on_main(partial(gap_of, plan, outcome, place.folder, change.exact)) if plan.subtracted else None
        known = here.on_main(partial(learned.keep, place.folder)) if learned is not None else None
        entry, notes = here.on_main(
            partial(
                record_result, change, place.folder, outcome, merged, existing, gap=gap, copies=copies, learned=known
            )
        )
        places = local_sources(plan, entry, merged)
        here.on_main(partial(note_places, entry, place.output, places))
    left_out = [
        f"{delta.source.snapshot.label}: in {count} parameters its change is a combination of those of earlier "
        f"models, so {plan.method.name} leaves it out there."
        for delta, count in zip(plan.deltas, outcome.dependent, strict=True)
        if count
    ]
    return Made(entry, seconds, (*lost, *left_out, *notes), outcome)
