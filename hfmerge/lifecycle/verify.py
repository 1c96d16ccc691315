"""Check a merge against its ledger: chain, digests of every file, card; on request a replay (see `replay`).

On the Hub the digests of weights are the LFS object IDs that it lists. So nothing large is downloaded, unless the
caller asks for it (`download`).
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hfmerge.checkpoint.digests import folder_digest
from hfmerge.checkpoint.side_files import is_asset, is_code, is_side_file
from hfmerge.checkpoint.streaming.served import served_digests
from hfmerge.engine.options import NO_CONSENT, Consent
from hfmerge.engine.workspace import leftovers, recover
from hfmerge.errors import LedgerError, NoLedgerError, NotFoundError
from hfmerge.hashing import sha256_file
from hfmerge.hub.download import cached, fetch, pin
from hfmerge.hub.reference import ModelRef, Snapshot
from hfmerge.hub.state_branch import ATTRIBUTES, STATE_BRANCH
from hfmerge.ledger.card import BEGIN, FILE, card_differs, card_pointer, licence_note
from hfmerge.ledger.card_sections import RESULTS_PREFIX
from hfmerge.ledger.entry import ARCHIVES, LEDGER_FOLDER, Entry
from hfmerge.ledger.removal import contained_models
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.ledger.seen import acceptance, acquaintance, remember, rewritten
from hfmerge.lifecycle.witness import append, read_log
from hfmerge.validation.folders import TOOLS
from hfmerge.validation.limits import HEADER_VALUES, INDEX_BYTES
from hfmerge.validation.strict_json import read_limited
from hfmerge.validation.values import show


if TYPE_CHECKING:
    from hfmerge.lifecycle.replay import Verdict

LICENCES = "LICENSE.md"
WEIGHTS = (
    *(".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx"),
    *(".onnx_data", ".tflite", ".pkl", ".pickle", ".npz"),
)
"""Endings of files that may hold weights, or that say where weights are."""
POINTERS = ("config.json", ".index.json", "modules.json")
"""Endings of JSON files whose values name other files for loaders: shards, tokenizers, folders of modules."""


@dataclass(frozen=True)
class Check:
    """One check: its name, its outcome, and its findings.

    Attributes:
        approximate: the bytes differ, but only within the tolerance of other arithmetic. `ok` is then False.
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
    """All checks of one merge.

    Attributes:
        merged: name of the merge.
        checks: the checks in the order they were made.
        commit: 40 hex digits of the commit that was checked; None for a folder, and if no ledger could be read.
        notes: further remarks for the user.
        has_ledger: there is a ledger, whole or broken. Without one the folder or repository never was a merge, or its
            ledger was deleted.
    """

    merged: str
    checks: tuple[Check, ...]
    commit: str | None = None
    notes: tuple[str, ...] = ()
    has_ledger: bool = True

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
        """One line for each thing that is wrong."""
        return [f"{check.what}: {check.detail}" for check in self.checks if not check.ok]


class CertificateChecks(Protocol):
    """A certificate whose checks belong to a report: SHA-256 of its file, and the checks."""

    @property
    def sha256(self) -> str: ...

    def checks(self, merged: Merged, *, replay: bool) -> Sequence[Check]: ...


@dataclass(frozen=True)
class FurtherChecks:
    """The checks that are made beside those of every merge.

    Attributes:
        replay: merge again from the pinned sources, and compare bytes and every field of the entry.
        device: device of the replay, see `RunOptions.device`.
        download: download and hash the files, instead of believing the digests that the Hub lists. A folder is always
            read.
        certificate: a certificate of removal to check.
    """

    replay: bool = False
    device: str | None = None
    download: bool = False
    certificate: CertificateChecks | None = None


NONE_FURTHER = FurtherChecks()
"""The checks of every merge alone."""


