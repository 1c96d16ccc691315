"""The content-addressed store: objects named by their sha256, complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO


# The Hub takes files of this size at most; a disk keeps some bytes free for everything else.
MOST_OBJECT = 50 << 30
_SPARE_BYTES = 256 << 20


class BlobStore:
    """Objects under `root/aa/bb/<sha256>`; what is being received lies in `temporary`, on the same file system."""

    def __init__(self, root: Path, temporary: Path):
        self.root = root
        self.temporary = temporary
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(parents=True, exist_ok=True)

    def path(self, oid: str) -> Path:
        """Where the object lies, or would lie."""
        return self.root / oid[:2] / oid[2:4] / oid

    def size(self, oid: str) -> int | None:
        """Bytes of the object, None if it is not here."""
        try:
            return self.path(oid).stat().st_size
        except FileNotFoundError:
            return None

    def require_room(self, size: int) -> None:
        """Refuse an object by its announced size, before any of it is written.

        Raises:
            ValueError: it is longer than any may be, or than the disk has room for.
        """
        room = max(0, shutil.disk_usage(self.temporary).free - _SPARE_BYTES)
        if size > min(MOST_OBJECT, room):
            raise ValueError(f"a file of {size} bytes; at most {min(MOST_OBJECT, room)} are taken")

    def receive(self) -> Incoming:
        """Begin to receive an object."""
        return Incoming(self)

    def put(self, path: Path, data: bytes) -> None:
        """Write a file of another folder of the same file system: whole, or not at all."""
        handle, temporary = tempfile.mkstemp(dir=self.temporary)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:  # a full disk, above all
            os.unlink(temporary)
            raise

    def scratch(self) -> IO[bytes]:
        """A file without a name: whatever ends its use, nothing is left of it."""
        return tempfile.TemporaryFile(dir=self.temporary)

    def all(self) -> Iterator[str]:
        """The names of all objects."""
        for path in self.root.glob("*/*/*"):
            yield path.name

    def remove(self, oid: str) -> None:
        """Delete an object."""
        self.path(oid).unlink()

    def clear_stale(self, seconds: float) -> None:
        """Delete what was being received and has not grown for a while: parts of objects that nobody completes."""
        oldest = time.time() - seconds
        for path in self.temporary.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def clear_temporary(self) -> None:
        """Delete what was being received when a server ended."""
        shutil.rmtree(self.temporary)
        self.temporary.mkdir()


class Incoming:
    """One object on its way in: hashed while it is written aside, kept only if it is what was announced."""

    def __init__(self, store: BlobStore):
        self._store = store
        handle, name = tempfile.mkstemp(dir=store.temporary)
        self._file = os.fdopen(handle, "wb")
        self._name = Path(name)
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._name.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def digest(self) -> str:
        """The SHA-256 of what was written so far."""
        return self._hash.hexdigest()

    def keep(self, oid: str, size: int | None) -> None:
        """Move the object to its place.

        Raises:
            ValueError: the bytes have another sha256 or another length than announced.
        """
        if size is not None and size != self.size:
            raise ValueError(f"expected {size} bytes, received {self.size}")
        digest = self._hash.hexdigest()
        if digest != oid:
            raise ValueError(f"expected sha256 {oid}, received {digest}")
        self._file.flush()
        os.fsync(self._file.fileno())
        target = self._store.path(oid)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._name, target)
