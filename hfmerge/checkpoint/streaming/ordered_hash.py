"""SHA-256 of a file whose blocks arrive in any order: blocks wait, in memory, for those before them."""

from __future__ import annotations

import hashlib
import threading


class OrderedDigest:
    """Hashes blocks in the file's order. Methods that say so are called with `lock` held.

    Args:
        head: the file's first bytes, before block 0.
        count: number of blocks.
        sha256: what the whole file should have.
        lock: shared with the owner's bookkeeping; never held while hashing.

    Attributes:
        next: the block that is hashed next.
        waiting: bytes held for later.
        given_up: why the file is not hashed to its end; None while it may be.
    """

    def __init__(self, head: bytes, count: int, sha256: str, lock: threading.Lock):
        self.next = 0
        self.waiting = 0
        self.given_up: str | None = None
        self._count, self._sha256, self._lock = count, sha256, lock
        self._digest = hashlib.sha256(head)
        self._pending: dict[int, memoryview] = {}
        self._busy = self._stalled = False
        self._idle = threading.Condition(lock)
        self._found: str | None = None

    @property
    def gap(self) -> range:
        """The blocks that are missing before the first that waits. `lock` is held."""
        return range(self.next, min(self._pending, default=self.next))

    def add(self, block: int, data: memoryview) -> None:
        """Take a block that arrived; a block that arrived before is ignored. `lock` is held."""
        if self.given_up is not None or block < self.next or block in self._pending:
            return
        if not self._stalled or block == self.next:
            self._pending[block] = data
            self.waiting += len(data)
            self._stalled = False

    def has(self, block: int) -> bool:
        """Whether a block is hashed, or waits to be. `lock` is held."""
        return block < self.next or block in self._pending

    def stall(self) -> None:
        """Drop all waiting blocks, and accept no more until the next block in order comes. `lock` is held."""
        self._pending.clear()
        self._stalled, self.waiting = True, 0

    def resume(self) -> None:
        """Take blocks again whatever their turn. `lock` is held."""
        self._stalled = False

    def give_up(self, why: str) -> None:
        """Hash no more. `lock` is held."""
        if self._found is None:
            self.given_up = why
            self.stall()

    def advance(self) -> None:
        """Hash the blocks that are next in order, unless another thread does so and takes these too."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                data = self._pending.pop(self.next, None)
                if data is None:
                    self._busy = False
                    if self.next == self._count and self._found is None:
                        self._found = self._digest.hexdigest()
                    self._idle.notify_all()
                    return
                self.next += 1
                self.waiting -= len(data)
            self._digest.update(data)

    def settle(self) -> None:
        """Hash all blocks whose turn it is, and wait for a thread that is at it."""
        self.advance()
        with self._lock:
            while self._busy:
                self._idle.wait()

    @property
    def verified(self) -> bool:
        """True when the whole file was hashed and is what it should be."""
        return self._found == self._sha256

    @property
    def wrong(self) -> bool:
        """True when the whole file was hashed and is something else."""
        return self._found is not None and self._found != self._sha256
