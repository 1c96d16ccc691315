"""Restores an earlier step of a merge without arithmetic: copies the files of that step's commit into a new commit.

A folder holds only its present weights. The repository that it was pushed to holds all weights of its history.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hfmerge.checkpoint.custom_code import listed_names
from hfmerge.checkpoint.side_files import is_code
from hfmerge.engine.options import RunOptions
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.workspace import recover, workspace
from hfmerge.errors import CorruptFileError, LedgerError, NotFoundError, PushError, UnsupportedError
from hfmerge.hashing import sha256_file
from hfmerge.hub.client import hub_api, hub_errors
from hfmerge.hub.download import fetch, pin
from hfmerge.hub.reference import ModelRef, Snapshot, checked_path, hub_ref, is_hub_id
from hfmerge.hub.state_branch import find_states
from hfmerge.ledger.card import card_pointer
from hfmerge.ledger.entry import ARCHIVES, Entry
from hfmerge.ledger.log import commit_of
from hfmerge.ledger.repository import Merged, known_places, note_places, noted_places, open_merged
from hfmerge.ledger.seen import follow, refuse_rewritten
from hfmerge.lifecycle.admission import admit_change, own_destination
from hfmerge.lifecycle.job import Job
from hfmerge.lifecycle.publish import Pushed, push_folder
from hfmerge.lifecycle.push_target import Destination
from hfmerge.lifecycle.record import keep_foreign_files, readable_card, refuse_unknown_files, write_record
from hfmerge.lifecycle.repeat import already_restored, finish, in_place
from hfmerge.lifecycle.session import MergeResult, Session, push_written
from hfmerge.user_files import private_file, private_folder
from hfmerge.validation.wording import parameter


@dataclass(frozen=True)
class Earlier:
    """An earlier step that can be restored.

    Attributes:
        entry: the new ledger entry of the restoration.
        snapshot: the commit with the files of the step.
        states: kept state or copy of a source -> commit of the state branch that holds it.
        notes: remarks on files that cannot be restored.
    """

    entry: Entry
    snapshot: Snapshot
    states: Mapping[str, str]
    notes: tuple[str, ...]


def restore_step(job: Job, options: RunOptions) -> MergeResult:
    """Restore the files of an earlier step, as a new step.

    Raises:
        LedgerError: there is no such step, or its files no longer exist anywhere. HfMergeError: see `hfmerge.errors`.
    """
    assert job.merged is not None and job.step is not None
    merged, step, output, to = job.merged, job.step, job.output, job.to
    start = time.monotonic()
    recover(merged)
    opened = open_merged(merged)
    refuse_rewritten(opened)
    folder = opened.snapshot.folder
    target = Path(output) if output is not None else folder
    if target is None and to is None:
        name = opened.snapshot.name
        there = "org/name" if opened.snapshot.subfolder is not None else name
        where = f"{parameter('push_to', there)}, or {parameter('output', 'FOLDER')}"
        raise PushError(f"{name}: lies on the Hub; say where the result goes: {where}.")
    if in_place(opened, output, to) and already_restored(opened, step):
        return finish(opened, to, Ranks())
    if 1 <= step <= len(opened.entries):
        admit_change(opened, to, Session(Ranks(), options), entry=opened.entries[step - 1])()
    existing = readable_card(opened)
    replacing = folder is not None and target is not None and target.resolve() == folder
    if replacing:
        refuse_unknown_files(opened)
    earlier = find_earlier(opened, step, existing)
    check_code(earlier, options)
    places = _places(opened, earlier.entry, job.sources)
    to = own_destination(opened, to) if to is not None else None
    if target is None and to is not None and to.repo_id.lower() == opened.snapshot.name.lower():
        pushed: Pushed | None = _on_the_hub(opened, earlier, to)
    else:
        pushed = None
        whole = sum(info.size for name, info in earlier.snapshot.files.items() if name in earlier.entry.products)
        work = {"restore": earlier.entry.digest}
        with tempfile.TemporaryDirectory(prefix="hfmerge-") as spare:
            place = target or Path(spare) / "merged"
            with workspace(place, needed=whole, replace=replacing, work=work, resume=options.resume) as built:
                _fill(built.folder, earlier, opened, existing)
                note_places(earlier.entry, target, places)
                if replacing:
                    keep_foreign_files(opened, built.folder)
            follow(place)
            if to is not None:
                pushed = push_written(place, to)
    seconds = time.monotonic() - start
    return MergeResult(target, earlier.entry, earlier.notes, pushed, {"merging": 0.0, "total": seconds})


def check_code(earlier: Earlier, options: RunOptions) -> None:
    """Refuse to copy code into an output unless the caller allows it.

    Raises:
        UnsupportedError: the step has files of code; names the repository, the files, and how to allow it.
    """
    names = [name for name in sorted(earlier.entry.products) if is_code(name)]
    if names and not options.trust_remote_code:
        raise UnsupportedError(
            f"{earlier.snapshot.label}: step {earlier.entry.restored} brings code ({listed_names(names)}), which "
            f"would be copied; pass {parameter('trust_remote_code', True)} if you trust its author."
        )


def find_earlier(opened: Merged, step: int, card: str | None) -> Earlier:
    """Find the files of an earlier step, and check them against the ledger.

    Args:
        opened: the merge now.
        card: its card, which names the repository that a folder was pushed to.

    Raises:
        LedgerError: there is no such step or no repository, or the files are not those that the ledger names.
    """
    label, entries = opened.snapshot.label, opened.entries
    if not 1 <= step <= len(entries):
        raise LedgerError(f"{label}: has no step {step}; its ledger has steps 1 to {len(entries)}.")
    wanted = entries[step - 1]
    if wanted.products == opened.last.products and wanted.models == opened.last.models:
        raise LedgerError(f"{label}: is as it was at step {step} already.")
    repository = _repository(opened, wanted, card)
    snapshot = _commit_with(repository, wanted)
    with hub_errors(repository.name):
        states = find_states(hub_api(), repository.repo_id, list(wanted.beside))
    counts = {state.file: f"after model {state.count}" for state in wanted.states}
    lost = [file for file in wanted.beside if file not in states]
    notes = [f"{file} ({counts.get(file, 'the copy of a source')}) is gone, and not kept." for file in lost]
    how = f"brought back from the commit {str(snapshot.commit)[:12]} of step {step}; nothing was computed"
    entry = replace(
        wanted.holding(states), step=len(entries) + 1, parent=opened.last.digest, action="restore",
        subjects=(), how=how, restored=step,
    )  # fmt: skip
    return Earlier(entry, snapshot, states, tuple(notes))


def _commit_with(repository: Snapshot, wanted: Entry) -> Snapshot:
    """The commit that brought a step, or, where a squash has made another one of it, what the step's tag still holds.

    Raises:
        LedgerError: neither has the files that the ledger says.
    """
    lost = ""
    for revision in (commit_of(repository, wanted.file), f"step-{wanted.step:04d}"):
        try:
            snapshot = pin(hub_ref(repository.name, revision, f"{repository.name}@{revision}"))
        except NotFoundError:
            continue  # there is no such tag
        lost = next((name for name in wanted.products if not _has(snapshot, name, wanted.products[name])), "")
        if not lost:
            return snapshot
    raise LedgerError(
        f"{repository.name}: {lost} of step {wanted.step} is not in its history any more, which was squashed or "
        "rewritten; merge, add and unmerge can make the step again from its sources."
    )


def _has(snapshot: Snapshot, name: str, digest: str) -> bool:
    info = snapshot.files.get(name)
    return info is not None and digest == (info.sha256 or sha256_file(fetch(snapshot, name)))


def _repository(opened: Merged, wanted: Entry, card: str | None) -> Snapshot:
    """Where earlier weights may be: the merge's own repository, or the one a folder was pushed to."""
    if opened.snapshot.folder is None:
        return opened.snapshot
    name = card_pointer(card or "").get("repo")
    if not is_hub_id(name):
        raise LedgerError(
            f"{opened.snapshot.label}: a folder keeps only its present weights, and this one was never pushed; only "
            "on the Hub are older ones kept; `hfmerge unmerge`, `add` and `replace` can make the step again from its "
            "sources."
        )
    repository = pin(ModelRef(str(name), str(name), None, None))
    listed = wanted.file in repository.files
    if not listed or fetch(repository, wanted.file).read_bytes() != opened.history[wanted.file]:
        raise LedgerError(
            f"{opened.snapshot.label}: step {wanted.step} was never pushed to {name}, which its card names; older "
            "weights are only on the Hub."
        )
    return repository


