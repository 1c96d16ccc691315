"""Check a merge against its ledger: chain, digests of every file, card; on request a replay (see `replaying`).

On the Hub the digests of weights are the LFS object IDs, so nothing large is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfmerge.card import BEGIN, FILE, card_differs, card_pointer, licence_note
from hfmerge.checkpoint.sidefiles import is_side_file
from hfmerge.digest import sha256_bytes, sha256_file
from hfmerge.digesting import folder_digest
from hfmerge.errors import LedgerError, NotFoundError
from hfmerge.fetching import fetch, pin
from hfmerge.ledger import ARCHIVES, FOLDER, Entry
from hfmerge.merged import STATE_BRANCH, Merged, open_merged
from hfmerge.removal import parts
from hfmerge.source import Place
from hfmerge.workspace import recover


if TYPE_CHECKING:
    from hfmerge.replaying import Verdict

LICENCES = "LICENSE.md"
WEIGHTS = (
    *(".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx"),
    *(".onnx_data", ".tflite", ".pkl", ".npz"),
)
"""How names of files end that may hold weights, or say where they are."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what, whether it holds, and what was found.

    Attributes:
        approximate: it does not hold byte for byte, and the difference is within what other arithmetic explains; `ok`
            is then False.
    """

    what: str
    ok: bool
    detail: str
    approximate: bool = False

    @property
    def verdict(self) -> Verdict:
        """The outcome in one word."""
        return "ok" if self.ok else "approximate" if self.approximate else "failed"


@dataclass(frozen=True)
class Report:
    """All checks of one merge."""

    merged: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when every check holds, byte for byte."""
        return self.verdict == "ok"

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks' verdicts."""
        found = {check.verdict for check in self.checks}
        return "failed" if "failed" in found else "approximate" if "approximate" in found else "ok"

    @property
    def culprits(self) -> list[str]:
        """What is wrong, one line each."""
        return [f"{check.what}: {check.detail}" for check in self.checks if not check.ok]


def verify_merge(
    ref: str,
    *,
    replay: bool = False,
    device: str | None = None,
    sources: Mapping[str, str] | None = None,
    also: Callable[[Merged], Sequence[Check]] | None = None,
) -> Report:
    """Check a merge.

    Args:
        ref: `org/name[@revision]` or a folder.
        replay: also merge again from the pinned sources, and compare bytes and every field of the entry.
        device: where it computes then, see `RunOptions.device`.
        sources: name of a folder material -> where it lies now.
        also: further checks of the merge, once it is open.

    Raises:
        SourceError: the merge cannot be reached. A broken ledger is a failed check, not an error.
    """
    recover(ref)
    try:
        merged = open_merged(ref, sources)
    except LedgerError as error:
        return Report(ref, (Check("ledger", False, str(error)),))
    return check_merged(merged, replay=replay, device=device, also=also)


def check_merged(
    merged: Merged,
    *,
    replay: bool = False,
    device: str | None = None,
    also: Callable[[Merged], Sequence[Check]] | None = None,
) -> Report:
    """Check a merge that is open already; see `verify_merge`."""
    checks = [Check("ledger", True, f"{len(merged.entries)} entries, each names its parent's digest")]
    files, read = _digests(merged)
    checks.extend(check_contents(merged.entries, files, merged.read(FILE), merged.read(LICENCES), read=read))
    checks.extend(_materials(merged.last))
    checks.extend(_published_states(merged) if merged.pinned.folder is None else [])
    checks.extend(also(merged) if also is not None else ())
    if replay:
        checks.extend(_replay(merged, device))
    return Report(merged.pinned.label, tuple(checks))


def check_contents(
    entries: Sequence[Entry],
    files: Mapping[str, str | None],
    card: bytes | None,
    licences: bytes | None,
    *,
    read: int = 0,
) -> Iterator[Check]:
    """What can be said of a merge from its files alone; reads nothing.

    Args:
        entries: the ledger, its chain checked.
        files: path -> SHA-256 of every file there; None where it does not matter.
        card, licences: bytes of README.md and LICENSE.md, None if missing.
        read: how many files were read to know their SHA-256, for the report.
    """
    last = entries[-1]
    wanted = dict(last.products)
    # kept states are not on `main`, and so not in a folder that was downloaded from there
    if any(name.startswith("merge_state/") for name in files):
        wanted |= last.beside
    good = True
    for name, digest in wanted.items():
        found = files.get(name)
        if found != digest:
            good = False
            what = f"sha256 is {found[:12]}..., the ledger says {digest[:12]}..." if found else "missing"
            yield Check(name, False, what)
    for name in files:
        if name not in wanted and (reason := _foreign(name, entries)) is not None:
            good = False
            yield Check(name, False, reason)
    if good:
        count = len(wanted)
        yield Check("files", True, f"{count} files have their digests ({count - read} by LFS id, {read} read)")
    yield _card(entries, card, licences)


