"""What a job would do, found out without doing it: the way, what it reads, what it needs, where it goes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hfmerge.engine.estimate import more_states
from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.engine.plan import Estimate
from hfmerge.errors import VerificationError
from hfmerge.ledger.removal import contained_models
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.lifecycle.early import check_early, check_place, opened_for, planned_early, target_of
from hfmerge.lifecycle.job import Job
from hfmerge.lifecycle.nested import inner_jobs
from hfmerge.lifecycle.perform import DONE, inner_removal, pinned_job, planned, state_advice
from hfmerge.lifecycle.push_target import Destination, admit, check_readers, destination, with_snapshots
from hfmerge.lifecycle.record import readable_card
from hfmerge.lifecycle.repeat import already_restored, in_place
from hfmerge.lifecycle.restore import check_code, find_earlier
from hfmerge.lifecycle.session import session
from hfmerge.lifecycle.verify import verify_merge


@dataclass(frozen=True)
class Forecast:
    """What a job would do.

    Attributes:
        action: the action, as a ledger entry names it.
        how: one line on how the result is computed and what is read.
        need: bytes and seconds; None where nothing is computed, or not known before the inner merges are made.
        models: labels of the models of the result, in order; those that are not read again too.
        starts: number of models that a kept state holds already; 0: the work starts from the base.
        folder: folder of the result; None if it only goes to the Hub.
        push_to: repository that the result goes to; None: it is not published.
        inner: the inner merges that are made again first.
        warnings: warnings for the user.
        advice: what would make such changes cheaper; None: nothing.
    """

    action: str
    how: str
    need: Estimate | None = None
    models: tuple[str, ...] = ()
    starts: int = 0
    folder: str | None = None
    push_to: str | None = None
    inner: tuple[Forecast, ...] = ()
    warnings: tuple[str, ...] = ()
    advice: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def forecast(job: Job, options: RunOptions = DEFAULT) -> Forecast:
    """Check and plan a job as `perform` does, from headers alone. No weights are read, and nothing is published.

    One thing may be written: if a run was killed while it replaced the folder of the merge, this is finished first.

    Raises:
        HfMergeError: whatever `perform` would raise before any work.
    """
    with session(options) as here:
        merged = None
        if job.recipe is not None:
            job = dataclasses.replace(job, recipe=here.pinned_recipe(job.recipe))
        else:
            merged = opened_for(job, here)
            job = pinned_job(job, here)
        target = target_of(job, merged)
        places: dict[str, Any] = {
            "folder": None if target is None else str(target),
            "push_to": None if job.to is None else job.to.repo_id,
        }
        if merged is not None and in_place(merged, job.output, job.to):
            done = {**DONE, "restore": lambda job, opened: already_restored(opened, int(job.step or 0))}.get(
                job.action
            )
            if done is not None and here.on_main(partial(done, job, merged)):
                return Forecast(
                    job.action, f"done already by step {merged.last.step}", None, _labels(merged), **places
                )
        if merged is not None and job.step is not None:
            here.on_main(partial(check_place, job, merged, options))
            earlier = find_earlier(merged, job.step, readable_card(merged))
            check_code(earlier, options)
            how = earlier.entry.how.replace("brought back", "is brought back").replace("was computed", "is computed")
            models = tuple(model.label for model in earlier.entry.models)
            return Forecast(job.action, how, None, models, **places, warnings=earlier.notes)
        removal = inner_removal(job, merged) if merged is not None else None
        if merged is not None and removal is not None:
            check_early(job, merged, here, publishing=False)[0].tell()
            jobs = inner_jobs(job, merged, removal, finishing=False).values()
            inner = tuple(forecast(one, options) for one in jobs if isinstance(one, Job))
            how = f"after the inner merge{'s' if len(jobs) > 1 else ''}, the outer one is made again"
            return Forecast(job.action, how, None, (), 0, **places, inner=inner)
        make = partial(planned, job, merged, here)
        change = planned_early(job, merged, here, make, publishing=False)
        plan = change.plan
        models = tuple(delta.source.label for delta in plan.deltas)
        advice = more_states(plan) if merged is None else state_advice(change)
        return Forecast(
            change.action,
            change.how,
            plan.estimate,
            models,
            plan.start,
            **places,
            warnings=plan.warnings,
            advice=advice,
        )


def admit_push(folder: Path, to: Destination, *, check: bool = True) -> tuple[Merged, str | None]:
    """Check that a folder may be pushed to a repository; gives the merge in it, and what the push will replace.

    Args:
        check: also verify the folder.

    Raises:
        VerificationError: the folder is not what its ledger says. PushError: it may not go there.
    """
    opened = open_merged(str(folder.absolute()))
    inputs = with_snapshots(contained_models(opened.last), opened.refs)
    level, note = admit(to, inputs, history=opened.history)
    check_readers(to, level, inputs)
    if check:
        report = verify_merge(str(folder))
        if not report.ok:
            raise VerificationError(f"{folder}: not pushed; {report.culprits[0]}")
    return opened, note


def forecast_push(folder: str | Path, repo_id: str, *, check: bool = True, **allowed: Any) -> Forecast:
    """What `api.push` would do; takes its arguments.

    Raises:
        HfMergeError: as of `admit_push`.
    """
    to = destination(repo_id, **allowed)
    assert to is not None
    opened, note = admit_push(Path(folder), to, check=check)
    how = f"one commit with step {opened.last.step}, its ledger and its card" + (f"; {note}" if note else "")
    return Forecast("push", how, None, _labels(opened), push_to=repo_id)


def _labels(merged: Merged) -> tuple[str, ...]:
    return tuple(model.label for model in merged.last.models)
