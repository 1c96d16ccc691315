"""One weight file on the Hub, read as a merge needs it and never stored.

The file is cut into blocks along its tensors. What a reader asks for is fetched, adjacent blocks in one request, and
what the announced order says comes next is fetched ahead. Every block passes through the file's digest on its way.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from itertools import accumulate

from hfmerge.checkpoint.headers import Header
from hfmerge.checkpoint.streaming.blocks import BlockStore, adjacent, block_at, block_bounds
from hfmerge.checkpoint.streaming.ordered_hash import OrderedDigest
from hfmerge.errors import CorruptFileError
from hfmerge.hub.ranges import RangedFile


COMPLETION_LIMITS = (32 << 20, 50)
"""For its digest alone a file may be completed by so many bytes, or by this fraction of it, whichever is more."""
_Blocks = dict[int, memoryview]


class RemoteFile:
    """Safe to read from several threads.

    Args:
        ranged: the file.
        header, head: its header, parsed and as it is.
        sha256: what the Hub lists for it.

    Attributes:
        unchecked: why its digest will not be checked, if that is known before the first read.
    """

    def __init__(self, store: BlockStore, ranged: RangedFile, header: Header, head: bytes, sha256: str):
        self.header, self.unchecked = header, ""
        self._store, self._lock, self._ranged = store, store.lock, ranged
        self._head, self._sha256 = head, sha256
        self._number = store.join(self)
        self._bounds: list[int] = []
        self._digest: OrderedDigest | None = None
        self._held: _Blocks = {}
        self._coming: dict[int, Future[_Blocks]] = {}
        self._times: list[int] = []
        self._read = bytearray()
        self._spent = 0
        self._completing = False
        # what was announced: blocks in order, the place of each, bytes before each place, what was asked for already
        self._order: list[int] = []
        self._place: dict[int, int] = {}
        self._reach: list[int] = [0]
        self._asked = bytearray()
        self._mark = 0

    def expect(self, keys: Iterable[str]) -> None:
        """Announce which tensors are read in the coming pass, in their order."""
        with self._lock:
            bounds, order = self._table(), dict[int, None]()
            for key in keys:
                entry, start = self.header.entries[key], self.header.offsets[key]
                if entry.nbytes:
                    order.update(
                        dict.fromkeys(range(block_at(bounds, start), block_at(bounds, start + entry.nbytes - 1) + 1))
                    )
            for block in self._held:
                self._store.read(self._number, block)  # blocks that were read ahead and not used may be dropped
            self._order, self._mark = list(order), 0
            self._place = {block: place for place, block in enumerate(self._order)}
            self._reach = [0, *accumulate(self._length(block) for block in self._order)]
            self._asked = bytearray(len(bounds) - 1)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `start` on.

        Raises:
            SourceError: the Hub does not give them, or gives others than it lists.
        """
        with self._lock:
            bounds = self._table()
        at, stop = start, start + len(view)
        while at < stop:
            i = block_at(bounds, at)
            upto = min(stop, bounds[i + 1])
            view[at - start : upto - start] = self._block(i)[at - bounds[i] : upto - bounds[i]]
            at = upto

    def _block(self, i: int) -> memoryview:
        with self._lock:
            if self._digest is not None and self._digest.wrong:
                raise self._corrupt()
            data = self._held.get(i)
            coming = None if data is not None else self._coming.get(i) or self._request(i)
            self._look_ahead(i)
        if coming is not None:
            data = coming.result()[i]
        assert data is not None
        with self._lock:
            assert self._digest is not None
            self._read[i] = 1
            self._store.read(self._number, i)
            due = i == self._digest.next
            self._digest.add(i, data)
        if due:
            self._digest.advance()
        return data

    def _request(self, i: int) -> Future[_Blocks]:
        """Begin to fetch a block, and with it those that follow it both in the file and in what was announced."""
        last, place = i + 1, self._place.get(i)
        while (
            place is not None
            and last < len(self._bounds) - 1
            and self._place.get(last) == place + last - i
            and not self._asked[last]
            and not self._here(last)
            and self._bounds[last + 1] - self._bounds[i] <= self._store.unit
        ):
            last += 1
        return self._submit(i, last)

    def _submit(self, first: int, last: int) -> Future[_Blocks]:
        future = self._store.submit(partial(self._receive, first, last))
        for block in range(first, last):
            self._coming[block] = future
            self._asked[block] = 1
            self._store.coming(self._number, block, self._length(block))
        return future

    def _look_ahead(self, i: int) -> None:
        place = self._place.get(i)
        if place is None:
            return
        self._asked[i] = 1
        while self._mark < len(self._order) and self._reach[self._mark] < self._reach[place] + self._store.ahead:
            block = self._order[self._mark]
            if not self._asked[block] and not self._here(block):
                if not self._store.room:
                    return
                self._request(block)
            self._mark += 1

    def _receive(self, first: int, last: int) -> _Blocks:
        """Fetch some blocks; on a thread of the pool."""
        try:
            data = memoryview(self._ranged.read(self._bounds[first], self._bounds[last]))
        except BaseException:  # whoever waits for these blocks is told that they do not come
            with self._lock:
                for block in range(first, last):
                    del self._coming[block]
                    self._store.lost(self._number, block)
            raise
        parts, origin = {first: data}, self._bounds[first]
        if last > first + 1:
            # each in memory of its own, which goes with it
            cuts = [(b, self._bounds[b] - origin, self._bounds[b + 1] - origin) for b in range(first, last)]
            parts = {block: memoryview(bytes(data[start:stop])) for block, start, stop in cuts}
        with self._lock:
            assert self._digest is not None
            for block, part in parts.items():
                del self._coming[block]
                self._held[block] = part
                self._times[block] += 1
                self._digest.add(block, part)
                if block not in self._place:
                    self._store.read(self._number, block)  # counts as read: nobody will read it
            behind = self._digest.waiting > self._store.memory // 4
        # a digest that is slower than the network holds it up
        (self._digest.settle if behind else self._digest.advance)()
        self._store.arrived(len(data))
        return parts

    def _here(self, block: int) -> bool:
        return block in self._held or block in self._coming

    def drop(self, block: int) -> None:
        """Let go of a block. The lock is held."""
        self._held.pop(block, None)

    @property
    def waiting(self) -> int:
        """Bytes held only until those before them have come. The lock is held."""
        return self._digest.waiting if self._digest is not None else 0

    def relieve(self) -> None:
        """Too much waits to be hashed: fetch what is missing before it, or let it go. The lock is held.

        A later pass may read the file in order from there on.
        """
        assert self._digest is not None
        if self._completing or not self._digest.gap:
            return
        gap = [block for block in self._digest.gap if block not in self._coming]
        if self._digest.waiting > self._store.memory or not self._spend(sum(map(self._length, gap))):
            self._digest.stall()
        else:
            for run in adjacent(gap, self._bounds, self._store.unit):
                self._submit(*run)

    def _spend(self, count: int) -> bool:
        """Whether so many more bytes may be fetched for the digest alone."""
        if self._spent + count > max(COMPLETION_LIMITS[0], self._ranged.size // COMPLETION_LIMITS[1]):
            return False
        self._spent += count
        return True

    def complete(self) -> None:
        """After the last tensor: hash the file to its end, if a part of it was read and little is missing.

        Raises:
            CorruptFileError: the file has another digest than the Hub lists.
        """
        if not self.used:
            return
        with self._lock:
            bounds = self._table()
            assert self._digest is not None
            self._completing = True
            self._digest.resume()
            for block, data in self._held.items():
                self._digest.add(block, data)
            missing = [b for b in range(len(bounds) - 1) if not self._digest.has(b) and b not in self._coming]
            futures = list(dict.fromkeys(self._coming.values()))
            if self._digest.given_up is None and not self._spend(sum(self._length(block) for block in missing)):
                unread = sum(self._length(block) for block in missing if not self._times[block])
                self._digest.give_up(
                    f"the merge did not read {unread} of its {self._ranged.size} bytes"
                    if unread
                    else "it was read in another order than it is stored in, and memory to hash it ran out"
                )
            runs = adjacent(missing, bounds, self._store.unit) if self._digest.given_up is None else []
        for future in futures:
            future.result()
        for run in runs:
            with self._lock:
                future = self._submit(*run)
            future.result()
        self._digest.settle()
        if self._digest.wrong:
            raise self._corrupt()

    def _corrupt(self) -> CorruptFileError:
        return CorruptFileError(
            f"{self._ranged.where}: the bytes received are not those the Hub lists ({self._sha256[:12]}...); run "
            "again, and if it happens again, look for what changes them on their way."
        )

    def _length(self, block: int) -> int:
        return self._bounds[block + 1] - self._bounds[block]

    def _table(self) -> list[int]:
        """Where blocks begin, and the end of the file. The lock is held."""
        if not self._bounds:
            spans = [(self.header.offsets[key], entry.nbytes) for key, entry in self.header.entries.items()]
            self._bounds = block_bounds(self.header.end, sorted(spans), self._store.unit)
            count = len(self._bounds) - 1
            self._times, self._read, self._asked = [0] * count, bytearray(count), bytearray(count)
            self._digest = OrderedDigest(self._head, count, self._sha256, self._lock)
            if self.unchecked:
                self._digest.give_up(self.unchecked)
        return self._bounds

    @property
    def name(self) -> str:
        """`org/name@0123abcd: model.safetensors`."""
        return self._ranged.where

    @property
    def used(self) -> bool:
        """Whether any tensor of it was read."""
        return any(self._read)

    @property
    def again(self) -> int:
        """Bytes received more than once."""
        return sum((times - 1) * self._length(block) for block, times in enumerate(self._times) if times > 1)

    @property
    def taken(self) -> int:
        """Bytes of blocks that readers asked for, each counted once, and of the header."""
        return self.header.end + sum(self._length(block) for block, read in enumerate(self._read) if read)

    @property
    def unverified(self) -> str | None:
        """Why the digest was not checked; None if it was."""
        if self._digest is not None and self._digest.verified:
            return None
        return (self._digest.given_up if self._digest is not None else None) or "it was not read to its end"
