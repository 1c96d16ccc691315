"""Files that only their user can read: what hfmerge keeps in the user's home, and copies of private sources."""

from __future__ import annotations

import os
from pathlib import Path


def home(*names: str) -> Path:
    """A place in the folder of the user's home that hfmerge keeps things in, `HF_HOME/hfmerge`."""
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
