"""Digests of sources: of every file that a merge depends on, computed beside other work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from hfmerge.digest import canonical_json, sha256_bytes, sha256_file
from hfmerge.errors import CorruptFileError
from hfmerge.fetching import cached, fetch
from hfmerge.source import Source, weight_files
from hfmerge.stamps import remembered_digest


def folder_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 that stands for a folder: of the canonical JSON of its files' digests."""
    return sha256_bytes(canonical_json(dict(files)))


def digests(
    source: Source, progress: Callable[[int], object] | None = None, *, remembered: bool = False
) -> dict[str, str]:
    """SHA-256 of `weight_files`, read from this machine, and compared with what the Hub recorded for them.

    A streamed file is not here to be read: what the Hub recorded for it stands, and is checked while it is streamed.

    Args:
        source: whose files.
        progress: see `sha256_file`.
        remembered: files that have not changed since they were hashed are not read again (see `stamps`).

    Raises:
        CorruptFileError: a file cannot be read, or differs from its LFS digest.
    """
    result = {}
    for file in weight_files(source):
        recorded = source.pinned.files[file].sha256
        if file in source.streams:
            assert recorded is not None
            result[file] = recorded
            continue
        path = fetch(source.pinned, file)
        try:
            result[file] = (remembered_digest if remembered else sha256_file)(path, progress)
        except OSError as error:
            raise CorruptFileError(f"{source.pinned.label}: {file} cannot be read: {error.strerror}.") from error
        if recorded is not None and recorded != result[file]:
            raise CorruptFileError(
                f"{source.pinned.label}: {file} differs from the Hub's digest ({recorded[:12]}...); delete "
                f"{os.path.realpath(path)} and run again."
            )
    return result


class Digester:
    """Digests of sources, computed on one thread while other work goes on; leaving the `with` block stops it.

    A source is known by its object: ask with the one that `start` got.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hfmerge-digest")
        self._futures: dict[int, tuple[Source, Future[dict[str, str]]]] = {}
        self._stopped = False

    def __enter__(self) -> Digester:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, source: Source) -> None:
        """Begin with a source if all its files are on this machine already; otherwise `result` does it later."""
        places = [place for place in (source, source.beneath) if place is not None]
        here = all(cached(place.pinned, file) is not None for place in places for file in weight_files(place))
        if here and id(source) not in self._futures:
            self._futures[id(source)] = (source, self._pool.submit(self._digests, source))

    def result(self, source: Source) -> Future[dict[str, str]]:
        """Digests of a source's files, those of the model beneath an adapter marked `+`; begun if they were not."""
        if id(source) not in self._futures:
            self._futures[id(source)] = (source, self._pool.submit(self._digests, source))
        return self._futures[id(source)][1]

    def _digests(self, source: Source) -> dict[str, str]:
        found = digests(source, self._tick, remembered=True)
        if source.beneath is not None:
            beneath = digests(source.beneath, self._tick, remembered=True)
            found |= {f"+{name}": value for name, value in beneath.items()}
        return found

    def _tick(self, count: int) -> None:
        if self._stopped:
            raise CancelledError
