"""Removals from merges of merges: a model inside an inner merge is removed from the inner merge first.

The inner merge is unmerged into a folder or repository of its own. So the new source of the outer merge is again a
merge with a ledger. It is pinned, and everybody who may replay the outer merge can read it. The removal is a list of
jobs: one job for each inner merge, then the job for the outer merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfmerge.engine.ranks import Ranks
from hfmerge.errors import HfMergeError, LedgerError, NotFoundError
from hfmerge.hub.reference import parse_ref
from hfmerge.ledger.entry import Entry, Material, contained, material_reference, named, same_model
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.lifecycle.job import Job
from hfmerge.lifecycle.push_target import destination
from hfmerge.lifecycle.repeat import finish
from hfmerge.lifecycle.verify import left_behind
from hfmerge.validation.wording import parameter


@dataclass(frozen=True)
class Removal:
    """The models that a removal takes out, of the merge and of its inner merges.

    Attributes:
        removed: indices of models that leave as a whole.
        within: index of an inner merge -> identities of the models that leave this inner merge.
        subjects: names of all models that leave.
    """

    removed: tuple[int, ...]
    within: dict[int, tuple[str, ...]]
    subjects: tuple[str, ...]


def find_removal(entry: Entry, names: Sequence[str]) -> Removal:
    """Find the models of these names. A model that is in the merge and in an inner merge leaves both.

    Raises:
        LedgerError: a name is nowhere (the error suggests near names), is that of a model beneath an adapter, or fits
            several models.
    """
    whole: list[int] = []
    within: dict[int, list[str]] = {}
    subjects: list[str] = []
    for name in dict.fromkeys(names):
        inner = {i: [model.contains[k] for k in named(name, model.contains)] for i, model in enumerate(entry.models)}
        found = list(dict.fromkeys(identity for hits in inner.values() for identity in hits))
        direct = entry.hits(name)
        if direct or not found:
            direct = [entry.find(name)]
        several = list(dict.fromkeys([*found, *(entry.models[i].identity for i in direct)]))
        if len(several) > 1:
            raise LedgerError(f"{name}: means {len(several)} models in this merge: {' and '.join(several)}; name one.")
        whole += direct
        for i, hits in inner.items():
            if hits:
                within.setdefault(i, []).extend(hits)
        subjects.append(several[0].rpartition("@")[0])
    for i in whole:
        within.pop(i, None)
    return Removal(
        tuple(sorted(set(whole))), {i: tuple(dict.fromkeys(within[i])) for i in sorted(within)}, tuple(subjects)
    )


def removed_already(opened: Merged, names: Sequence[str]) -> bool:
    """Whether the last step of a merge took out these very models, and none of them is in it."""
    if opened.last.action != "unmerge" or any(named(name, contained(opened.last)) for name in names):
        return False
    try:
        return set(find_removal(opened.entries[-2], names).subjects) == set(opened.last.subjects)
    except LedgerError:
        return False


def inner_jobs(job: Job, merged: Merged, removal: Removal, *, finishing: bool = True) -> dict[int, Job | str | None]:
    """The jobs that make the inner merges again without the models that leave.

    Args:
        job: the removal from the outer merge.
        merged: the outer merge.
        finishing: finish the clean-up of an inner merge that an earlier run made.

    Returns:
        Index of an inner merge in the outer one -> one of three: a job; the reference of a new inner merge that an
        earlier run made; None if no model would be left in the inner merge.

    Raises:
        LedgerError: an inner merge or one of its sources cannot be read. The error says what is missing.
    """
    if job.inner_to is not None and len(removal.within) > 1:
        names = ", ".join(merged.last.models[i].name for i in removal.within)
        raise LedgerError(
            f"{parameter('inner_to')} names one place, and {names} have to be merged again. Take the models out one "
            "by one."
        )
    return {i: _inner_job(job, merged, i, identities, finishing=finishing) for i, identities in removal.within.items()}


def _inner_job(job: Job, merged: Merged, i: int, identities: Sequence[str], *, finishing: bool) -> Job | str | None:
    model = merged.last.models[i]
    what = " and ".join(identity.rpartition("@")[0] for identity in identities)
    if model.ledger is None:
        raise LedgerError(
            f"{what}: lies in a merge beneath the adapter {model.label}; unmerge {model.name} as a whole."
        )
    try:
        inner = open_merged(material_reference(model, merged.refs))
    except HfMergeError as error:
        raise LedgerError(
            f"{what}: is a part of the merge {model.label}, which cannot be read, "
            f"so the model cannot be taken out of it: {error}"
        ) from error
    _check_is_its_ledger(inner, model, what)
    direct = find_removal(inner.last, identities)
    rest = [one for k, one in enumerate(inner.last.models) if k not in direct.removed]
    if not rest:
        return None
    folder = Path(job.output) if job.output is not None else merged.snapshot.folder
    place = job.inner_to or _beside(folder, model, identities)
    if place is None:
        raise LedgerError(
            f"{what}: is a part of the merge {model.label}, which has to be merged again without it; say where that "
            f"goes with {parameter('inner_to', 'org/name')}, so that others can replay the result."
        )
    if not direct.within:
        for candidate in dict.fromkeys((place, inner.snapshot.name if inner.snapshot.commit else place)):
            if (later := _already(candidate, inner, rest)) is not None:
                # a run that was killed may have left something there
                if finishing and candidate == place and (later.snapshot.folder is not None or left_behind(later)):
                    finish(later, destination(place) if later.snapshot.commit else None, Ranks())
                return f"{later.snapshot.name}@{later.snapshot.commit}" if later.snapshot.commit else candidate
    target = parse_ref(place)[0]
    on_hub = target.folder is None
    if target.subfolder is not None:
        raise LedgerError(
            f"{parameter('inner_to', place)}: a merge is published as a whole repository; name org/name."
        )
    return Job(
        "unmerge",
        merged=material_reference(model, merged.refs),
        names=tuple(identities),
        inner_to=f"{place}-inner" if direct.within else None,
        output=None if on_hub else place,
        to=destination(place, overwrite=job.overwrite, publish_private=job.publish_private) if on_hub else None,
        overwrite=job.overwrite,
        publish_private=job.publish_private,
        stream=job.stream,
        state=job.state,
    )


def _check_is_its_ledger(inner: Merged, model: Material, what: str) -> None:
    """The ledger has to be the one that was recorded, and to describe the weights that were merged."""
    changed = inner.last.digest != model.ledger
    products = inner.last.products
    foreign = [name for name, digest in model.files.items() if products.get(name) != digest]
    if changed or foreign:
        why = (
            "its ledger has changed since" if changed else f"{foreign[0]} is not what its ledger gives (tuned since?)"
        )
        raise LedgerError(
            f"{what}: is a part of {model.label}, which cannot be merged again without it: {why}; unmerge "
            f"{model.name} as a whole, or replace it."
        )


def _beside(folder: Path | None, model: Material, identities: Sequence[str]) -> str | None:
    if folder is None:
        return None
    slugs = [identity.rpartition("@")[0].replace("/", "--") for identity in identities]
    return str(folder.absolute().parent / f"{model.name.replace('/', '--')}-without-{'-'.join(slugs)}")


def _already(place: str, inner: Merged, rest: Sequence[Material]) -> Merged | None:
    """The merge at `place`, if it is a later step of the same ledger and holds exactly the models that stay."""
    try:
        later = open_merged(place)
    except (LedgerError, NotFoundError):
        return None  # there is nothing at the place yet, or no merge
    ours, theirs = inner.last, later.last
    grown = later.entries[: len(inner.entries)] == inner.entries and len(later.entries) > len(inner.entries)
    alike = len(theirs.models) == len(rest) and all(map(same_model, theirs.models, rest))
    for part in ("method", "settings"):
        alike = alike and getattr(theirs, part) == getattr(ours, part)
    return later if grown and alike and theirs.base.identity == ours.base.identity else None
