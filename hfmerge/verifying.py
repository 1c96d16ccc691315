"""Check a merge against its ledger: chain, digests of every file, card; on request a replay, byte for byte.

On the Hub the digests of weights are the LFS object IDs, so nothing large is downloaded.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfmerge.card import BEGIN, FILE, card_differs, card_pointer, licence_note
from hfmerge.checkpoint.sidefiles import is_asset, is_code, is_side_file
from hfmerge.digest import sha256_file
from hfmerge.environment import differences, environment, far_apart
from hfmerge.errors import HfMergeError, LedgerError, NotFoundError
from hfmerge.fetching import fetch, pin
from hfmerge.ledger import ARCHIVES, FOLDER, Entry
from hfmerge.merged import STATE_BRANCH, Merged, open_merged
from hfmerge.options import NO_CONSENT, Consent, RunOptions
from hfmerge.scorecard import PREFIX
from hfmerge.source import Pinned, Place
from hfmerge.statebranch import ATTRIBUTES
from hfmerge.workspace import leftovers, recover


LICENCES = "LICENSE.md"
WEIGHTS = (
    *(".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx"),
    *(".onnx_data", ".tflite", ".pkl", ".pickle", ".npz"),
)
"""How names of files end that may hold weights, or say where they are."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what, whether it holds, and what was found."""

    what: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of one merge."""

    merged: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when every check holds."""
        return all(check.ok for check in self.checks)

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
    consent: Consent = NO_CONSENT,
) -> Report:
    """Check a merge.

    Args:
        ref: `org/name[@revision]` or a folder.
        replay: also merge again from the pinned sources and compare bytes.
        device: where it computes then, see `RunOptions.device`.
        sources: name of a folder material -> where it lies now.
        also: further checks of the merge, once it is open.
        consent: what a replay may do with the sources; nothing is run or unpickled without one.

    Raises:
        SourceError: the merge cannot be reached. A broken ledger is a failed check, not an error.
    """
    recover(ref)
    try:
        merged = open_merged(ref, sources, consent)
    except LedgerError as error:
        return Report(ref, (Check("ledger", False, str(error)),))
    return check_merged(merged, replay=replay, device=device, also=also)


def check_merged(
    merged: Merged,
    *,
    replay: bool = False,
    device: str | None = None,
    also: Callable[[Merged], Sequence[Check]] | None = None,
    strays: bool = True,
) -> Report:
    """Check a merge that is open already; see `verify_merge`.

    Args:
        strays: whether what interrupted commands left counts.
    """
    checks = [Check("ledger", True, f"{len(merged.entries)} entries, each names its parent's digest")]
    files, read = _digests(merged)
    checks.extend(check_contents(merged.entries, files, merged.read(FILE), merged.read(LICENCES), read=read))
    checks.extend(_published_states(merged) if merged.pinned.folder is None else [])
    checks.extend(left_behind(merged) if strays else [])
    checks.extend(also(merged) if also is not None else ())
    if replay:
        checks.append(_replay(merged, device))
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
    history = {entry.file for entry in entries}
    for name in files:
        if name not in wanted and name not in history and (reason := _foreign(name)) is not None:
            good = False
            yield Check(name, False, reason)
    if good:
        count = len(wanted)
        yield Check("files", True, f"{count} files have their digests ({count - read} by LFS id, {read} read)")
    yield _card(entries, card, licences)


def _foreign(name: str) -> str | None:
    """Why a file that the ledger does not name must not be there; None for the few that may be added to a merge.

    Those are the files for the card and for git (see `is_asset`), and the scores that hfmerge puts beside the ledger.
    Whatever else there is, some loader may read.
    """
    if name.startswith(f"{FOLDER}/"):
        return "is no entry of the ledger"
    if is_asset(name) or re.fullmatch(rf"{re.escape(PREFIX)}[^/]+\.yaml", name):
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
        named, found = card_pointer(card).get("sha256"), last.digest
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


