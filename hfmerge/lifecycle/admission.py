"""Checks, before a verb begins, whether its result may be published at its target, from the models it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from hfmerge.engine.options import RunOptions
from hfmerge.errors import HfMergeError
from hfmerge.hub.download import pin
from hfmerge.hub.privacy import snapshot_of
from hfmerge.hub.reference import parse_ref
from hfmerge.ledger.entry import Entry, named
from hfmerge.ledger.removal import ContainedModel, contained_models
from hfmerge.ledger.repository import Merged, parts_of
from hfmerge.lifecycle.job import Job
from hfmerge.lifecycle.push_target import Destination, admit, check_readers, with_snapshots
from hfmerge.lifecycle.session import Session
from hfmerge.recipe.recipe import Recipe


SNAPSHOT = "folder in a cache"
"""Role of a repository that is read from a folder of the Hub's cache. The ledger names it as a folder."""


def admit_job(job: Job, merged: Merged | None, here: Session, *, create: bool = True) -> Callable[[], None]:
    """Whether the result of a job may go where it is to be published (see `push_target.admit`).

    Args:
        create: as of `push_target.admit`.

    Returns:
        As of `admit_change`.

    Raises:
        PushError: it may not go there. OfflineError: the Hub cannot be reached.
    """
    if merged is None:
        assert job.recipe is not None
        if job.to is not None:
            here.on_main(partial(_admit_merge, job.recipe, job.to, here.options, create))
        return lambda: None
    new = [model.model for model in job.models] + [ref for ref in job.parts.values() if ref is not None]
    leaving = job.names if job.action in ("unmerge", "replace") else ()
    return admit_change(merged, job.to, here, new=new, without=leaving, base=job.base, create=create)


def _admit_merge(recipe: Recipe, to: Destination, options: RunOptions, create: bool) -> None:
    inputs = [*_parts(recipe.base, "base"), *(part for m in recipe.models for part in _parts(m.model, "model"))]

    def again(entry: Entry) -> bool:
        """Whether an entry is this very merge, as far as the recipe says."""
        method, weights = entry.method, [model.weight for model in entry.models]
        alike = entry.action == "merge" and (method.name, method.norm) == (recipe.method.name, recipe.method.norm)
        alike = alike and all(method.options.get(k) == v for k, v in recipe.method.options.items())
        alike = alike and (recipe.learn is not None or weights == [model.weight for model in recipe.models])
        return alike and {p.name for p in contained_models(entry)} == {p.name for p in inputs if p.role != SNAPSHOT}

    level, note = admit(to, inputs, history={}, again=again, create=create)
    check_readers(to, level, inputs)
    _tell(options, note)


def admit_change(
    opened: Merged,
    to: Destination | None,
    here: Session,
    *,
    new: Sequence[str] = (),
    without: Sequence[str] = (),
    base: str | None = None,
    entry: Entry | None = None,
    create: bool = True,
) -> Callable[[], None]:
    """Whether the result of a change may go where it is to be published (see `push_target.admit`).

    Args:
        new: references of models that join.
        without: names of models that leave.
        base: reference of a new base.
        entry: ledger entry that lists all other models of the result; None: the last entry.
        create: as of `push_target.admit`.

    Returns:
        A check to be called after planning: whether everybody who may read the target may also read the inputs.
        Planning comes first because its errors name a remedy for inputs that are gone.

    Raises:
        PushError: it may not go there. OfflineError: the Hub cannot be reached.
    """
    if to is None:
        return lambda: None
    to = own_destination(opened, to)
    left = _without(entry or opened.last, without)

    def begin() -> tuple[int | None, list[ContainedModel]]:
        inputs = [part for part in contained_models(left) if base is None or part.role != "base"]
        inputs = with_snapshots(inputs, opened.refs)
        inputs += [part for ref in new for part in _parts(ref, "model")] + (_parts(base, "base") if base else [])
        level, note = admit(to, inputs, history=opened.history, create=create)
        _tell(here.options, note)
        return level, inputs

    level, inputs = here.on_main(begin)
    return lambda: here.on_main(partial(check_readers, to, level, inputs))


def own_destination(opened: Merged, to: Destination) -> Destination:
    """A destination, which the merge's own repository is only as long as nobody pushes there meanwhile."""
    if to.repo_id.lower() != opened.snapshot.name.lower():
        return to
    return dataclasses.replace(to, parent_commit=opened.snapshot.commit)


def _tell(options: RunOptions, note: str | None) -> None:
    if note is not None and options.notify is not None:
        options.notify(note)


def _without(entry: Entry, names: Sequence[str]) -> Entry:
    """The entry without the models of some names, also in its list of what inner merges contain."""

    def left(identities: Sequence[str]) -> tuple[str, ...]:
        return tuple(one for one in identities if not any(named(name, [one]) for name in names))

    gone = {i for name in names for i in entry.hits(name)}
    kept = [
        dataclasses.replace(model, contains=left(model.contains))
        for i, model in enumerate(entry.models)
        if i not in gone
    ]
    return dataclasses.replace(entry, models=tuple(kept))


def _parts(ref: str, role: str) -> list[ContainedModel]:
    """The models that a reference brings into a merge, as far as they can be read; planning reports all faults."""
    try:
        places = [pin(place) for place in parse_ref(ref)]
        inner = [one for place in places for one in parts_of(place, [])[1]]
    except HfMergeError:
        return []
    found = [
        ContainedModel(f"{p.name}@{p.commit or 'sha256:'}", role if p is places[-1] else "beneath", {}) for p in places
    ]
    cached = [snapshot_of(p.folder) for p in places if p.commit is None and p.folder is not None]
    found += [ContainedModel(identity, SNAPSHOT, {}) for identity in cached if identity is not None]
    return [*found, *(ContainedModel(identity, f"part of {places[-1].name}", {}) for identity in inner)]