def verify_merge(
    ref: str,
    further: FurtherChecks = NONE_FURTHER,
    *,
    sources: Mapping[str, str] | None = None,
    consent: Consent = NO_CONSENT,
    log: str | Path | None = None,
    accept_rewritten: bool = False,
) -> Report:
    """Check a merge. If all checks pass, remember its history as seen and add a record to the log.

    Args:
        ref: `org/name[@revision]` or a folder.
        further: the checks to make beside those of every merge.
        sources: name of a folder material -> where it lies now.
        consent: consent for a replay. Without a replay no code is run and no pickle is read.
        log: append-only log against which the history is checked, see `witness`.
        accept_rewritten: accept a history that differs from the one seen before, and remember it from now on.

    Raises:
        SourceError: the merge cannot be reached. OutputError: the log cannot be read or written. A broken ledger is a
            failed check, not an error.
    """
    recover(ref)
    try:
        merged = open_merged(ref, sources, consent)
    except LedgerError as error:
        there = not isinstance(error, NoLedgerError)
        return Report(ref, (Check("ledger", False, str(error)),), has_ledger=there)
    report = check_merged(merged, further, accept_rewritten=accept_rewritten)
    witness, did = _witnessed(merged, log, accept_rewritten) if log is not None else (None, "verified")
    checks = [*report.checks, *(() if witness is None else (witness,))]
    if not all(check.ok for check in checks):
        return replace(report, checks=tuple(checks))
    note = remember(merged, anew=accept_rewritten)
    if log is not None:
        certificate = None if further.certificate is None else further.certificate.sha256
        checks[-1] = Check("log", True, append(log, merged, did, certificate=certificate))
    return replace(report, checks=tuple(checks), notes=() if note is None else (note,))


def check_merged(
    merged: Merged, further: FurtherChecks = NONE_FURTHER, *, strays: bool = True, accept_rewritten: bool = False
) -> Report:
    """Check a merge that is open already; see `verify_merge`.

    Args:
        strays: also look for files that interrupted commands left.
    """
    checks = [Check("ledger", True, f"{len(merged.entries)} entries, each names its parent's digest")]
    checks.append(_history(merged, accept_rewritten))
    download = further.download and merged.snapshot.folder is None
    files, read = _downloaded(merged) if download else _digests(merged)
    card, licences = merged.read(FILE), merged.read(LICENCES)
    checks.extend(check_contents(merged.entries, files, card, licences, read=read, downloaded=download))
    checks.extend(_pointers(merged))
    checks.extend(_materials(merged.last))
    checks.extend(_copies(merged, files) if download else ())
    checks.extend(_published_states(merged, download) if merged.snapshot.folder is None else [])
    checks.extend(left_behind(merged) if strays else [])
    if further.certificate is not None:
        checks.extend(further.certificate.checks(merged, replay=further.replay))
    if further.replay:
        checks.extend(_replay(merged, further.device))
    return Report(merged.snapshot.label, tuple(checks), merged.snapshot.commit)


def check_contents(
    entries: Sequence[Entry],
    files: Mapping[str, str | None],
    card: bytes | None,
    licences: bytes | None,
    *,
    read: int = 0,
    downloaded: bool = False,
) -> Iterator[Check]:
    """The checks that need only the digests of a merge's files; reads no file.

    Args:
        entries: the ledger, its chain checked.
        files: path -> SHA-256 of every file there; None where it does not matter.
        card, licences: bytes of README.md and LICENSE.md, None if missing.
        read: how many files were read to know their SHA-256, for the report.
        downloaded: they were all downloaded for it, for the report.
    """
    last = entries[-1]
    wanted = dict(last.products)
    # kept states are not on `main`, and so not in a folder that was downloaded from there
    if any(name.startswith("merge_state/") for name in files):
        wanted |= last.beside
    good = True
    for name, digest in wanted.items():
        actual = files.get(name)
        if actual != digest:
            good = False
            what = f"sha256 is {actual[:12]}..., the ledger says {digest[:12]}..." if actual else "missing"
            yield Check(name, False, what)
    history = {entry.file for entry in entries}
    for name in files:
        if name not in wanted and name not in history and (reason := _foreign(name)) is not None:
            good = False
            yield Check(name, False, reason)
    if good:
        count = len(wanted)
        how = f"{count - read} by LFS id, as the Hub lists it, {read} read"
        yield Check(
            "files", True, f"{count} files have their digests ({'downloaded and hashed' if downloaded else how})"
        )
    yield _card(entries, card, licences)


