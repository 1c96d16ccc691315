"""Sources that are gone, brought back from the copies that a merge keeps of them, before anything is planned.

A model of the Hub comes back as its commit in the Hugging Face cache, where all reading finds it under its own name; a
folder comes back below `HF_HOME/hfmerge/kept`. Both are compared with the ledger's digests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hfmerge.archives import Manifest, check_total, read_manifest, unpack
from hfmerge.asking import hub_errors, patiently
from hfmerge.card import FILE, card_pointer
from hfmerge.checkpoint.reader import Reader
from hfmerge.describing import describe
from hfmerge.digest import sha256_file
from hfmerge.errors import CorruptFileError, HfMergeError, LedgerError, NotFoundError, RecipeError
from hfmerge.ledger import Material, archive_file, reference, short
from hfmerge.merged import STATE_BRANCH, Merged, check_materials, folders_of
from hfmerge.planned import Plan
from hfmerge.vanished import lost_places, naming_vanished


def planned_from(
    merged: Merged,
    present: Sequence[Material],
    intact: Sequence[Material],
    make: Callable[[Mapping[str, str]], Plan],
) -> Plan:
    """Make a plan from sources of a merge, from their kept copies where they are gone.

    Args:
        present, intact: see `check_materials`.
        make: the plan, given where folders lie (see `Merged.refs`).

    Raises:
        LedgerError: a folder has moved or changed. NotFoundError: a model is gone from the Hub. In both cases no kept
            copy can take its place. Else what `make` raises.
    """
    refs, notes, useless = dict(merged.refs), list[str](), dict[str, str]()
    for material in present:
        _folders_back(merged, material, refs, notes, intact=material in intact)
    plan: Plan | None = None
    if any(material.kept is not None for material in present):
        try:
            plan = make(refs)
        except RecipeError:
            for material in present:
                try:
                    _hub_back(merged, material, refs, notes)
                except HfMergeError as error:
                    useless[material.identity] = str(error).rstrip(".")
    if plan is None:
        with naming_vanished(merged, present, useless):
            plan = make(refs)
    return dataclasses.replace(plan, warnings=(*notes, *plan.warnings))


def archive_path(merged: Merged, digest: str) -> Path:
    """A kept copy on this machine, from the merge's folder, or from its repository's branch of states.

    Raises:
        NotFoundError: neither has it whole; says what each has.
    """
    file, reasons = archive_file(digest), []
    pinned = merged.pinned
    repository: str | None = pinned.name
    if pinned.folder is not None:
        path = pinned.folder / file
        if path.is_file():
            if sha256_file(path) == digest:
                return path
            reasons.append(f"{pinned.label}: {file} is corrupt")
        else:
            reasons.append(f"{pinned.label}: {file} is missing")
        card = merged.read(FILE)
        repository = card_pointer(card.decode("utf-8", "replace")).get("repo") if card is not None else None
    if repository:
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


def _folders_back(merged: Merged, material: Material, refs: dict[str, str], notes: list[str], *, intact: bool) -> None:
    """Make sure of the folders of a material, with kept copies in the place of those that are not as they were."""
    try:
        reference(material, refs)
        check_materials(merged.last, refs, [material], [material] if intact else [])
    except LedgerError as error:
        if material.kept is None:
            raise
        try:
            _bring_back(merged, material, folders_of(material), refs, notes)
        except HfMergeError as other:
            raise LedgerError(f"{error} The copy that was kept cannot take its place: {other}") from error


def _hub_back(merged: Merged, material: Material, refs: dict[str, str], notes: list[str]) -> None:
    """Bring back what the Hub no longer has of a material."""
    if material.kept is not None and (gone := [identity for identity, _, _ in lost_places(material)]):
        _bring_back(merged, material, gone, refs, notes)


def _bring_back(
    merged: Merged, material: Material, identities: Sequence[str], refs: dict[str, str], notes: list[str]
) -> None:
    """Unpack the kept copy of a material, or of the model beneath it.

    Args:
        identities: of what is wanted.
        refs: learns where folders come to lie.
        notes: says so.

    Raises:
        SourceError: there is no intact copy, or the base that it was packed with cannot be had.
    """
    assert material.kept is not None
    with _locked(material.kept):
        for identity in identities:
            mark = "" if identity == material.identity else "+"
            wanted = {name: digest for name, digest in material.files.items() if name.startswith("+") == bool(mark)}
            place, on_hub = _place(material.kept, identity, mark), "@sha256:" not in identity
            if not _intact(place, wanted, mark):
                archive = archive_path(merged, material.kept)
                manifest = _checked(archive, wanted)
                check_total(manifest, archive, sum(info.size for info in merged.pinned.files.values()))
                names = [name for name in manifest.files if name.startswith("+") == bool(mark)]
                # what the merge was made of comes last: where it is, all the rest is there too
                names.sort(key=lambda name: (name in material.files, name))
                targets = {name: place / name.removeprefix(mark) for name in names}
                if on_hub:
                    targets = {name: path for name, path in targets.items() if not path.is_file()}
                else:
                    shutil.rmtree(place, ignore_errors=True)
                with contextlib.ExitStack() as stack:
                    unpack(archive, manifest, targets, _Base(merged, manifest, refs, notes, stack))
            if not on_hub:
                refs[identity] = str(place)
            notes.append(f"{short(identity)} is gone; the copy of it that the merge keeps is used, from {place}.")


class _Base:
    """Opens the base that tensors were packed with, at the first one."""

    def __init__(
        self,
        merged: Merged,
        manifest: Manifest,
        refs: dict[str, str],
        notes: list[str],
        stack: contextlib.ExitStack,
    ):
        self._merged, self._manifest, self._refs, self._notes, self._stack = merged, manifest, refs, notes, stack
        self._reader: Reader | None = None

    def __call__(self) -> Reader:
        if self._reader is None:
            last = self._merged.last
            if self._manifest.base != last.base.identity:
                raise CorruptFileError(f"it was packed with the base {self._manifest.base}, which is another one.")
            _folders_back(self._merged, last.base, self._refs, self._notes, intact=True)
            _hub_back(self._merged, last.base, self._refs, self._notes)
            allow_pickle = bool(last.settings["allow_pickle"])
            source = describe(reference(last.base, self._refs), allow_pickle=allow_pickle)
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
    """Whether all files that were merged are there already, from an earlier time."""
    paths = {place / name.removeprefix(mark): digest for name, digest in wanted.items()}
    return all(path.is_file() and sha256_file(path) == digest for path, digest in paths.items())


def _place(kept: str, identity: str, mark: str) -> Path:
    """Where a model comes to lie; names are from a ledger that anybody may have written."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name, folder, digest = identity.rpartition("@sha256:")
    if folder and re.fullmatch(r"[^/\\\0]+", name) and name not in (".", ".."):
        # the folder's own name is a part of what a ledger knows it by
        return Path(constants.HF_HOME) / "hfmerge" / "kept" / kept / ("beneath" if mark else "own") / name
    name, _, commit = identity.rpartition("@")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and re.fullmatch(r"[0-9a-f]{40}", commit):
        folder = repo_folder_name(repo_id=name, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit
    raise LedgerError(f"{identity}: is no name of a model.")


@contextlib.contextmanager
def _locked(kept: str) -> Iterator[None]:
    """Let one process of this machine unpack while the others wait for it."""
    from huggingface_hub import constants

    path = Path(constants.HF_HOME) / "hfmerge" / "kept" / f"{kept}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
