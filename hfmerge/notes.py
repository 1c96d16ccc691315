"""Small JSON files in a folder of the user's home: written whole or not at all, and only so many of them."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any


def keep_note(path: Path, value: Any, most: int) -> None:
    """Write a JSON value; of more than `most` notes in its folder the oldest go. A home that cannot be written costs
    time only.
    """
    try:
        write_note(path, value)
        kept = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in kept[:-most]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logging.getLogger(__name__).info("%s: cannot be kept: %s", path, error)


def write_note(path: Path, value: Any, *, sync: bool = False) -> None:
    """Write a JSON value whole or not at all, for its user only.

    Args:
        sync: it is on the disk before this returns.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, separators=(",", ":"))
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:  # Ctrl-C too must leave no half file
        Path(name).unlink(missing_ok=True)
        raise
