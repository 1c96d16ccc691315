"""SHA-256 of bytes, files and JSON values: the only identity hfmerge trusts.

Run as a program, this module hashes one file for another process. It imports very little, so that it starts quickly.
"""

from __future__ import annotations

import hashlib
import sys


TYPE_CHECKING = False  # as `typing` has it, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any


CHUNK = 1 << 22


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks of 4 MiB.

    Args:
        path: the file.
        progress: called with the number of bytes just hashed, after each chunk.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def is_digest(value: object) -> bool:
    """Whether a value, from wherever it comes, is a hex SHA-256 and so can be a part of a path."""
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def git_blob_id(data: bytes) -> str:
    """The SHA-1 under which git, and so the Hub's tree listing, knows a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def canonical_json(value: Any) -> bytes:
    """One byte sequence for one value: sorted keys, two-space indent, UTF-8, newline at the end."""
    import json

    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


if __name__ == "__main__":
    print(sha256_file(sys.argv[1]))
