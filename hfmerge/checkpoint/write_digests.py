"""Digests of files while they are filled: a thread follows the tensors in the order they lie, and flushes them.

So little is left to hash and to flush at the end of a run, where both would take noticeable time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from hfmerge.checkpoint.writer import SafetensorsWriter, disk_errors
from hfmerge.errors import OutputError


_CHUNK = 1 << 22
FLUSH = 1 << 26
"""Bytes that are flushed at a time."""
_PATIENCE = 0.2
"""Seconds between looks at whether the run has failed."""


class Trail:
    """The digests of some files that this process alone fills; leaving the `with` block ends the thread."""

    def __init__(self, writers: Mapping[str, SafetensorsWriter]):
        self._writers = dict(writers)
        self._pool = ThreadPoolExecutor(1, "hfmerge-trail")
        self._stopped = False
        self._found: Future[dict[str, str]] | None = None

    def __enter__(self) -> Trail:
        self._found = self._pool.submit(lambda: {name: self._follow(w) for name, w in sorted(self._writers.items())})
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file; all of them must have been written.

        Raises:
            OutputError: a file cannot be read back or flushed.
        """
        assert self._found is not None
        return self._found.result()

    def _follow(self, writer: SafetensorsWriter) -> str:
        digest = hashlib.sha256()
        with disk_errors(writer.path), open(writer.path, "rb", buffering=0) as file:
            at = flushed = 0
            for name, end in writer.order():
                while not writer.wait_for(name, _PATIENCE):
                    if self._stopped:
                        raise CancelledError
                while at < end:
                    data = file.read(min(_CHUNK, end - at))
                    if not data or self._stopped:
                        raise CancelledError if self._stopped else OutputError(f"{writer.path}: cannot be read back.")
                    digest.update(data)
                    at += len(data)
                    if at - flushed >= FLUSH:
                        os.fsync(file.fileno())
                        flushed = at
            # a file without tensors is its header
            digest.update(file.read())
        return digest.hexdigest()