def _history(merged: Merged, accepted: bool) -> Check:
    """Whether the history goes on from what this user saw of it."""
    problem = rewritten(merged)
    if problem is None:
        return Check("history", True, acquaintance(merged))
    return Check("history", accepted, f"{problem}; {'accepted, as asked' if accepted else acceptance(merged)}")


def _witnessed(merged: Merged, log: str | Path, accepted: bool) -> tuple[Check, str]:
    """Whether a log holds and knows no other history of the merge, and what a new record would say was done."""
    try:
        read = read_log(log)
    except LedgerError as error:
        return Check("log", False, str(error)), "verified"
    problem = read.problem(merged)
    if problem is None:
        return Check("log", True, read.summary(merged)), "verified"
    todo = "accepted, as asked" if accepted else acceptance(merged, log)
    return Check("log", accepted, f"{problem}; {todo}"), "accepted"


def _foreign(name: str) -> str | None:
    """Why a file that the ledger does not name must not be there; None for the few that may be added to a merge.

    Those are the files for the card and for git (see `is_asset`), and the scores that hfmerge puts beside the ledger.
    Whatever else there is, some loader may read.
    """
    if name.startswith(f"{LEDGER_FOLDER}/"):
        return "is not an entry of the ledger"
    if is_asset(name) or re.fullmatch(rf"{re.escape(RESULTS_PREFIX)}[^/]+\.yaml", name):
        return None
    if name.startswith("merge_state/"):
        return f"{_kind(name)} that the ledger does not know"
    if name.endswith(WEIGHTS):
        return "weights that the ledger does not know"
    if is_code(name) or name.endswith(".py"):
        return "code that the ledger does not know"
    if name == "adapter_config.json" or is_side_file(name):
        return "is loaded with the model, and the ledger does not know it"
    return "the ledger does not know it, and nothing but pictures and Markdown may be added to a merge"


def _digests(merged: Merged) -> tuple[dict[str, str | None], int]:
    """Path -> SHA-256 of files the ledger names (LFS id, else read), None of others; and how many were read."""
    last, found, read = merged.last, {name: info.sha256 for name, info in merged.snapshot.files.items()}, 0
    for name in (*last.products, *last.beside):
        if name in found and found[name] is None:
            found[name], read = sha256_file(fetch(merged.snapshot, name)), read + 1
    return found, read


def _downloaded(merged: Merged) -> tuple[dict[str, str | None], int]:
    """As `_digests`, but of the bytes that the Hub serves, and also for the ledger, the card and the licences."""
    snapshot, last = merged.snapshot, merged.last
    names = [
        name for name in (*last.products, *last.beside, *merged.history, FILE, LICENCES) if name in snapshot.files
    ]
    served = served_digests(snapshot, names)
    return {name: served.get(name) for name in snapshot.files}, len(names)


def _copies(merged: Merged, served: Mapping[str, str | None]) -> Iterator[Check]:
    """Whether this machine's cache, from which the ledger was read and models are loaded, has what the Hub serves."""
    for name, digest in served.items():
        copy = cached(merged.snapshot, name) if digest is not None else None
        if copy is not None and sha256_file(copy) != digest:
            what = f"the cache of this machine holds other bytes than the Hub serves; delete {copy.resolve()}"
            yield Check(name, False, what)


def _card(entries: Sequence[Entry], text: bytes | None, licences: bytes | None) -> Check:
    if text is None:
        return Check("card", False, f"{FILE} is missing")
    last = entries[-1]
    try:
        card = text.decode("utf-8", "replace")
        # the ledger's last entry has no successor to name its digest; the card does
        named, found = card_pointer(card).get("sha256"), last.digest
        if re.search(r"\r(?!\n)", card.partition(BEGIN)[0]):
            # YAML reads it as a line break, so the comparison of the parsed front matter would not see it
            problem: str | None = f"{FILE} has a carriage return in its front matter"
        elif named != found:
            problem = f"{last.file} has the digest {found[:12]}..., {FILE} names {str(named)[:12]}...; one was changed"
        else:
            problem = card_differs(card, entries)
    except LedgerError as error:
        problem = str(error)
    note = licence_note([last.base, *last.models])
    if problem is None and note is not None and licences != note.encode():
        problem = f"{LICENCES} is not the file that follows from the ledger"
    return Check("card", problem is None, problem or "says what the ledger says")


