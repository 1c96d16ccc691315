"""Remembers digests of files on this machine, as git's index does: while the stamp of a file stays the same.

A file counts as unchanged while its device, inode, size, and both times, of its content (mtime) and of its inode
(ctime), are what they were when it was hashed. Every write to a file changes the times, and nobody can set the ctime
back. A file that was changed a moment before it was hashed is not remembered: a further change could leave the same
times. A stamp cannot show that a disk returns other bytes than were written. `verify` finds this, because it hashes
the files itself.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from hfmerge.hashing import sha256_bytes, sha256_file
from hfmerge.user_files import home, keep_note


SETTLED = 2_000_000_000
"""Nanoseconds that a change must lie back: the coarsest times that file systems keep are two seconds apart."""
_KEPT = 4096
"""How many files are remembered; the oldest go first."""


def remembered_digest(path: str | Path, hasher: Callable[[str], str] = sha256_file) -> str:
    """SHA-256 of a file, from memory if it is as it was when it was hashed.

    Args:
        path: the file.
        hasher: what hashes it if that is not remembered.
    """
    real = os.path.realpath(path)
    note = _folder() / f"{sha256_bytes(real.encode())}.json"
    now, stamp = time.time_ns(), _stamp(real)
    known = _noted(note)
    if known is not None and known[0] == stamp:
        return known[1]
    found = hasher(real)
    if _stamp(real) == stamp and now - max(stamp[-2:]) > SETTLED:
        keep_note(note, [stamp, found], _KEPT)
    return found


def _stamp(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _folder() -> Path:
    return home("digests")


def _noted(note: Path) -> tuple[list[int], str] | None:
    """Stamp and digest, or None where there is no note that can be read."""
    try:
        stamp, digest = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logging.getLogger(__name__).info("%s: cannot be read (%s); hashed again.", note, error)
        return None
    return stamp, digest
