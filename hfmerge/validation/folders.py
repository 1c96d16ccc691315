"""The files of a folder, read without leaving it: a link counts only if what it leads to lies in the same folder.

A link may lead to any file of the user. Publishing or copying the folder would then publish this file. A
snapshot of a Hugging Face cache is the exception: its links lead to the blobs of the same repository.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from hfmerge.errors import SourceError


TOOLS = (".git", ".cache/huggingface")
"""What git and the Hub's client keep in a folder, by its path there; nobody loads or publishes it."""
SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def files_in(folder: Path, *, skip: Collection[str] = TOOLS) -> dict[str, Path]:
    """Every file below a folder by its path in there, in order; links to files of the folder are among them.

    Args:
        skip: paths in the folder that are left out.

    Raises:
        SourceError: a link leaves the folder, something is no file (a pipe, a socket, a device), or a folder in there
            cannot be read; names it.
    """
    root, found = folder.resolve(), {}
    for path in _entries(root, skip):
        if _is_file(root, path):
            found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def file_in(folder: Path, name: str) -> Path:
    """The path of a file of a folder, for a file that is there, and for one that will be written.

    Raises:
        SourceError: it leads out of the folder, or what is there is no file.
    """
    root = folder.resolve()
    path = root / name
    if path.is_symlink() or path.exists():
        _is_file(root, path)
    _check_inside(root, path)
    return path


def _entries(root: Path, skip: Collection[str]) -> Iterator[Path]:
    """All that lies below a folder; what a link leads to is not looked into."""

    def unreadable(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror}.") from error

    for here, folders, files in os.walk(root, onerror=unreadable):
        place = Path(here).relative_to(root)
        folders[:] = [name for name in folders if (place / name).as_posix() not in skip]
        files = [name for name in files if (place / name).as_posix() not in skip]
        for name in (*folders, *files):
            yield Path(here, name)


def _is_file(root: Path, path: Path) -> bool:
    """Whether a path of a folder is a file, or a link to one within the folder; folders and links to them are none."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        _check_inside(root, path)
        try:
            mode = path.stat().st_mode
        except OSError:
            return False  # the link is broken or circular
    kind = SPECIAL.get(stat.S_IFMT(mode))
    if kind is not None:
        raise SourceError(f"{root}: {path.relative_to(root)} is {kind}, and no file; take it out of the folder.")
    return stat.S_ISREG(mode)


def _check_inside(root: Path, path: Path) -> None:
    target = Path(os.path.realpath(path))
    blobs = _blobs(root)
    if target.is_relative_to(root) or (blobs is not None and target.is_relative_to(blobs)):
        return
    raise SourceError(
        f"{root}: {path.relative_to(root)} is a link to {target}, which is outside of this folder; put the file "
        "itself there, or take the link away."
    )


def _blobs(root: Path) -> Path | None:
    """Where the files of a snapshot in a Hugging Face cache lie, if the folder is one or lies in one."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and re.match("(models|datasets|spaces)--", repository.name):
            return repository / "blobs"
    return None
