"""What is wrong with a job, found before any work and told at once: recipe, output, device, target of a push, models.

Each check is made whether or not another one failed. A single fault is raised as it is, several as one `RecipeError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hfmerge.engine.device import place_for
from hfmerge.engine.options import RunOptions
from hfmerge.engine.planner import make_plan
from hfmerge.engine.workspace import check_output
from hfmerge.errors import HfMergeError, LostProcessError, OutputError, Problem, PushError, RecipeError
from hfmerge.hub.download import pin
from hfmerge.hub.reference import parse_ref
from hfmerge.ledger.repository import Merged
from hfmerge.lifecycle.admission import admit_job
from hfmerge.lifecycle.job import Job
from hfmerge.lifecycle.push_target import destination
from hfmerge.lifecycle.session import Session, session
from hfmerge.validation.wording import parameter


_T = TypeVar("_T")


class Faults:
    """Collects errors of independent checks.

    Args:
        origin: name of the job in messages.
        known: problems that were found before, and are told with the others.
    """

    def __init__(self, origin: str, known: Sequence[Problem] = ()):
        self.origin = origin
        self.known = tuple(known)
        self._errors: list[tuple[str, HfMergeError]] = []

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Collect the error of one check; `path` names what it is about."""
        try:
            yield
        except LostProcessError:
            raise
        except HfMergeError as error:
            self._errors.append((path, error))

    def __bool__(self) -> bool:
        return bool(self.known or self._errors)

    def problems(self) -> list[Problem]:
        """All faults; of two checks of one key, the first that failed."""
        found = list(self.known)
        for path, error in self._errors:
            more = error.problems if isinstance(error, RecipeError) else [Problem(path, str(error))]
            before = {problem.path for problem in found}
            found += [problem for problem in more if problem.path not in before]
        return found

    def tell(self) -> None:
        """Raise what was collected.

        Raises:
            HfMergeError: the only fault. RecipeError: several.
        """
        if len(self._errors) == 1 and not self.known:
            raise self._errors[0][1]
        if self:
            raise RecipeError(self.problems(), self.origin)


def target_of(job: Job, merged: Merged | None) -> Path | None:
    """Folder of the result; None if the result is only published."""
    if job.output is not None:
        return Path(job.output)
    return merged.snapshot.folder if merged is not None else None


def lies_at(merged: Merged, folder: Path) -> bool:
    return folder.resolve() == merged.snapshot.folder


def check_place(job: Job, merged: Merged | None, options: RunOptions) -> None:
    """Whether the result has a place that it may take.

    Raises:
        OutputError: no place is named, the folder is not empty or cannot be made, or there is nothing to resume.
        PushError: no place is named for a merge on the Hub.
    """
    target = target_of(job, merged)
    if target is not None:
        check_output(target, replace=merged is not None and lies_at(merged, target))
    elif job.to is None:
        if merged is None:
            raise OutputError(f"{job.origin}: says neither `output` nor `push_to`; name a folder or a repository.")
        name = merged.snapshot.name
        there = "org/name" if merged.snapshot.subfolder is not None else name
        where = f"{parameter('push_to', there)}, or {parameter('output', 'FOLDER')}"
        raise PushError(f"{name}: lies on the Hub; say where the result goes: {where}.")
    elif options.resume:
        raise OutputError(
            "cannot resume: a run that only publishes leaves no unfinished work here; "
            "name an output folder, or start anew."
        )


def opened_for(job: Job, here: Session) -> Merged:
    """The merge that a job changes.

    Raises:
        HfMergeError: it cannot be opened; with it, whatever else is wrong with the job's output and device.
    """
    faults = Faults(str(job.merged))
    merged = None
    with faults.at("merged"):
        merged = here.open(str(job.merged), job.sources)
    if merged is None:
        # a result that replaces the merge has its place, whatever is wrong with the merge
        apart = job.output is not None and Path(job.output).resolve() != Path(str(job.merged)).resolve()
        asked = dataclasses.replace(job, to=None, output=job.output if apart else None)
        _check_here(asked, None, here, faults, named=False)
    faults.tell()
    assert merged is not None
    return merged


