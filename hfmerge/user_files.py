"""Files in the home folder that only their user can read; small JSON files are written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any


def home(*names: str) -> Path:
    """A path in the folder `HF_HOME/hfmerge` of the user's home."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME, "hfmerge", *names)


def private_folder(path: Path) -> Path:
    """Make a folder, and those above it that are missing, that only its user can enter; an older one becomes so."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    os.chmod(path, 0o700)
    return path


def private_file(path: Path) -> Path:
    """Make an empty file that only its user can read, in the place of whatever has its name; to be written to next."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return path


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
