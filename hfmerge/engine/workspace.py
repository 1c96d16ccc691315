"""The output folder: built beside its final place, published by one rename, never seen half-written.

While a merge runs, `.NAME.hfmerge-lock` is held by `flock` (the kernel drops it with the process, even after SIGKILL),
the files grow in `.NAME.hfmerge-partial`, and `.NAME.hfmerge-journal` notes what is finished. If a killed
run did the same work, the next run on the same folder continues it; otherwise the next run deletes its files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hfmerge.engine.journal import begin, work_in
from hfmerge.errors import LostProcessError, OutputError
from hfmerge.validation.wording import parameter


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Workspace:
    """A folder to fill, its journal's folder, and its final place; the last two are None for a temporary folder."""

    folder: Path
    journal: Path | None
    output: Path | None


@contextlib.contextmanager
def workspace(
    output: Path, *, needed: int, replace: bool, work: Mapping[str, str], resume: bool | None = None
) -> Iterator[Workspace]:
    """Yield a folder to fill: empty, or as a killed run of the same work left it. On success it becomes `output`.

    On an error the folder is removed. If the error is that another process of the run is gone, the folder is kept, as
    after a kill.

    Args:
        output: final folder.
        needed: bytes that will be written; compared with the free space first.
        replace: `output` may exist and is then replaced whole; otherwise it must not exist or be empty.
        work: what will be done, part by part (see `fingerprint.work_of`).
        resume: go on from a killed run. None: if there is one of the same work; True: there has to be one; False: no.

    Raises:
        OutputError: not empty, in use by another merge, no space, no permission, nothing to resume.
    """
    output = Path(output).absolute()
    _check_own(output, links=True)
    if output.is_symlink() or output.name in ("", ".."):
        output = output.resolve()
    check_output(output, replace=True)
    partial, old, journal = (_beside(output, part) for part in ("partial", "old", "journal"))
    with _locked(output):
        for folder in (partial, old, journal):
            _check_own(folder)
        _recover(output, old)
        if not partial.is_dir():
            _remove(journal)
        check_output(output, replace=replace)
        left = work_in(journal)
        if resume and left != work:
            raise OutputError(_not_resumable(output, left, work))
        going_on = left == work and resume is not False
        if not going_on:
            _remove(journal, partial)
        free = shutil.disk_usage(output.parent).free + _allocated(journal, partial)
        if free < needed:
            raise OutputError(
                f"{output}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room or choose "
                "another disk."
            )
        keep = False
        try:
            with full_disk(output):
                if not going_on:
                    partial.mkdir()
                    begin(journal, work)
                yield Workspace(partial, journal, output)
            _publish(partial, output, old)
        except LostProcessError:
            keep = True
            raise
        finally:
            if not keep:
                _remove(journal, partial)


