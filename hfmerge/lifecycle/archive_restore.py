"""Restores vanished sources from the copies that a merge keeps of them, before anything is planned.

Restored files lie below `HF_HOME/hfmerge/kept`, under the digest of the copy. They are compared with the ledger's
digests. They never lie in the Hugging Face cache: other programs would take them for files of the Hub, under a name
and a commit that only the ledger claims.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hfmerge.checkpoint.archive import Manifest, check_total, read_manifest, unpack
from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.reader import Reader
from hfmerge.engine.plan import Plan
from hfmerge.errors import CorruptFileError, HfMergeError, LedgerError, NotFoundError, RecipeError
from hfmerge.hashing import is_digest, sha256_file
from hfmerge.hub.client import hub_errors, patiently
from hfmerge.hub.reference import is_hub_id, is_identity
from hfmerge.hub.state_branch import STATE_BRANCH
from hfmerge.ledger.card import FILE, card_pointer
from hfmerge.ledger.entry import Material, archive_file, material_reference, short
from hfmerge.ledger.repository import Merged, check_folders, folders_of
from hfmerge.lifecycle.missing_sources import lost_places, naming_vanished
from hfmerge.user_files import home, private_folder
from hfmerge.validation.folders import file_in


@dataclasses.dataclass
class _Places:
    """The places that sources of a merge are read from; filled as they are restored.

    Attributes:
        refs: see `Merged.refs`.
        copies: see `pin`.
        notes: what the user should know of both.
    """

    refs: dict[str, str]
    copies: dict[str, Path] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def planned_from(
    merged: Merged,
    materials: Sequence[Material],
    make: Callable[[Mapping[str, str], Mapping[str, Path]], Plan],
) -> Plan:
    """Make a plan from sources of a merge, from their kept copies where they are gone.

    Args:
        materials: the materials of the plan. Folders are checked before they are read: they must exist and hold the
            merged files.
        make: makes the plan from the places of folders (see `Merged.refs`) and the copies to read (see `pin`).

    Raises:
        LedgerError: a folder has moved or changed, and there is no kept copy. NotFoundError: a model is gone from the
            Hub, and there is no kept copy. Other errors: see `make`.
    """
    places, useless = _Places(dict(merged.refs)), dict[str, str]()
    for material in materials:
        _folders_back(merged, material, places)
    plan: Plan | None = None
    if any(material.kept is not None for material in materials):
        try:
            plan = make(places.refs, places.copies)
        except RecipeError:
            for material in materials:
                try:
                    _hub_back(merged, material, places)
                except HfMergeError as error:
                    useless[material.identity] = str(error).rstrip(".")
    if plan is None:
        with naming_vanished(merged, materials, useless):
            plan = make(places.refs, places.copies)
    return dataclasses.replace(plan, warnings=(*places.notes, *plan.warnings))


def archive_path(merged: Merged, digest: str) -> Path:
    """A kept copy on this machine, from the merge's folder, or from its repository's branch of states.

    Raises:
        NotFoundError: neither place has an intact copy. The error says what each place has.
    """
    file, reasons = archive_file(digest), []
    snapshot = merged.snapshot
    repository: str | None = snapshot.name
    if snapshot.folder is not None:
        path = file_in(snapshot.folder, file)
        if path.is_file():
            if sha256_file(path) == digest:
                return path
            reasons.append(f"{snapshot.label}: {file} is corrupt")
        else:
            reasons.append(f"{snapshot.label}: {file} is missing")
        card = merged.read(FILE)
        repository = card_pointer(card.decode("utf-8", "replace")).get("repo") if card is not None else None
    if is_hub_id(repository):
        assert repository is not None
        try:
            path = _downloaded(repository, file)
            if sha256_file(path) == digest:
                return path
            reasons.append(f"{repository}@{STATE_BRANCH}: {file} is corrupt")
        except HfMergeError as error:
            reasons.append(str(error).rstrip("."))
    raise NotFoundError(f"{'; '.join(reasons)}.")


def _downloaded(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{repository}@{STATE_BRANCH}: {file}"):
        return Path(
            patiently(lambda: hf_hub_download(repository, file, revision=STATE_BRANCH, library_name="hfmerge"))
        )


def _folders_back(merged: Merged, material: Material, places: _Places) -> None:
    """Make sure of the folders of a material, with kept copies in the place of those that are not as they were."""
    try:
        material_reference(material, places.refs)
        check_folders(places.refs, material, allow_pickle=merged.consent.allow_pickle)
    except LedgerError as error:
        if material.kept is None:
            raise
        try:
            _bring_back(merged, material, folders_of(material), places)
        except HfMergeError as other:
            raise LedgerError(f"{error} The copy that was kept cannot take its place: {other}") from error


def _hub_back(merged: Merged, material: Material, places: _Places) -> None:
    """Restore the parts of a material that the Hub no longer has."""
    if material.kept is not None:
        gone = [identity for identity, _, _ in lost_places(material) if identity not in places.copies]
        if gone:
            _bring_back(merged, material, gone, places)


def _bring_back(merged: Merged, material: Material, identities: Sequence[str], places: _Places) -> None:
    """Unpack the kept copy of a material, or of the model beneath it.

    Args:
        identities: of what is wanted.
        places: learns where it comes to lie, and says so.

    Raises:
        SourceError: there is no intact copy, or the base that it was packed with cannot be had.
    """
    assert material.kept is not None
    with _locked(material.kept):
        for identity in identities:
            mark = "" if identity == material.identity else "+"
            wanted = {name: digest for name, digest in material.files.items() if name.startswith("+") == bool(mark)}
            place = _place(material.kept, identity, mark)
            if not _intact(place, wanted, mark):
                archive = archive_path(merged, material.kept)
                manifest = _checked(archive, wanted)
                check_total(manifest, archive, sum(info.size for info in merged.snapshot.files.values()))
                names = [name for name in manifest.files if name.startswith("+") == bool(mark)]
                # the files that were merged are unpacked last: where they are, the others are there too
                names.sort(key=lambda name: (name in material.files, name))
                shutil.rmtree(place, ignore_errors=True)
                private_folder(place)
                with contextlib.ExitStack() as stack:
                    targets = {name: place / name.removeprefix(mark) for name in names}
                    unpack(archive, manifest, targets, _Base(merged, manifest, places, stack))
            if "@sha256:" in identity:
                places.refs[identity] = str(place)
            else:
                places.copies[identity] = place
            places.notes.append(
                f"{short(identity)} is gone; the copy of it that the merge keeps is used, from {place}."
            )


class _Base:
    """Opens the base that tensors were packed with, at the first one."""

    def __init__(self, merged: Merged, manifest: Manifest, places: _Places, stack: contextlib.ExitStack):
        self._merged, self._manifest, self._places, self._stack = merged, manifest, places, stack
        self._reader: Reader | None = None

    def __call__(self) -> Reader:
        if self._reader is None:
            last, places = self._merged.last, self._places
            if self._manifest.base != last.base.identity:
                raise CorruptFileError(f"it was packed with the base {self._manifest.base}, which is another one.")
            _folders_back(self._merged, last.base, places)
            _hub_back(self._merged, last.base, places)
            allow_pickle = self._merged.consent.allow_pickle
            source = describe(
                material_reference(last.base, places.refs), allow_pickle=allow_pickle, copies=places.copies
            )
            self._reader = self._stack.enter_context(Reader(source))
        return self._reader


def _checked(archive: Path, wanted: Mapping[str, str]) -> Manifest:
    """The manifest of an archive, which has to hold the files that were merged."""
    manifest = read_manifest(archive)
    for name, digest in wanted.items():
        if manifest.files.get(name, (0, ""))[1] != digest:
            raise CorruptFileError(f"{archive}: holds another {name} than was merged.")
    return manifest


def _intact(place: Path, wanted: Mapping[str, str], mark: str) -> bool:
    """Whether an earlier run has unpacked all files that were merged."""
    paths = {place / name.removeprefix(mark): digest for name, digest in wanted.items()}
    return all(path.is_file() and sha256_file(path) == digest for path, digest in paths.items())


def _place(kept: str, identity: str, mark: str) -> Path:
    """The folder to unpack a model into; digest and name come from a ledger that anybody may have written."""
    if not is_identity(identity):
        raise LedgerError(f"{identity!r}: is not the name of a model.")
    # the ledger's identity of a folder contains the folder's name
    name = identity.rpartition("@sha256:")[0] or identity.rpartition("@")[0].replace("/", "--")
    return _kept_folder(kept) / ("beneath" if mark else "own") / name


def _kept_folder(kept: str) -> Path:
    if not is_digest(kept):
        raise LedgerError(f"{kept!r}: is not the digest of a kept copy.")
    return home("kept", kept)


@contextlib.contextmanager
def _locked(kept: str) -> Iterator[None]:
    """Let one process of this machine unpack while the others wait for it."""
    folder = _kept_folder(kept)
    private_folder(folder.parent)
    with open(os.open(folder.with_name(f"{kept}.lock"), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
