"""Opens an existing merge: its ledger, its kept states, and the places of its sources."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.digests import digests, folder_digest, with_beside
from hfmerge.digest_cache import remembered_digest
from hfmerge.engine.options import NO_CONSENT, Consent
from hfmerge.engine.plan import KeptState
from hfmerge.errors import HfMergeError, LedgerError, SourceError
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hub.client import hub_errors
from hfmerge.hub.download import fetch, pin
from hfmerge.hub.reference import Snapshot, parse_ref
from hfmerge.hub.state_branch import STATE_BRANCH
from hfmerge.ledger.entry import (
    LEDGER_FOLDER,
    Entry,
    Material,
    check_chain,
    check_size,
    contained,
    ledger_files,
    short,
)
from hfmerge.recipe.weights import stored
from hfmerge.user_files import home, keep_note, private_folder
from hfmerge.validation.folders import file_in
from hfmerge.validation.limits import CARD_BYTES, ENTRY_BYTES, LEDGER_BYTES
from hfmerge.validation.strict_json import read_limited
from hfmerge.validation.wording import parameter


NOTES = 4096
"""How many merges' folders are remembered; those noted longest ago are forgotten first."""
COPIES = 16
"""Of one merge in several folders, so many are remembered apart."""


@dataclass(frozen=True)
class Merged:
    """A merge opened for reading.

    Attributes:
        snapshot: the repository at one commit, or the folder.
        entries: the checked ledger, oldest first.
        history: path -> bytes of the ledger's files.
        refs: identity of a folder material -> its path on this machine.
        consent: what the caller allows the merge's sources in this run.
    """

    snapshot: Snapshot
    entries: tuple[Entry, ...]
    history: Mapping[str, bytes] = field(repr=False)
    refs: Mapping[str, str] = field(repr=False)
    consent: Consent = NO_CONSENT

    @property
    def last(self) -> Entry:
        """The entry that describes the weights as they are."""
        return self.entries[-1]

    def read(self, name: str) -> bytes | None:
        """A small file of the merge, or None.

        Raises:
            LedgerError: it is too large. SourceError: see `fetch`.
        """
        if name not in self.snapshot.files:
            return None
        try:
            return read_limited(fetch(self.snapshot, name), CARD_BYTES)
        except (ValueError, OSError) as error:
            raise LedgerError(f"{self.snapshot.label}: {name} cannot be read: {error}.") from error


def ledger_in(snapshot: Snapshot) -> tuple[tuple[Entry, ...], dict[str, bytes]]:
    """The checked ledger of a snapshot, oldest entry first, and its files' bytes.

    Raises:
        LedgerError: no ledger, one beyond a limit, or a broken one. SourceError: not readable.
    """
    names = ledger_files(name for name in snapshot.files if name.endswith(".json"))
    check_size(names, snapshot.label)
    files, total = dict[str, bytes](), 0
    for name in names:
        try:
            files[name] = read_limited(fetch(snapshot, name), ENTRY_BYTES)
            total += len(files[name])
            LEDGER_BYTES.check(total)
        except (ValueError, OSError) as error:
            raise LedgerError(f"{snapshot.label}: {name} {error}.") from error
    return check_chain(files, snapshot.label), files


