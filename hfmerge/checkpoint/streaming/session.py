"""The weight files that one run streams from the Hub: opened while planning, checked and counted at the run's end.

A plan only names these files. Planning opens them in a session. The run of the plan takes this session over, so that
no header is fetched twice. A plan that was read from JSON gets a new session.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hfmerge.checkpoint.headers import MET_AT_ONCE, Header, header_length, parse_header
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.streaming.blocks import BlockStore
from hfmerge.checkpoint.streaming.remote_file import RemoteFile
from hfmerge.hub.client import Patience
from hfmerge.hub.ranges import RangedFile, Traffic
from hfmerge.hub.reference import Snapshot


WAITING = 8
"""Sessions that wait for a run at most; the oldest goes first."""
Name = tuple[str, str | None, str]
"""Repository, commit and file."""


@dataclass(frozen=True)
class Unverified:
    """A streamed file whose digest was not checked: `org/name@0123abcd: model.safetensors`, and why not."""

    name: str
    why: str


@dataclass(frozen=True)
class Streamed:
    """Numbers on the streaming of a run, in bytes of file content.

    Attributes:
        received: all bytes received.
        again: bytes among these that had been received before.
        beyond: bytes among these that the merge did not need: the rest of a request, or of a file for its digest.
        requests: number of GET requests.
        failures: number of GET requests that failed and were repeated.
        verified: files that were read and compared with the digest that the Hub lists.
        unverified: files that were read, in part or whole, and could not be compared.
    """

    received: int
    again: int
    beyond: int
    requests: int
    failures: int
    verified: tuple[str, ...]
    unverified: tuple[Unverified, ...]


def total(parts: Sequence[Streamed]) -> Streamed:
    """The sum over several processes."""
    return Streamed(
        received=sum(part.received for part in parts),
        again=sum(part.again for part in parts),
        beyond=sum(part.beyond for part in parts),
        requests=sum(part.requests for part in parts),
        failures=sum(part.failures for part in parts),
        verified=tuple(dict.fromkeys(name for part in parts for name in part.verified)),
        unverified=tuple(dict.fromkeys(file for part in parts for file in part.unverified)),
    )


class Streaming:
    """All streamed files of one run, each known by its repository, commit and name."""

    def __init__(self, patience: Patience | None = None):
        self.store = BlockStore()
        self._traffic, self._patience = Traffic(), patience
        self._files: dict[Name, RemoteFile] = {}

    def open(self, snapshot: Snapshot, file: str) -> RemoteFile:
        """A file of a pinned repository, its header read; the one that is open already, if it is.

        Raises:
            SourceError: unreachable, refused, or no safetensors file.
        """
        name = (snapshot.name, snapshot.commit, file)
        if name in self._files:
            return self._files[name]
        sha256 = snapshot.files[file].sha256
        assert sha256 is not None
        ranged = ranged_file(snapshot, file, self._traffic, self._patience)
        header, head = remote_header(ranged, file)
        self._files[name] = RemoteFile(self.store, ranged, header, head, sha256)
        self.store.sources = len({(repository, commit) for repository, commit, _ in self._files})
        return self._files[name]

    @property
    def names(self) -> set[Name]:
        """The files that are open."""
        return set(self._files)

    def begin(self, memory: int, readers: int, total: int, *, unchecked: str = "", show: bool = True) -> None:
        """Before the first tensor is read.

        Args:
            memory: bytes that blocks may hold.
            readers: places of one file that are read side by side.
            total: bytes that will be read, for the progress bar.
            unchecked: why digests cannot be checked, if they cannot.
            show: draw a progress bar.
        """
        self.store.memory, self.store.readers = memory, readers
        for file in self._files.values():
            file.unchecked = unchecked
        if show and self._files:
            self.store.show(total)

    def finish(self) -> None:
        """After the last tensor: complete files of which little is missing, and check their digests.

        Raises:
            CorruptFileError: a file is not what the Hub lists.
        """
        for file in self._files.values():
            file.complete()

    def close(self) -> None:
        """End all requests and let go of the memory."""
        self._traffic.stopped.set()
        self.store.close()

    def report(self) -> Streamed:
        """The numbers so far."""
        files = self._files.values()
        used = [file for file in files if file.used]
        again, taken = sum(file.again for file in files), sum(file.taken for file in files)
        return Streamed(
            received=self._traffic.received,
            again=again,
            beyond=self._traffic.received - again - taken,
            requests=self._traffic.requests,
            failures=self._traffic.failures,
            verified=tuple(file.name for file in used if file.unverified is None),
            unverified=tuple(Unverified(file.name, file.unverified) for file in used if file.unverified is not None),
        )


_waiting: list[Streaming] = []
_guard = threading.Lock()


def leave_session(streaming: Streaming) -> None:
    """Leave a session for the run that continues with its open files."""
    with _guard:
        _waiting.append(streaming)
        late = _waiting[:-WAITING]
        del _waiting[:-WAITING]
    for one in late:
        one.close()


def take_session(sources: Iterable[Model]) -> Streaming:
    """The latest session left with exactly the files that these sources stream, or a new one; nobody else has it.

    Raises:
        SourceError: a file has to be opened and cannot be.
    """
    files = {(one.snapshot.name, one.snapshot.commit, file): one.snapshot for one in sources for file in one.streams}
    with _guard:
        for at in reversed(range(len(_waiting))):
            if _waiting[at].names == files.keys():
                return _waiting.pop(at)
    fresh = Streaming()
    for (_, _, file), snapshot in files.items():
        fresh.open(snapshot, file)
    return fresh


def streamed_name(snapshot: Snapshot, file: str) -> str:
    """What messages and `Streamed` call a file: `org/name@0123abcd: model.safetensors`."""
    return f"{snapshot.label}: {file}"


def ranged_file(snapshot: Snapshot, file: str, traffic: Traffic, patience: Patience | None = None) -> RangedFile:
    """A file of a pinned repository, to read ranges of."""
    from huggingface_hub import hf_hub_url

    info = snapshot.files[file]
    url = hf_hub_url(snapshot.repo_id, snapshot.path(file), revision=snapshot.commit)
    return RangedFile(streamed_name(snapshot, file), url, info.size, info.sha256, traffic, patience)


def remote_header(ranged: RangedFile, file: str) -> tuple[Header, bytes]:
    """Header of a safetensors file on the Hub, and its bytes.

    Raises:
        SourceError: unreachable, refused, or no safetensors file.
    """
    size, where = ranged.size, ranged.where
    head = bytes(ranged.read(0, min(size, MET_AT_ONCE)))
    end = header_length(head, size, where)
    if end > len(head):
        head += ranged.read(len(head), min(end, size))
    return parse_header(head, file, size, where), head[:end]