def _kind(name: str) -> str:
    return "a copy of a source" if name.startswith(f"{ARCHIVES}/") else "a state"


def _state_branch(merged: Merged) -> Pinned | None:
    try:
        return pin(Place(merged.pinned.place.text, merged.pinned.name, STATE_BRANCH, None))
    except NotFoundError:
        return None


def _published_states(merged: Merged) -> list[Check]:
    """A state that is not published (a pull request carries none) is no fault: the sources are read instead."""
    if not any(entry.beside for entry in merged.entries):
        return []
    branch = _state_branch(merged)
    if branch is None:
        return [Check("state", True, f"no branch {STATE_BRANCH}; add and unmerge read the sources")]
    checks = []
    for file, digest in merged.last.beside.items():
        held = branch.files.get(file)
        right = held is None or held.sha256 in (None, digest)
        detail = "not published; the sources are read instead" if held is None else "has its digest (by LFS id)"
        checks.append(Check(file, right, detail if right else f"the branch {STATE_BRANCH} holds other bytes"))
    return checks


def left_behind(merged: Merged) -> list[Check]:
    """What interrupted commands left on the branch of states or beside the folder; it may hold a removed model."""
    folder = merged.pinned.folder
    if folder is not None:
        left = "left beside the folder by a killed run; repeat its command, or delete it"
        return [Check(name, False, left) for name in leftovers(folder)]
    # an earlier commit is not what the branch goes with
    if merged.pinned.place.revision not in (None, "main") or (branch := _state_branch(merged)) is None:
        return []
    what = (
        f"on the branch {STATE_BRANCH}: {{}} that the ledger does not know; repeat the command that was interrupted, "
        "or push the merge again"
    )
    stray = [name for name in branch.files if name not in merged.last.beside and name != ATTRIBUTES]
    return [Check(name, False, what.format(_kind(name))) for name in stray]


def _replay(merged: Merged, asked: str | None) -> Check:
    """Merge again from the sources alone and compare every product.

    Bytes have to agree where the arithmetic is the ledger's; elsewhere weights may differ by what other arithmetic
    explains.
    """
    from hfmerge.changes import plan_replay
    from hfmerge.execute import run

    wanted = merged.last.products
    try:
        plan = plan_replay(merged)
        with tempfile.TemporaryDirectory(prefix="hfmerge-replay-") as folder:
            outcome = run(plan, Path(folder), options=RunOptions(device=asked))
            products, apart = outcome.products, differences(merged.last.environment, environment(outcome.device))
            names = sorted(name for name in {*wanted, *products} if wanted.get(name) != products.get(name))
            elements = sum(math.prod(param.slot.shape) for param in plan.params if param.touched)
            change = float(merged.last.scalars["merged_norm"]) / math.sqrt(max(1, elements))
            reasons = {name: _why_different(merged, Path(folder), name, change, apart) for name in names}
    except HfMergeError as error:
        return Check("replay", False, str(error))
    for name, reason in reasons.items():
        if reason is not None:
            made = f" (made with {'; '.join(apart)})" if apart else ""
            return Check("replay", False, f"{name} comes out differently{reason}{made}")
    sources = f"from {len(merged.last.models)} sources"
    if reasons:
        detail = f"{len(wanted)} files come out alike {sources}, not with the same bytes: made with {'; '.join(apart)}"
        return Check("replay", True, detail)
    return Check("replay", True, f"{len(wanted)} files come out with the same bytes {sources}")


def _why_different(merged: Merged, folder: Path, name: str, change: float, apart: Sequence[str]) -> str | None:
    """What is wrong with a product whose digest differs; None if other arithmetic explains it."""
    if not apart or not name.endswith(".safetensors") or name not in merged.pinned.files:
        return ""
    if not (folder / name).is_file():
        return ", or not at all"
    reason = far_apart(fetch(merged.pinned, name), folder / name, change)
    return None if reason is None else f": {reason}"