def parts_of(snapshot: Snapshot, warnings: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """For a model that is itself a merge: SHA-256 of its last ledger entry, and its identities; else None and ().

    A broken ledger gives a warning and counts as no ledger.
    """
    if not any(name.startswith(f"{LEDGER_FOLDER}/") for name in snapshot.files):
        return None, ()
    try:
        entries, _ = ledger_in(snapshot)
    except LedgerError as error:
        warnings.append(f"{snapshot.name}: treated as a single model, because its ledger cannot be read: {error}")
        return None, ()
    return entries[-1].digest, contained(entries[-1])


def open_merged(ref: str, sources: Mapping[str, str] | None = None, consent: Consent = NO_CONSENT) -> Merged:
    """Open a merge by Hub ID (with `@revision`) or folder and check its ledger's chain.

    Args:
        ref: `org/name`, `org/name@revision` or a folder.
        sources: a folder material -> where it lies now. It is named by its alias, its name, or `name@DIGEST`.
        consent: what the caller allows where the sources are read again.

    Raises:
        LedgerError: no ledger or a broken one. SourceError: not found or not readable.
    """
    places = parse_ref(ref)
    if len(places) != 1:
        raise SourceError(f"{ref}: name one merge.")
    snapshot = pin(places[0])
    entries, history = ledger_in(snapshot)
    return Merged(snapshot, entries, history, known_places(snapshot, entries[-1], sources or {}), consent)


def known_places(snapshot: Snapshot, entry: Entry, sources: Mapping[str, str]) -> dict[str, str]:
    """Identity of a folder material -> where it lies, as this user's own run noted, or as `sources` says by name.

    Raises:
        LedgerError: the note cannot be read, or a name is not of one folder material of `entry`.
    """
    refs = noted_places(snapshot, entry)
    identities = list(dict.fromkeys(one for m in (entry.base, *entry.models) for one in folders_of(m)))
    for name, folder in sources.items():
        plain, _, digest = name.rpartition("@")
        hits = [one for one in identities if one.rpartition("@sha256:")[0] == name]
        hits = hits or [
            one for i in entry.hits(name) for one in folders_of(entry.models[i])[:1] if name in entry.names
        ]
        hits = hits or [one for one in identities if digest and one.startswith(f"{plain}@sha256:{digest}")]
        if not hits:
            raise LedgerError(f"{parameter('sources')} {name}: no model of that name was merged from a folder.")
        if len(hits) > 1:
            each = " and ".join(map(short, hits))
            raise LedgerError(f"{parameter('sources')} {name}: is the name of {len(hits)} folders; name {each}.")
        refs |= dict.fromkeys(hits, folder)
    return refs


def noted_places(snapshot: Snapshot, entry: Entry) -> dict[str, str]:
    """Identity of a folder material -> where it lay for the run of this user that merged what a ledger entry says.

    The note lies in the user's home, under a digest of what was merged and how. So a merge by somebody else cannot
    name folders of this machine. The user's own merge is found again after it was moved, copied or pushed. If several
    runs made the same merge, the run into this folder counts, else the last run.

    Raises:
        LedgerError: the note cannot be read.
    """
    notes = _notes_of(entry)
    places = notes.get(str(snapshot.folder)) or next(reversed(notes.values()), {})
    return {str(identity): str(place) for identity, place in places.items()}


def note_places(entry: Entry, folder: Path | None, places: Mapping[str, str]) -> None:
    """Write down in the user's home, for this machine alone, where folders lie that were merged.

    Args:
        entry: what the run wrote to the ledger.
        folder: where the merge comes to lie; None: on the Hub only.
        places: identity of a folder material -> where it lies.
    """
    if places:
        where = str(folder.resolve()) if folder is not None else ""
        try:
            others = {one: known for one, known in _notes_of(entry).items() if one != where}
        except LedgerError:
            others = {}  # a note that cannot be read is written anew
        absolute = {identity: str(Path(place).expanduser().absolute()) for identity, place in places.items()}
        notes = {**dict(list(others.items())[1 - COPIES :]), where: absolute}
        with contextlib.suppress(OSError):  # `keep_note` has logged the error
            private_folder(_note(entry).parent)
        keep_note(_note(entry), notes, NOTES)


def _note(entry: Entry) -> Path:
    models = [[one.identity, one.beneath, stored(one.weight), one.subtracted] for one in entry.models]
    settings = {key: entry.settings.get(key) for key in ("dtype", "include", "exclude", "vocabulary", "learn")}
    merge = [entry.base.identity, models, entry.method.to_dict(), settings]
    return home("places", f"{sha256_bytes(canonical_json(merge))}.json")


def _notes_of(entry: Entry) -> dict[str, dict[str, Any]]:
    """Folder of a merge -> places of its materials, the last written at the end."""
    note = _note(entry)
    try:
        found = json.loads(note.read_bytes())
        if not all(isinstance(places, dict) for places in found.values()):
            raise ValueError("no note of folders")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise LedgerError(
            f"{note}: cannot be read ({error}); delete it, and say where folders are with "
            f"{parameter('sources', {'NAME': 'FOLDER'})}."
        ) from error
    return dict(found)


def folders_of(material: Material) -> list[str]:
    """Identities of the folders that a material was read from: its own, and that of the model beneath it."""
    return [one for one in (material.identity, material.beneath) if one is not None and "@sha256:" in one]


def check_folders(refs: Mapping[str, str], material: Material, *, allow_pickle: bool) -> None:
    """Make sure that the folders of a material are what was merged; on the Hub its commit does.

    All folders are compared, also those of which this run needs only the configuration. Anybody can write a ledger, so
    the folder of a name may hold another model. Nothing of another model may get into the output.

    Args:
        allow_pickle: the caller allows pickled checkpoints.

    Raises:
        LedgerError: a folder has moved, or its files have changed since. UnsupportedError: it holds a pickle only.
    """
    for identity in folders_of(material):
        name, _, digest = identity.rpartition("@sha256:")
        path = refs.get(identity)
        if path is None:
            continue
        if not Path(path).expanduser().is_dir():
            raise LedgerError(
                f"{name}: was merged from the folder {path}, which is gone; say where it is now with "
                f"{parameter('sources', {name: 'FOLDER'})}."
            )
        source = describe(path, allow_pickle=allow_pickle)
        source = with_beside(source, material.files if identity == material.identity else ())
        present = digests(source, remembered_digest)
        if folder_digest(present) != digest:
            raise LedgerError(
                f"{name}@{digest[:8]}: the files in {path} are not those that were merged; restore them, or name a "
                f"copy with {parameter('sources', {name: 'FOLDER'})}."
            )


def state_path(snapshot: Snapshot, state: KeptState, warnings: list[str]) -> Path | None:
    """A kept state's file on this machine, checked by digest; None with a warning when it cannot be had."""
    try:
        if snapshot.folder is not None:
            path = file_in(snapshot.folder, state.file)
        elif snapshot.subfolder is not None:  # the branch of states belongs to a merge that is a whole repository
            return None
        else:
            from huggingface_hub import hf_hub_download

            with hub_errors(f"{snapshot.name}@{STATE_BRANCH}: {state.file}"):
                path = Path(hf_hub_download(snapshot.name, state.file, revision=STATE_BRANCH, library_name="hfmerge"))
        if not path.is_file():
            warnings.append(f"{snapshot.label}: {state.file} is missing; the sources are read instead.")
        elif sha256_file(path) != state.sha256:
            warnings.append(f"{snapshot.label}: {state.file} is corrupt; the sources are read instead.")
        else:
            return path
    except HfMergeError as error:
        warnings.append(f"{error} The sources are read instead.")
    return None