def check_output(output: Path, *, replace: bool) -> None:
    """Whether a result may become this folder.

    Args:
        replace: what is in the folder may be replaced.

    Raises:
        OutputError: a file, a folder with something in it, or a folder that this user cannot make.
    """
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; choose a folder for {parameter('output')}.")
    if not replace and output.exists() and any(output.iterdir()):
        _forget_finished(output)
        raise OutputError(f"{output}: the folder is not empty; empty it, or choose another {parameter('output')}.")
    above = next(folder for folder in output.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "no right to write" if above.is_dir() else "not a folder"
        raise OutputError(f"{output}: cannot write there: {above}: {why}; choose another {parameter('output')}.")


def _forget_finished(output: Path) -> None:
    """Delete the journal of a run that was killed after its result had come into place."""
    partial, journal = _beside(output, "partial"), _beside(output, "journal")
    if journal.is_dir() and not partial.is_dir():
        with _locked(output):
            _check_own(journal)
            _remove(journal)


def _not_resumable(output: Path, left: Mapping[str, str] | None, work: Mapping[str, str]) -> str:
    if left is None:
        return f"{output}: no interrupted run to resume there; leave out {parameter('resume', True)}."
    other = ", ".join(name for name in work if left.get(name) != work[name])
    return (
        f"{output}: the interrupted run there was other work (what differs: {other}); repeat that work, or leave "
        f"out {parameter('resume', True)} to start anew."
    )


def _remove(*folders: Path) -> None:
    # the journal goes first: without it the files are nobody's
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _allocated(*folders: Path) -> int:
    """Bytes of disk that an earlier run's files hold already."""
    return sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def full_disk(output: Path) -> Iterator[None]:
    """Re-raise a full disk, met at whatever file, as one line that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OutputError(
            f"{output}: cannot be written: {error.strerror}; free some space or choose another {parameter('output')}."
        ) from error


def recover(output: str | Path) -> None:
    """Put back a folder that a run killed at the very moment of replacing it left under its hidden name.

    Raises:
        OutputError: a merge is replacing it just now.
    """
    output = Path(output).expanduser()
    old = _beside(output, "old")
    if old.is_dir() and not output.exists():
        with _locked(output):
            _check_own(old)
            _recover(output, old)


def leftovers(output: Path) -> list[str]:
    """Names of files and folders that killed runs left beside a folder. They may hold models that the merge lost.

    The working folders of a running merge are not listed.
    """
    output = Path(output).absolute()
    left = [path.name for path in (_beside(output, part) for part in ("old", "partial", "journal")) if path.exists()]
    return [] if left and _at_work(_beside(output, "lock")) else left


def _at_work(lock: Path) -> bool:
    """Whether a process holds a lock."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def clear(output: Path) -> None:
    """Remove what killed runs left beside a folder that is complete.

    Raises:
        OutputError: a merge is at work there, something cannot be removed, or is a link or another user's.
    """
    output = Path(output).absolute()
    partial, old, journal = (_beside(output, part) for part in ("partial", "old", "journal"))
    with _locked(output):
        for folder in (partial, old, journal):
            _check_own(folder)
        _recover(output, old)
        _remove(journal, partial)
    if left := leftovers(output):
        raise OutputError(f"{output.parent / left[0]}: cannot be removed; delete it.")


def _beside(output: Path, part: str) -> Path:
    return output.parent / f".{output.name}.hfmerge-{part}"


def _check_own(path: Path, *, links: bool = False) -> None:
    """Check that this user, or the folder's owner, made the file or folder at a name that hfmerge writes to.

    Other users may write to some folders, such as `/tmp`. A link of theirs would lead the output into another folder,
    and a folder of theirs would be taken for the work of a killed run.

    Args:
        links: a link of theirs is allowed too; hfmerge itself makes none.

    Raises:
        OutputError: it is somebody else's, or a link.
    """
    try:
        found = path.lstat()
    except OSError:
        return  # there is nothing, or the write reports the fault
    if stat.S_ISLNK(found.st_mode) and not links:
        raise OutputError(f"{path}: is a link to {os.readlink(path)}, which hfmerge never makes there; remove it.")
    if found.st_uid not in (os.geteuid(), path.parent.stat().st_uid):
        raise OutputError(f"{path}: belongs to another user; remove it, or choose another {parameter('output')}.")


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the folder's lock. Its file is removed in the end, so a lock on a file that is gone counts for nothing."""
    lock = _beside(output, "lock")
    _check_own(lock)
    made = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise OutputError(f"{output}: cannot write there: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(handle), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            raise OutputError(
                f"{output}: cannot be locked: {error.strerror}; choose a folder on a local disk."
            ) from error
        if not held:
            raise OutputError(f"{output}: another merge is writing this folder; wait for it, or choose another.")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # the folder is not empty, so the merge is in it
            for folder in made:
                folder.rmdir()


def _recover(output: Path, old: Path) -> None:
    """Finish what a run killed between the two renames of `_publish` left undone."""
    if old.exists():
        if output.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, output)


def _publish(partial: Path, output: Path, old: Path) -> None:
    try:
        _sync_folder(partial)
        if output.exists():
            os.rename(output, old)
        os.rename(partial, output)
        _sync_folder(output.parent)
    except OSError as error:
        _recover(output, old)
        raise OutputError(f"{output}: cannot be put in place: {error.strerror}.") from error
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