def check_early(
    job: Job, merged: Merged | None, here: Session, *, publishing: bool = True, known: Sequence[Problem] = ()
) -> tuple[Faults, Callable[[], None]]:
    """Make all checks that need no plan.

    Args:
        publishing: the job is carried out now. A repository may be created to learn whether the token may do so.
        known: problems that were found before.

    Returns:
        What is wrong, and a check for after planning (see `admission.admit_change`).
    """
    faults = Faults(job.origin if merged is None else merged.snapshot.label, known)
    unclear = {problem.path for problem in known} & {"output", "push_to", "private"}
    _check_here(job, merged, here, faults, named=not unclear)
    readers = [lambda: None]
    with faults.at("push_to"):
        readers = [admit_job(job, merged, here, create=publishing and not faults)]
    return faults, readers[0]


def _check_here(job: Job, merged: Merged | None, here: Session, faults: Faults, *, named: bool) -> None:
    """Check the place of the result and the device.

    Args:
        named: what the job says of its place can be relied on.
    """
    if named or job.output is not None:
        with faults.at("output"):
            here.on_main(partial(check_place, job, merged, here.options))
    if here.options.device is not None:
        with faults.at("device"):
            here.each(partial(place_for, here.options.device))


def planned_early(
    job: Job, merged: Merged | None, here: Session, plan: Callable[[], _T], *, publishing: bool = True
) -> _T:
    """Check a job in every respect, and plan it.

    Args:
        plan: makes the plan.
        publishing: as of `check_early`.

    Raises:
        HfMergeError: all that is wrong.
    """
    faults, check_readers = check_early(job, merged, here, publishing=publishing)
    made: list[_T] = []
    # a plan of a published merge downloads its state, and with this consent one may download weights; a job that
    # fails needs neither
    consent = job.recipe.allow_pickle if job.recipe is not None else here.options.allow_pickle
    published = merged is not None and merged.snapshot.folder is None
    if not (faults and (consent or published)):
        with faults.at(job.action):
            made.append(here.each(plan))
            check_readers()
    if not made and not any(problem.path.startswith("models[") for problem in faults.problems()):
        # a change may fail at what it has already, before it looks at what is new
        for i, entry in enumerate(job.models):
            with faults.at(f"models[{i}]"):
                here.each(partial(_pin_all, entry.model))
    faults.tell()
    return made[0]


def _pin_all(ref: str) -> None:
    for place in parse_ref(ref):
        pin(place)


@contextlib.contextmanager
def all_faults(options: RunOptions, *, planning: bool = False, **allowed: Any) -> Iterator[None]:
    """While a recipe is read: tell with its faults all others of the merge that it asks for.

    Args:
        planning: nothing but a plan is asked for, so the place of the result does not matter.
        allowed: how the result is published (see `push_target.destination`).

    Raises:
        RecipeError: all that is wrong.
    """
    try:
        yield
    except RecipeError as error:
        recipe = error.draft
        if recipe is None:
            raise
        allows = options.consent
        recipe = dataclasses.replace(
            recipe,
            trust_remote_code=recipe.trust_remote_code or allows.trust_remote_code,
            allow_pickle=recipe.allow_pickle or allows.allow_pickle,
        )
        to = None if planning else destination(recipe.push_to, private=recipe.private, **allowed)
        job = Job("merge", recipe=recipe, origin=error.origin, output=recipe.output, to=to)
        with session(options) as here:
            faults = Faults(error.origin, error.problems)
            if not planning:
                faults, _ = check_early(job, None, here, publishing=False, known=error.problems)
            if not recipe.allow_pickle:
                with faults.at("models"):
                    here.each(partial(make_plan, recipe, origin=error.origin, faults=error.problems))
        raise RecipeError(faults.problems(), error.origin) from error
