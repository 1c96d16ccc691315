"""A merge that exists already: its ledger, its kept states, and where its sources lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hfmerge.asking import hub_errors
from hfmerge.describing import describe
from hfmerge.digest import sha256_file
from hfmerge.digesting import digests, folder_digest
from hfmerge.errors import HfMergeError, LedgerError, SourceError
from hfmerge.fetching import fetch, pin
from hfmerge.fields import plain_text, table
from hfmerge.jsonio import read_json_file, read_limited
from hfmerge.ledger import FOLDER, Entry, KeptState, Material, check_chain, check_size, contained, ledger_files
from hfmerge.limits import CARD_BYTES, ENTRY_BYTES, LEDGER_BYTES
from hfmerge.source import Pinned, parse_ref


STATE_BRANCH = "merge-state"
LOCAL_SOURCES = "merge_state/sources.local.json"
"""Where folders that went into a merge lie on this machine: identity -> path. Never pushed."""


@dataclass(frozen=True)
class Merged:
    """A merge opened for reading.

    Attributes:
        pinned: the repository at one commit, or the folder.
        entries: the checked ledger, oldest first.
        history: path -> bytes of the ledger's files.
        refs: identity of a folder material -> its path on this machine.
    """

    pinned: Pinned
    entries: tuple[Entry, ...]
    history: Mapping[str, bytes] = field(repr=False)
    refs: Mapping[str, str] = field(repr=False)

    @property
    def last(self) -> Entry:
        """The entry that describes the weights as they are."""
        return self.entries[-1]

    def read(self, name: str) -> bytes | None:
        """A small file of the merge, or None.

        Raises:
            LedgerError: it is too large. SourceError: see `fetch`.
        """
        if name not in self.pinned.files:
            return None
        try:
            return read_limited(fetch(self.pinned, name), CARD_BYTES)
        except (ValueError, OSError) as error:
            raise LedgerError(f"{self.pinned.label}: {name} cannot be read: {error}.") from error


def ledger_in(pinned: Pinned) -> tuple[tuple[Entry, ...], dict[str, bytes]]:
    """The checked ledger of a place, oldest entry first, and its files' bytes.

    Raises:
        LedgerError: no ledger, one beyond a limit, or a broken one. SourceError: not readable.
    """
    names = ledger_files(name for name in pinned.files if name.endswith(".json"))
    check_size(names, pinned.label)
    files, total = dict[str, bytes](), 0
    for name in names:
        try:
            files[name] = read_limited(fetch(pinned, name), ENTRY_BYTES)
            total += len(files[name])
            LEDGER_BYTES.check(total)
        except (ValueError, OSError) as error:
            raise LedgerError(f"{pinned.label}: {name} {error}.") from error
    return check_chain(files, pinned.label), files


def parts_of(pinned: Pinned, warnings: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """Of a model that is itself a merge: SHA-256 of its last ledger entry, and what it holds; of others None and ().

    A ledger that is broken says nothing, which is told as a warning.
    """
    if not any(name.startswith(f"{FOLDER}/") for name in pinned.files):
        return None, ()
    try:
        entries, _ = ledger_in(pinned)
    except LedgerError as error:
        warnings.append(f"{pinned.name}: taken as a model of its own, since its ledger says nothing: {error}")
        return None, ()
    return entries[-1].digest, contained(entries[-1])


def open_merged(ref: str, sources: Mapping[str, str] | None = None) -> Merged:
    """Open a merge by Hub ID (with `@revision`) or folder and check its ledger's chain.

    Args:
        ref: `org/name`, `org/name@revision` or a folder.
        sources: name of a folder material -> where it lies now.

    Raises:
        LedgerError: no ledger or a broken one. SourceError: not found or not readable.
    """
    places = parse_ref(ref)
    if len(places) != 1:
        raise SourceError(f"{ref}: name one merge.")
    pinned = pin(places[0])
    entries, history = ledger_in(pinned)
    return Merged(pinned, entries, history, known_places(pinned, entries[-1], sources or {}))


def known_places(pinned: Pinned, entry: Entry, sources: Mapping[str, str]) -> dict[str, str]:
    """Identity of a folder material -> where it lies, as noted beside the merge, or as `sources` says by name.

    Raises:
        LedgerError: the note cannot be read, or a name is not of a folder material of `entry`.
    """
    refs: dict[str, str] = {}
    if pinned.folder is not None and (pinned.folder / LOCAL_SOURCES).is_file():
        try:
            found = read_json_file(pinned.folder / LOCAL_SOURCES)
            table(plain_text, plain_text)(found)
            refs |= found
        except (ValueError, OSError) as error:
            raise LedgerError(
                f"{pinned.label}: {LOCAL_SOURCES} cannot be read; delete it, and say where folders are with --source "
                "NAME=FOLDER."
            ) from error
    for name, folder in sources.items():
        hits = [
            one for m in (entry.base, *entry.models) for one in folders_of(m) if one.rpartition("@sha256:")[0] == name
        ]
        if not hits:
            raise LedgerError(f"--source {name}: no model of that name was merged from a folder.")
        refs |= dict.fromkeys(hits, folder)
    return refs


def note_places(folder: Path, places: Mapping[str, str]) -> None:
    """Write down beside a merge, for this machine and its user only, where folders that were merged lie."""
    if places:
        path = folder / LOCAL_SOURCES
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(places), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.chmod(path, 0o600)


def folders_of(material: Material) -> list[str]:
    """Identities of the folders that a material was read from: its own, and that of the model beneath it."""
    return [one for one in (material.identity, material.beneath) if one is not None and "@sha256:" in one]


def check_materials(entry: Entry, refs: Mapping[str, str], present: list[Material], intact: list[Material]) -> None:
    """Make sure that folders are still what was merged; Hub materials are pinned by their commit.

    Args:
        present: materials whose folders must be there.
        intact: those whose files are read again, and so must be the ones that were merged.

    Raises:
        LedgerError: a folder has moved, or its files have changed since.
    """
    for identity in (one for material in present for one in folders_of(material)):
        name, path = identity.rpartition("@sha256:")[0], refs.get(identity)
        if path is not None and not Path(path).expanduser().is_dir():
            raise LedgerError(
                f"{name}: was merged from the folder {path}, which is gone; say where it is now with --source "
                f"{name}=FOLDER."
            )
    for identity in (one for material in intact for one in folders_of(material)):
        name, _, digest = identity.rpartition("@sha256:")
        path = refs.get(identity)
        if path is None:
            continue
        found = digests(describe(path, allow_pickle=bool(entry.settings["allow_pickle"])))
        if folder_digest(found) != digest:
            raise LedgerError(
                f"{name}@{digest[:8]}: the files in {path} are not those that were merged; restore them, or point "
                f"--source {name}=FOLDER to a copy."
            )


def state_path(pinned: Pinned, state: KeptState, warnings: list[str]) -> Path | None:
    """A kept state's file on this machine, checked by digest; None with a warning when it cannot be had."""
    try:
        if pinned.folder is not None:
            path = pinned.folder / state.file
        else:
            from huggingface_hub import hf_hub_download

            with hub_errors(f"{pinned.name}@{STATE_BRANCH}: {state.file}"):
                path = Path(hf_hub_download(pinned.name, state.file, revision=STATE_BRANCH, library_name="hfmerge"))
        if not path.is_file():
            warnings.append(f"{pinned.label}: {state.file} is missing; the sources are read instead.")
        elif sha256_file(path) != state.sha256:
            warnings.append(f"{pinned.label}: {state.file} is corrupt; the sources are read instead.")
        else:
            return path
    except HfMergeError as error:
        warnings.append(f"{error} The sources are read instead.")
    return None
