"""The histories this user has seen: trust on first use, kept in the user's home.

`HF_HOME/hfmerge/seen/` holds one file a place, named by the SHA-256 of the place: the digest of every step that was
seen there. A place is a repository of one Hub, or a folder; a revision that is neither `main` nor the tag of a step is
a place of its own. If a history continues what was seen, the new steps are remembered. If a seen step has another
digest or is missing, the history was rewritten, and hfmerge tells the user.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from hfmerge.errors import LedgerError
from hfmerge.hashing import sha256_bytes
from hfmerge.hub.reference import Snapshot
from hfmerge.ledger.entry import LEDGER_FOLDER
from hfmerge.ledger.repository import Merged
from hfmerge.user_files import write_note
from hfmerge.validation.strict_json import read_json_file
from hfmerge.validation.wording import call


STEP_TAG = re.compile(r"step-\d{4,}")
"""Tags that a push sets; each names a commit in the history of `main`."""


@dataclass(frozen=True)
class Seen:
    """The history seen at a place: step -> SHA-256 of its ledger entry, and when it was last seen (UTC)."""

    steps: Mapping[int, str]
    time: str


def place_of(snapshot: Snapshot) -> str:
    """What a history is remembered under."""
    if snapshot.folder is not None:
        return folder_place(snapshot.folder)
    revision = snapshot.ref.revision
    return repository_place(snapshot.name) + (f"@{revision}" if revision and not _on_main(revision) else "")


def repository_place(repo_id: str) -> str:
    """The place of a repository's `main`; the Hub takes capitals for small letters."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT.rstrip('/')}/{repo_id.lower()}"


def folder_place(folder: str | Path) -> str:
    """The place of a folder; its path itself is not written down."""
    return f"folder:{sha256_bytes(os.path.realpath(folder).encode('utf-8', 'surrogateescape'))}"


def digests_of(merged: Merged) -> tuple[str, ...]:
    """SHA-256 of the ledger's files, oldest first."""
    return tuple(sha256_bytes(merged.history[entry.file]) for entry in merged.entries)


def may_be_older(snapshot: Snapshot) -> bool:
    """Whether a place was opened in a way that may show fewer steps than were seen: by a step's tag, or offline."""
    revision = snapshot.ref.revision or "main"
    return snapshot.offline or (revision != "main" and _on_main(revision))


def first_apart(
    seen: Iterable[tuple[int, str]], digests: Sequence[str], *, older: bool
) -> tuple[int, str, str | None] | None:
    """The first step that is not what was seen: its number, the digest then, and now, None where it is missing.

    Args:
        seen: steps with their digests.
        digests: of all steps as they are now.
        older: fewer steps are no fault.
    """
    for step, then in sorted(seen):
        now = digests[step - 1] if step <= len(digests) else None
        if now != then and not (now is None and older):
            return step, then, now
    return None


def rewritten(merged: Merged) -> str | None:
    """How a history differs from what this user saw of it, in words; None if it does not, or was never seen."""
    place = place_of(merged.snapshot)
    try:
        seen = recall_seen(place)
    except LedgerError as error:
        return str(error)
    if seen is None:
        return None
    apart = first_apart(seen.steps.items(), digests_of(merged), older=may_be_older(merged.snapshot))
    if apart is None:
        return None
    step, then, now = apart
    found = f"it has {now[:12]}... now" if now is not None else f"the ledger ends with step {len(merged.entries)} now"
    return f"the history was rewritten: on {seen.time} step {step} had the digest {then[:12]}..., and {found}"


def acquaintance(merged: Merged) -> str:
    """What this user saw before of a history that was not rewritten, in words."""
    seen = recall_seen(place_of(merged.snapshot))
    if seen is None:
        return "not seen on this machine before"
    return f"holds the {len(seen.steps)} steps that were seen on {seen.time}, with the same digests"


def refuse_rewritten(merged: Merged) -> None:
    """Do not go on from a history that is not the one this user saw.

    Raises:
        LedgerError: it was rewritten; names the way to accept that.
    """
    problem = rewritten(merged)
    if problem is not None:
        raise LedgerError(f"{merged.snapshot.label}: {problem}; {acceptance(merged)}.")


def acceptance(merged: Merged, log: str | Path | None = None) -> str:
    """What to do about a history that was rewritten since it was seen, or since a log got its record."""
    witness = {} if log is None else {"log": log}
    accept = call("verify", merged.snapshot.ref.text, accept_rewritten=True, **witness)
    return (
        "ask its owner why; if you expect that (it was deleted and made anew), "
        f"{accept} takes the new history from now on"
    )


def remember(merged: Merged, *, anew: bool = False) -> str | None:
    """Keep a history as seen; one that is only the beginning of what was seen changes nothing.

    Args:
        anew: what was seen before does not count any more.

    Returns:
        Why it could not be kept, None if it was.
    """
    place, digests = place_of(merged.snapshot), digests_of(merged)
    try:
        known = None if anew else recall_seen(place)
        if known is not None and len(known.steps) > len(digests):
            return None
        _write(place, dict(enumerate(digests, 1)))
    except (LedgerError, OSError) as error:
        return f"the history could not be kept as seen: {error}"
    return None


def remember_steps(place: str, steps: Mapping[int, str]) -> str | None:
    """Keep these steps as the ones seen at a place, in place of all earlier ones; see `remember`."""
    try:
        _write(place, steps)
    except OSError as error:
        return f"the history could not be kept as seen: {error}"
    return None


def follow(folder: Path) -> None:
    """After a verb wrote a merge into a folder: if the folder was seen before, remember its new history."""
    place = folder_place(folder)
    if not _file(place).exists():
        return
    files = (folder / LEDGER_FOLDER / f"{step:04d}.json" for step in itertools.count(1))
    held = itertools.takewhile(Path.is_file, files)
    note = remember_steps(place, {step: sha256_bytes(file.read_bytes()) for step, file in enumerate(held, 1)})
    if note is not None:
        logging.getLogger(__name__).warning("%s: %s", folder, note)


def recall_seen(place: str) -> Seen | None:
    """What was seen of a place; None if nothing was.

    Raises:
        LedgerError: the note in the user's home cannot be read.
    """
    file = _file(place)
    try:
        raw = read_json_file(file)
        steps = {int(step): str(digest) for step, digest in raw["steps"].items()}
        if raw["place"] != place or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in steps.values()):
            raise ValueError("is not a note of this place")
        return Seen(steps, str(datetime.fromisoformat(raw["time"]).date()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"{file}: what was seen of the history cannot be read ({error}); delete the file to begin anew."
        ) from error


def _write(place: str, steps: Mapping[int, str]) -> None:
    time = datetime.now(timezone.utc).replace(microsecond=0).isoformat()
    note = {"place": place, "time": time, "steps": {str(step): one for step, one in steps.items()}}
    write_note(_file(place), note, sync=True)


def _file(place: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hfmerge" / "seen" / f"{sha256_bytes(place.encode())}.json"


def _on_main(revision: str) -> bool:
    return revision == "main" or STEP_TAG.fullmatch(revision) is not None
