"""Digests of sources: of every file that a merge depends on, computed beside other work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE

from hfmerge import hashing
from hfmerge.checkpoint.model import Model, weight_files
from hfmerge.digest_cache import remembered_digest
from hfmerge.errors import CorruptFileError
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hub.download import cached, fetch


LARGE = 1 << 27
"""Bytes of a file that is hashed in a process of its own."""


def folder_digest(files: Mapping[str, str]) -> str:
    """Digest of a folder: SHA-256 of the canonical JSON of its files' digests."""
    return sha256_bytes(canonical_json(dict(files)))


def digests(source: Model, hasher: Callable[[Path], str] = sha256_file) -> dict[str, str]:
    """SHA-256 of `weight_files`, read from this machine, and compared with what the Hub recorded for them.

    A streamed file is not here to be read: what the Hub recorded for it stands, and is checked while it is streamed.

    Args:
        source: whose files.
        hasher: gives the SHA-256 of the file at a path.

    Raises:
        CorruptFileError: a file cannot be read, or differs from its LFS digest.
    """
    result = {}
    for file in weight_files(source):
        recorded = source.snapshot.files[file].sha256
        if file in source.streams:
            assert recorded is not None
            result[file] = recorded
            continue
        path = fetch(source.snapshot, file)
        try:
            result[file] = hasher(path)
        except OSError as error:
            raise CorruptFileError(f"{source.snapshot.label}: {file} cannot be read: {error.strerror}.") from error
        if recorded is not None and recorded != result[file]:
            raise CorruptFileError(
                f"{source.snapshot.label}: {file} differs from the Hub's digest ({recorded[:12]}...); delete "
                f"{os.path.realpath(path)} and run again."
            )
    return result


def with_beside(source: Model, recorded: Iterable[str]) -> Model:
    """A source with those of a material's recorded files that a method read beside the weights."""
    known = {*weight_files(source)}
    return replace(
        source, beside={name: {} for name in recorded if name in source.snapshot.files and name not in known}
    )


class Digester:
    """Digests of sources, computed on one thread while other work goes on; leaving the `with` block stops it.

    A source is known by its object: ask with the one that `start` got.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hfmerge-digest")
        self._apart = Apart()
        self._futures: dict[int, tuple[Model, Future[dict[str, str]]]] = {}

    def __enter__(self) -> Digester:
        return self

    def __exit__(self, *exc: object) -> None:
        self._apart.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, source: Model) -> None:
        """Begin with a source if all its files are on this machine already; otherwise `result` does it later."""
        places = [place for place in (source, source.beneath) if place is not None]
        here = all(cached(place.snapshot, file) is not None for place in places for file in weight_files(place))
        if here and id(source) not in self._futures:
            self._futures[id(source)] = (source, self._pool.submit(self._digests, source))

    def result(self, source: Model) -> Future[dict[str, str]]:
        """Digests of a source's files, those of the model beneath an adapter marked `+`; begun if they were not."""
        if id(source) not in self._futures:
            self._futures[id(source)] = (source, self._pool.submit(self._digests, source))
        return self._futures[id(source)][1]

    def _digests(self, source: Model) -> dict[str, str]:
        # what has not changed since it was hashed is not read again
        hasher = partial(remembered_digest, hasher=self._apart.sha256)
        found = digests(source, hasher)
        if source.beneath is not None:
            found |= {f"+{name}": value for name, value in digests(source.beneath, hasher).items()}
        return found


class Apart:
    """Hashes large files in processes of their own, so that neither side waits for the other's interpreter.

    One thread calls `sha256`; `close` may come from another.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """What is being hashed is given up."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def sha256(self, path: str) -> str:
        """SHA-256 of a file.

        Raises:
            OSError: it cannot be read.
            CancelledError: `close` was called.
        """
        found = self._asked(path) if os.path.getsize(path) >= LARGE else None
        # an error of the other process shows again when this one reads the file
        return found or sha256_file(path, self._tick)

    def _asked(self, path: str) -> str | None:
        """The digest as `hashing.py` prints it; None if that process failed or could not be started."""
        if getattr(sys, "frozen", False) or not sys.executable:
            # a program that Python is built into would start itself
            return None
        # without site-packages and the user's settings it starts in a hundredth of a second
        call = [sys.executable, "-I", "-S", hashing.__file__, path]
        with self._lock:
            if self._closed:
                raise CancelledError
            try:
                self._process = subprocess.Popen(call, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, text=True)
            except OSError as error:
                logging.getLogger(__name__).info("hashing in this process: %s", error)
                return None
        said, _ = self._process.communicate()
        return said.strip() if self._process.returncode == 0 else None

    def _tick(self, count: int) -> None:
        if self._closed:
            raise CancelledError