def _places(opened: Merged, entry: Entry, sources: Mapping[str, str]) -> dict[str, str]:
    """Where the folders lie, as far as known, that the restored step was merged from."""
    identities = [one for m in (entry.base, *entry.models) for one in (m.identity, m.beneath)]
    wanted = opened.entries[(entry.restored or 1) - 1]
    known = noted_places(opened.snapshot, opened.last) | noted_places(opened.snapshot, wanted)
    known |= known_places(opened.snapshot, entry, sources)
    return {identity: known[identity] for identity in identities if identity is not None and identity in known}


def _on_the_hub(opened: Merged, earlier: Earlier, to: Destination) -> Pushed:
    """Copy the files within the repository; nothing but ledger and card is sent."""
    from huggingface_hub import CommitOperationCopy

    commit = earlier.snapshot.commit
    copies = [CommitOperationCopy(file, file, src_revision=commit) for file in sorted(earlier.entry.products)]
    with tempfile.TemporaryDirectory(prefix="hfmerge-") as folder:
        write_record(Path(folder), earlier.entry, opened, None)
        return push_folder(Path(folder), to, copies, earlier.states)


def _fill(folder: Path, earlier: Earlier, opened: Merged, existing: str | None) -> None:
    """Copy all files of the step into a folder, and compare their digests."""
    files = {name: (fetch(earlier.snapshot, name), digest) for name, digest in earlier.entry.products.items()}
    for file, digest in earlier.entry.beside.items():
        branch = ModelRef(file, earlier.snapshot.repo_id, earlier.states[file], None)
        files[file] = (fetch(pin(branch), file), digest)
    for name, (path, digest) in files.items():
        target = folder / checked_path(name, earlier.snapshot.label)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith(f"{ARCHIVES}/"):
            private_folder(target.parent)
            private_file(target)
        shutil.copyfile(path, target)
        if sha256_file(target) != digest:
            raise CorruptFileError(f"{path}: is not what the Hub says it is; delete it and run again.")
    write_record(folder, earlier.entry, opened, existing)
