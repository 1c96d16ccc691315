"""The memory and the threads that all streamed files of a run share, and the rules for loading and dropping blocks."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from hfmerge.hub.progress_bar import progress_bar


_T = TypeVar("_T")
SMALL, LARGE = 1 << 20, 8 << 20
"""Bytes: tensors below the first share a block, no block or request is longer than the second."""
MEMORY = 256 << 20
"""Bytes that blocks of all files may hold unless a run says otherwise."""
REQUESTS = 8
"""Requests under way at once."""


class Holder(Protocol):
    """The interface of a file to the store. All three members are used with the store's lock held."""

    @property
    def waiting(self) -> int:
        """Bytes held only to be hashed when those before them have come."""

    def drop(self, block: int) -> None:
        """Let go of a block."""

    def relieve(self) -> None:
        """Reduce the bytes that wait to be hashed."""


class BlockStore:
    """Bookkeeping of blocks in memory; the files hold the blocks themselves.

    Attributes:
        lock: guards the bookkeeping of the store and of the files; it is held only briefly.
        memory: bytes that blocks may hold. Only requests under way can exceed it.
        sources: how many models share it.
        readers: places of one file that are read side by side.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory = MEMORY
        self.sources = self.readers = 1
        self._files: list[Holder] = []
        self._pool: ThreadPoolExecutor | None = None
        # blocks on their way or not read yet, and blocks that were read, least recently read first
        self._fresh: dict[tuple[int, int], int] = {}
        self._used: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._unread = self._held = 0
        self._bar: Any = None

    @property
    def unit(self) -> int:
        """Bytes of the longest request: short where many models and readers share the memory.

        Half of the memory has to hold, twice over, the block that each reader is at in each model.
        """
        return max(SMALL, min(LARGE, self.memory // (4 * self.sources * self.readers)))

    @property
    def ahead(self) -> int:
        """Bytes that one file is read ahead."""
        return max(self.unit, self.memory // (2 * self.sources))

    @property
    def room(self) -> bool:
        """Whether more may be read ahead. `lock` is held."""
        return 2 * self._unread < self.memory

    def join(self, file: Holder) -> int:
        """A file's number."""
        with self.lock:
            self._files.append(file)
            return len(self._files) - 1

    def show(self, total: int) -> None:
        """Begin a progress bar over so many bytes."""
        self._bar = progress_bar(total, "Streaming", "B", scaled=True)

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Run on a thread of the pool. `lock` is held."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(REQUESTS, "hfmerge-stream")
        return self._pool.submit(work)

    def coming(self, file: int, block: int, size: int) -> None:
        """A block is on its way. `lock` is held."""
        self._fresh[file, block] = size
        self._unread += size
        self._held += size

    def lost(self, file: int, block: int) -> None:
        """A block did not arrive. `lock` is held."""
        size = self._fresh.pop((file, block), 0)
        self._unread -= size
        self._held -= size

    def read(self, file: int, block: int) -> None:
        """A block was read, or will not be. `lock` is held."""
        key = (file, block)
        if key in self._fresh:
            self._used[key] = self._fresh.pop(key)
            self._unread -= self._used[key]
        elif key in self._used:
            self._used.move_to_end(key)

    def arrived(self, count: int) -> None:
        """So many bytes came: make room for them, first among blocks that were read, then among those to be hashed."""
        with self.lock:
            if self._bar is not None:
                self._bar.update(count)
            waiting = sum(file.waiting for file in self._files)
            while self._used and self._held + waiting > self.memory:
                (number, block), size = self._used.popitem(last=False)
                self._held -= size
                self._files[number].drop(block)
            if self._held + waiting > self.memory and waiting:
                max(self._files, key=lambda file: file.waiting).relieve()

    def close(self) -> None:
        """End the threads and let go of all blocks."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._bar is not None:
            self._bar.close()
        with self.lock:
            for number, block in (*self._fresh, *self._used):
                self._files[number].drop(block)
            self._fresh.clear()
            self._used.clear()
            self._unread = self._held = 0


def block_bounds(start: int, spans: Sequence[tuple[int, int]], unit: int) -> list[int]:
    """Bounds of blocks: small tensors together, larger ones by themselves, those beyond `unit` in equal parts.

    Args:
        start: where the first tensor begins.
        spans: first byte and length of each tensor, in order and without gaps.
        unit: bytes of the longest block.
    """
    bounds, stop = [start], start
    for first, length in spans:
        stop = first + length
        if length >= SMALL:
            if first > bounds[-1]:
                bounds.append(first)
            parts = -(-length // unit)
            bounds.extend(first + length * part // parts for part in range(1, parts + 1))
        elif stop - bounds[-1] >= SMALL:
            bounds.append(stop)
    return bounds if stop == bounds[-1] else [*bounds, stop]


def block_at(bounds: Sequence[int], byte: int) -> int:
    """Index of the block that holds a byte."""
    return bisect_right(bounds, byte) - 1


def adjacent(blocks: Sequence[int], bounds: Sequence[int], unit: int) -> list[tuple[int, int]]:
    """Adjacent blocks put together, up to `unit` bytes: first, and the one after the last."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block and bounds[block + 1] - bounds[runs[-1][0]] <= unit:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
