"""Check a merge against its ledger: chain, digests of every file, card; on request a replay, byte for byte.

On the Hub the digests of weights are the LFS object IDs, so nothing large is downloaded.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfmerge.card import FILE, card_differs, card_pointer, licence_note
from hfmerge.digest import sha256_bytes, sha256_file
from hfmerge.environment import differences, environment, far_apart
from hfmerge.errors import HfMergeError, LedgerError, NotFoundError
from hfmerge.fetching import fetch, pin
from hfmerge.merged import STATE_BRANCH, Merged, open_merged, state_path
from hfmerge.source import Place
from hfmerge.workspace import recover


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


def verify_merge(ref: str, *, replay: bool = False, sources: Mapping[str, str] | None = None) -> Report:
    """Check a merge.

    Args:
        ref: `org/name[@revision]` or a folder.
        replay: also merge again from the pinned sources and compare bytes.
        sources: name of a folder material -> where it lies now.

    Raises:
        SourceError: the merge cannot be reached. A broken ledger is a failed check, not an error.
    """
    recover(ref)
    try:
        merged = open_merged(ref, sources)
    except LedgerError as error:
        return Report(ref, (Check("ledger", False, str(error)),))
    checks = [Check("ledger", True, f"{len(merged.entries)} entries, each names its parent's digest")]
    checks.extend(_files(merged))
    checks.append(_card(merged))
    checks.extend(_states(merged))
    if replay:
        checks.append(_replay(merged))
    return Report(merged.pinned.label, tuple(checks))


def _files(merged: Merged) -> list[Check]:
    """Every product has its digest, and no weights lie about that the ledger does not know."""
    wrong, read = [], 0
    for name, digest in merged.last.products.items():
        info = merged.pinned.files.get(name)
        if info is None:
            wrong.append(Check(name, False, "missing"))
            continue
        found = info.sha256
        if found is None:
            found, read = sha256_file(fetch(merged.pinned, name)), read + 1
        if found != digest:
            wrong.append(Check(name, False, f"sha256 is {found[:12]}..., the ledger says {digest[:12]}..."))
    for name in merged.pinned.files:
        if name.endswith((".safetensors", ".bin", ".safetensors.index.json")) and name not in merged.last.products:
            if not name.startswith("merge_state/"):
                wrong.append(Check(name, False, "weights that the ledger does not know"))
    if wrong:
        return wrong
    total = len(merged.last.products)
    return [Check("files", True, f"{total} files have their digests ({total - read} by LFS id, {read} read)")]


def _card(merged: Merged) -> Check:
    text = merged.read(FILE)
    if text is None:
        return Check("card", False, f"{FILE} is missing")
    try:
        card = text.decode("utf-8", "replace")
        # the ledger's last entry has no successor to name its digest; the card does
        named, found = card_pointer(card).get("sha256"), sha256_bytes(merged.last.to_bytes())
        if named != found:
            problem: str | None = (
                f"{merged.last.file} has the digest {found[:12]}..., {FILE} names {str(named)[:12]}...; one was "
                "changed"
            )
        else:
            problem = card_differs(card, merged.entries)
    except LedgerError as error:
        problem = str(error)
    note = licence_note([merged.last.base, *merged.last.models])
    if problem is None and note is not None and merged.read("LICENSE.md") != note.encode():
        problem = "LICENSE.md is not what the ledger gives"
    return Check("card", problem is None, problem or "says what the ledger says")


def _states(merged: Merged) -> list[Check]:
    """Kept states: of a folder read and hashed, on the Hub by LFS id on their branch."""
    if merged.pinned.folder is None:
        return _published_states(merged)
    checks = []
    for state in merged.last.states:
        notes: list[str] = []
        path = state_path(merged.pinned, state, notes)
        checks.append(Check(state.file, path is not None, "has its digest" if path else notes[0]))
    return checks


def _published_states(merged: Merged) -> list[Check]:
    """A state that is not published (a pull request carries none) is no fault: the sources are read instead."""
    if not merged.last.states:
        return []
    try:
        branch = pin(Place(merged.pinned.place.text, merged.pinned.name, STATE_BRANCH, None))
    except NotFoundError:
        return [Check("state", True, f"no branch {STATE_BRANCH}; add and unmerge read the sources")]
    checks = []
    for state in merged.last.states:
        held = branch.files.get(state.file)
        right = held is None or held.sha256 in (None, state.sha256)
        detail = "not published; the sources are read instead" if held is None else "has its digest (by LFS id)"
        checks.append(Check(state.file, right, detail if right else f"the branch {STATE_BRANCH} holds other bytes"))
    return checks


def _replay(merged: Merged) -> Check:
    """Merge again from the sources alone and compare every product.

    Bytes have to agree where the arithmetic is the ledger's; elsewhere weights may differ by what other arithmetic
    explains.
    """
    from hfmerge.changes import plan_replay
    from hfmerge.execute import run

    apart = differences(merged.last.environment, environment())
    wanted = merged.last.products
    try:
        plan = plan_replay(merged)
        with tempfile.TemporaryDirectory(prefix="hfmerge-replay-") as folder:
            products = run(plan, Path(folder)).products
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
