"""Writes copies of all sources beside the carried states, so that a merge can be changed after its sources vanished.

A copy is made once. A later step keeps the copies of models that stay, and drops the copy of a model that leaves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hfmerge.checkpoint.archive import write_archive
from hfmerge.checkpoint.delta import Delta
from hfmerge.checkpoint.digests import folder_digest
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.reader import Reader
from hfmerge.engine.executor import Outcome
from hfmerge.engine.plan import Plan
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.run_files import STATE_FOLDER
from hfmerge.engine.threads import core_count
from hfmerge.errors import CorruptFileError, HfMergeError, SourceError
from hfmerge.hashing import sha256_file
from hfmerge.hub.download import pin
from hfmerge.hub.reference import ModelRef
from hfmerge.hub.state_branch import STATE_BRANCH
from hfmerge.ledger.entry import ARCHIVES, Material, archive_file
from hfmerge.ledger.repository import Merged
from hfmerge.lifecycle.archive_restore import archive_path
from hfmerge.lifecycle.changes import Change
from hfmerge.user_files import private_file, private_folder


@dataclass(frozen=True)
class Wanted:
    """A copy to keep.

    Attributes:
        source: what of.
        files: what was merged: path -> SHA-256.
        delta: how it changes the base; None for the base itself.
        earlier: digest of the copy that an earlier step made, or None.
        read: this run has read the source's weights.
    """

    source: Model
    files: Mapping[str, str]
    delta: Delta | None
    earlier: str | None
    read: bool


def keep_sources(
    change: Change, folder: Path, ranks: Ranks, outcome: Outcome, opened: Merged | None, *, stays: bool
) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """Write the copies of base and models into the output, divided among the processes that write to rank 0's disk.

    Args:
        folder: the output, on this process's disk.
        change: the change that was run.
        opened: the merge that was changed; None for a first merge.
        stays: the result goes only to the repository of `opened`. Its branch of states already holds earlier copies.

    Returns:
        Digests of the copies of the base and then of each model, the same on all ranks, None for a copy that is lost
        and cannot be made again; and warnings.

    Raises:
        SourceError, OutputError: see `write_archive`.
    """
    wanted = _wanted(change, outcome, opened)
    crew = ranks.on_disk(0)
    mine = [i for i in range(len(wanted)) if crew[i % len(crew)] == ranks.rank]
    parts = ranks.together(lambda: _keep(change.plan, folder, wanted, mine, opened if stays else None, opened))
    found = {i: one for part in parts for i, one in part.items()}
    return tuple(found[i][0] for i in range(len(wanted))), tuple(note for _, note in found.values() if note)


def _wanted(change: Change, outcome: Outcome, opened: Merged | None) -> list[Wanted]:
    planned = change.plan
    deltas: list[Delta | None] = [None, *planned.deltas]
    held = [opened.last.base, *opened.last.models] if opened is not None else []
    stay = (None, *change.kept)
    result: list[Wanted] = []
    for i, (delta, digests) in enumerate(zip(deltas, outcome.source_digests, strict=True)):
        source = planned.base if delta is None else delta.source
        material = stay[i] if i < len(stay) else None
        files: Mapping[str, str]
        if digests is not None:
            files = digests
        else:
            assert material is not None  # a model inside a kept state has a material in the ledger
            files = material.files
        # copies are packed with the base's tensors
        same_base = not held or i == 0 or _is(held[0], result[0].source, result[0].files)
        same = next((one for one in held if same_base and _is(one, source, files)), None)
        earlier = same.kept if same is not None else None
        result.append(Wanted(source, files, delta, earlier, digests is not None))
    return result


def _is(material: Material, source: Model, files: Mapping[str, str]) -> bool:
    return (material.name, material.commit) == (source.name, source.snapshot.commit) and material.files == files


def _keep(
    planned: Plan, folder: Path, wanted: list[Wanted], mine: list[int], home: Merged | None, opened: Merged | None
) -> dict[int, tuple[str | None, str | None]]:
    """Digest of each copy of `mine`, and warnings about copies that could not be made."""
    if not mine:
        return {}
    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    private_folder(folder / ARCHIVES)
    there = _published(home) if home is not None else {}
    base = wanted[0]
    commit = base.source.snapshot.commit
    identity = f"{base.source.name}@{commit or 'sha256:' + folder_digest(base.files)}"
    with Reader(base.source) as reader, ThreadPoolExecutor(core_count(), "hfmerge-keep") as pool:

        def one(i: int) -> tuple[str | None, str | None]:
            earlier = wanted[i].earlier
            if earlier is not None and opened is not None:
                if there.get(archive_file(earlier)) == earlier:
                    return earlier, None
                try:
                    shutil.copyfile(archive_path(opened, earlier), private_file(folder / archive_file(earlier)))
                    return earlier, None
                except HfMergeError:
                    pass  # it is made anew, from the source itself
            try:
                return _made(planned, folder / ARCHIVES / f"new-{i}", wanted[i], reader, identity), None
            except SourceError as error:
                if wanted[i].read:
                    raise
                label = wanted[i].source.snapshot.label
                return None, f"the copy that was kept of {label} is lost, and cannot be made again: {error}"

        return dict(zip(mine, pool.map(one, mine), strict=True))


def _published(home: Merged) -> dict[str, str | None]:
    """Files on the repository's branch of states: path -> SHA-256."""
    try:
        branch = pin(ModelRef(home.snapshot.ref.text, home.snapshot.name, STATE_BRANCH, None))
    except SourceError:
        return {}  # the copies are then made again, or a warning says that they are missing
    return {name: info.sha256 for name, info in branch.files.items()}


def _made(planned: Plan, path: Path, wanted: Wanted, base: Reader, identity: str) -> str:
    """Write one copy; its digest, which is its name in the end."""
    remote_code = planned.recipe.trust_remote_code
    pairs = pairs_of(wanted.delta, planned.base) if wanted.delta is not None else {}
    try:
        manifest = write_archive(path, wanted.source, pairs, base, identity, remote_code=remote_code)
        for name, digest in wanted.files.items():
            if manifest.files[name][1] != digest:
                raise CorruptFileError(f"{wanted.source.snapshot.label}: {name} has changed during the merge.")
        digest = sha256_file(path)
        path.rename(path.with_name(f"{digest}.zip"))
        return digest
    finally:
        path.unlink(missing_ok=True)


def pairs_of(delta: Delta, base: Model) -> dict[str, dict[str, str]]:
    """Weight file -> its tensor -> the base's stored key, for tensors that change one of the same dtype and shape."""
    result: dict[str, dict[str, str]] = {}
    # the ends of a tie that this merge opened have one stored tensor
    held: dict[tuple[str, str], str] = {}
    for key, entry in base.tensors.items():
        held.setdefault((entry.file, base.stored_key(key)), key)
    for mark, place, origins in (("", delta.source, delta.full), ("+", delta.source.beneath, delta.beneath)):
        if place is None:
            continue
        found = {origin.keys[0]: key for key, origin in origins.items() if not origin.converted}
        if not mark:
            found |= {copy: found[owner] for copy, owner in delta.tied.items() if owner in found}
        for tensor, key in sorted(found.items()):
            own, other = place.tensors[tensor], base.tensors[key]
            if (own.dtype, own.shape) == (other.dtype, other.shape):
                result.setdefault(mark + own.file, {})[place.stored_key(tensor)] = held[
                    other.file, base.stored_key(key)
                ]
    return result