def _foreign(name: str, entries: Sequence[Entry]) -> str | None:
    """Why a file that the last entry does not name must not be there; None for what people may add."""
    if name.startswith(f"{FOLDER}/"):
        return None if name in [entry.file for entry in entries] else "is no entry of the ledger"
    if name.startswith((".git/", ".cache/")):  # what git and the Hub's client keep in a folder; nothing loads it
        return None
    if name.startswith(f"{ARCHIVES}/"):
        return "a copy of a source that the ledger does not know"
    if name.endswith(WEIGHTS):
        state = name.startswith("merge_state/")
        return "a state that the ledger does not know" if state else "weights that the ledger does not know"
    if name == "adapter_config.json" or is_side_file(name):
        return "is loaded with the model, and the ledger does not know it"
    return None


def _digests(merged: Merged) -> tuple[dict[str, str | None], int]:
    """Path -> SHA-256 of what the ledger names, by LFS id or else read, None of all else; and how many were read."""
    last, found, read = merged.last, {name: info.sha256 for name, info in merged.pinned.files.items()}, 0
    for name in (*last.products, *last.beside):
        if name in found and found[name] is None:
            found[name], read = sha256_file(fetch(merged.pinned, name)), read + 1
    return found, read


def _card(entries: Sequence[Entry], text: bytes | None, licences: bytes | None) -> Check:
    if text is None:
        return Check("card", False, f"{FILE} is missing")
    last = entries[-1]
    try:
        card = text.decode("utf-8", "replace")
        # the ledger's last entry has no successor to name its digest; the card does
        named, found = card_pointer(card).get("sha256"), sha256_bytes(last.to_bytes())
        if re.search(r"\r(?!\n)", card.partition(BEGIN)[0]):
            # to YAML a line break like any other, so that the byte would not count
            problem: str | None = f"{FILE} has a carriage return in its front matter"
        elif named != found:
            problem = f"{last.file} has the digest {found[:12]}..., {FILE} names {str(named)[:12]}...; one was changed"
        else:
            problem = card_differs(card, entries)
    except LedgerError as error:
        problem = str(error)
    note = licence_note([last.base, *last.models])
    if problem is None and note is not None and licences != note.encode():
        problem = f"{LICENCES} is not what the ledger gives"
    return Check("card", problem is None, problem or "says what the ledger says")


def _materials(last: Entry) -> Iterator[Check]:
    """Of folders that were merged: whether the digests of their files give the digest by which they are known."""
    for part in parts(last):
        _, folder, digest = part.identity.rpartition("@sha256:")
        if folder and part.read and folder_digest(part.files) != digest:
            yield Check("materials", False, f"{part.label}: the digests of its files do not give its own")


def stray_states(merged: Merged) -> list[str]:
    """States and copies of sources on the Hub that the ledger's last entry does not list, maybe of a removed model."""
    if merged.pinned.folder is not None:
        return []
    try:
        branch = pin(Place(merged.pinned.place.text, merged.pinned.name, STATE_BRANCH, None))
    except NotFoundError:
        return []
    return [name for name in branch.files if name.endswith((*WEIGHTS, ".zip")) and name not in merged.last.beside]


def _published_states(merged: Merged) -> list[Check]:
    """A state that is not published (a pull request carries none) is no fault: the sources are read instead."""
    if not any(entry.beside for entry in merged.entries):
        return []
    try:
        branch = pin(Place(merged.pinned.place.text, merged.pinned.name, STATE_BRANCH, None))
    except NotFoundError:
        return [Check("state", True, f"no branch {STATE_BRANCH}; add and unmerge read the sources")]
    checks = []
    for file, digest in merged.last.beside.items():
        held = branch.files.get(file)
        right = held is None or held.sha256 in (None, digest)
        detail = "not published; the sources are read instead" if held is None else "has its digest (by LFS id)"
        checks.append(Check(file, right, detail if right else f"the branch {STATE_BRANCH} holds other bytes"))
    # an earlier commit is not what the branch goes with
    if merged.pinned.place.revision in (None, "main"):
        stray = [name for name in branch.files if name.startswith(f"{ARCHIVES}/") and name not in merged.last.beside]
        what = f"on the branch {STATE_BRANCH}: a copy of a source that the ledger does not know; push the merge again"
        checks += [Check(name, False, what) for name in stray]
    return checks


def _replay(merged: Merged, device: str | None) -> list[Check]:
    """One check; of a replay that fails one for each thing that differs."""
    from hfmerge.replaying import replay

    verdict, lines = replay(merged, device)
    return [Check("replay", verdict == "ok", line, approximate=verdict == "approximate") for line in lines]