def _materials(last: Entry) -> Iterator[Check]:
    """Of folders that were merged: whether the digests of their files give the digest by which they are known."""
    for part in contained_models(last):
        _, folder, digest = part.identity.rpartition("@sha256:")
        if folder and part.read and folder_digest(part.files) != digest:
            yield Check("materials", False, f"{part.label}: its digest does not follow from the digests of its files")


def _pointers(merged: Merged) -> Iterator[Check]:
    """Whether what is loaded names a file that the ledger does not have, such as a picture that holds weights."""
    last, files = merged.last, merged.snapshot.files
    for name in last.products:
        if name not in files or not name.endswith(POINTERS):
            continue
        try:
            values = _texts(read_limited(fetch(merged.snapshot, name), INDEX_BYTES))
        except (ValueError, RecursionError) as error:
            yield Check(name, False, f"cannot be read: {type(error).__name__}: {error}")
            continue
        for value in sorted(values):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), value))
            hidden = f"{path}/".startswith(tuple(f"{tool}/" for tool in TOOLS))
            if hidden or (path in files and path not in last.products):
                yield Check(name, False, f"makes a loader read {show(path)}, which the ledger does not know")


def _texts(data: bytes) -> set[str]:
    """Every text that is a value in a JSON file, also under a key that is there twice."""
    HEADER_VALUES.check(data.count(b",") + data.count(b"[") + data.count(b"{"))
    rest = [json.loads(data, object_pairs_hook=lambda pairs: [value for _, value in pairs])]
    found = set()
    while rest:
        one = rest.pop()
        if isinstance(one, list):
            rest += one
        elif isinstance(one, str):
            found.add(one)
    return found


def _kind(name: str) -> str:
    return "a copy of a source" if name.startswith(f"{ARCHIVES}/") else "a state"


def _state_branch(merged: Merged) -> Snapshot | None:
    if merged.snapshot.subfolder is not None:
        return None  # the branch belongs to a merge that is a whole repository
    try:
        return pin(ModelRef(merged.snapshot.ref.text, merged.snapshot.name, STATE_BRANCH, None))
    except NotFoundError:
        return None


def _published_states(merged: Merged, download: bool) -> list[Check]:
    """A state that is not published (a pull request carries none) is no fault: the sources are read instead."""
    if not any(entry.beside for entry in merged.entries):
        return []
    branch = _state_branch(merged)
    if branch is None:
        return [Check("state", True, f"no branch {STATE_BRANCH}; add and unmerge read the sources")]
    checks = []
    here = [file for file in merged.last.beside if file in branch.files]
    served = served_digests(branch, here) if download else {file: branch.files[file].sha256 for file in here}
    how = "downloaded and hashed" if download else "by LFS id, as the Hub lists it"
    for file, digest in merged.last.beside.items():
        held = branch.files.get(file)
        right = held is None or served[file] in (None, digest)
        detail = "not published; the sources are read instead" if held is None else f"has its digest ({how})"
        checks.append(Check(file, right, detail if right else f"the branch {STATE_BRANCH} holds other bytes"))
    return checks


def left_behind(merged: Merged) -> list[Check]:
    """What interrupted commands left on the branch of states or beside the folder; it may hold a removed model."""
    folder = merged.snapshot.folder
    if folder is not None:
        left = "left beside the folder by a killed run; repeat its command, or delete it"
        return [Check(name, False, left) for name in leftovers(folder)]
    # the branch of states belongs to the newest commit, not to an earlier one
    if merged.snapshot.ref.revision not in (None, "main") or (branch := _state_branch(merged)) is None:
        return []
    what = (
        f"on the branch {STATE_BRANCH}: {{}} that the ledger does not know; repeat the command that was interrupted, "
        "or push the merge again"
    )
    stray = [name for name in branch.files if name not in merged.last.beside and name != ATTRIBUTES]
    return [Check(name, False, what.format(_kind(name))) for name in stray]


def _replay(merged: Merged, device: str | None) -> list[Check]:
    """One check; a replay that fails gives one check for each difference."""
    from hfmerge.lifecycle.replay import replay

    verdict, lines = replay(merged, device)
    return [Check("replay", verdict == "ok", line, approximate=verdict == "approximate") for line in lines]
