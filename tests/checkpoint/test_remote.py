"""Streamed files without a network: blocks, requests, read-ahead, bounded memory, and the digest in any order."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hfmerge.checkpoint.streaming.blocks import LARGE, SMALL, BlockStore, block_bounds
from hfmerge.checkpoint.streaming.ordered_hash import OrderedDigest
from hfmerge.checkpoint.streaming.remote_file import COMPLETION_LIMITS, RemoteFile
from hfmerge.checkpoint.streaming.session import remote_header
from hfmerge.errors import CorruptFileError, OfflineError
from hfmerge.hub.ranges import RangedFile, Traffic


quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
MIB = 1 << 20


class Counted(RangedFile):
    """A file in memory that notes what is read of it."""

    def __init__(self, data: bytes, size: int | None = None):
        super().__init__(
            "org/m@0123abcd: model.safetensors", "http://127.0.0.1:9/", size or len(data), None, Traffic()
        )
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self.broken: int | None = None
        self._noting = threading.Lock()

    def read(self, start: int, stop: int) -> bytearray:
        with self._noting:
            self.reads.append((start, stop))
        if self.broken is not None and start <= self.broken < stop:
            raise OfflineError("the Hub is gone")
        return bytearray(self.data[start:stop])

    @property
    def fetched(self) -> int:
        return sum(stop - start for start, stop in self.reads)


@dataclass(frozen=True)
class Opened:
    """A streamed file, what it is read from, and the store it shares."""

    file: RemoteFile
    source: Counted
    store: BlockStore

    def tensor(self, key: str) -> bytes:
        """The bytes of a tensor, as a reader gets them."""
        entry = self.file.header.entries[key]
        view = memoryview(bytearray(entry.nbytes))
        self.file.read_into(self.file.header.offsets[key], view)
        return bytes(view)

    def right(self, key: str) -> bytes:
        """The bytes of a tensor as they should be."""
        start = self.file.header.offsets[key]
        return self.source.data[start : start + self.file.header.entries[key].nbytes]

    @property
    def keys(self) -> list[str]:
        """Names of the tensors in the file's order."""
        return sorted(self.file.header.offsets, key=lambda key: self.file.header.offsets[key])


@contextmanager
def opened(tensors: dict[str, torch.Tensor], memory: int = 256 * MIB, flip: int | None = None) -> Iterator[Opened]:
    data = save(tensors, {"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    if flip is not None:
        data = data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :]
    source = Counted(data)
    header, head = remote_header(source, "model.safetensors")
    source.reads.clear()
    store = BlockStore()
    store.memory = memory
    try:
        yield Opened(RemoteFile(store, source, header, head, sha256), source, store)
    finally:
        store.close()


def matrices(count: int, mib: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(count)
    return {f"layer.{i:03d}": torch.randint(0, 256, (mib, MIB), dtype=torch.uint8) for i in range(count)}


def layers(count: int) -> dict[str, torch.Tensor]:
    """As in a language model: large matrices, with small vectors in between."""
    torch.manual_seed(0)
    sizes = {"a.norm": 3_000, "b.up": 5 * MIB, "c.bias": 40, "d.down": 3 * MIB + 17, "e.gate": 200_000}
    return {
        f"{i:02d}.{name}": torch.randint(0, 256, (size,), dtype=torch.uint8)
        for i in range(count)
        for name, size in sizes.items()
    }


@pytest.mark.slow
@quick
@given(st.lists(st.integers(0, 3 * LARGE)), st.sampled_from([SMALL, 3 * SMALL, LARGE]))
def test_blocks_cover_a_file_along_its_tensors(lengths: list[int], unit: int) -> None:
    spans, at = [], 100
    for length in lengths:
        spans.append((at, length))
        at += length
    bounds = block_bounds(100, spans, unit)
    assert bounds[0] == 100 and bounds[-1] == at and bounds == sorted(set(bounds))
    assert all(stop - start <= max(unit, 2 * SMALL) for start, stop in zip(bounds, bounds[1:], strict=False))
    for start, length in spans:
        if length >= SMALL:
            assert start in bounds and start + length in bounds, "a large tensor shares no block"
    large = [(start, start + length) for start, length in spans if length >= SMALL]
    inside = [any(first <= start < last for first, last in large) for start in bounds[:-1]]
    small = [b - a for a, b, part in zip(bounds, bounds[1:], inside, strict=False) if not part and b - a < SMALL]
    assert len(small) <= 1 + len(large), "small ones share theirs"


@quick
@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_a_digest_of_blocks_in_any_order(order: Sequence[int], again: set[int]) -> None:
    lock = threading.Lock()
    parts = [random.Random(i).randbytes(i) for i in range(12)]
    right = hashlib.sha256(b"head" + b"".join(parts)).hexdigest()
    for wanted in (right, "0" * 64):
        digest = OrderedDigest(b"head", len(parts), wanted, lock)
        for i in [i for one in order for i in ([one, one] if one in again else [one])]:
            with lock:
                digest.add(i, memoryview(parts[i]))
            digest.advance()
        assert (digest.verified, digest.wrong) == (wanted == right, wanted != right)
        assert digest.waiting == 0


def test_a_stalled_digest_goes_on_where_it_was() -> None:
    lock = threading.Lock()
    parts = [bytes([i]) * 10 for i in range(6)]
    digest = OrderedDigest(b"", 6, hashlib.sha256(b"".join(parts)).hexdigest(), lock)
    for i in (0, 2, 3):
        digest.add(i, memoryview(parts[i]))
        digest.advance()
    digest.stall()
    digest.add(5, memoryview(parts[5]))
    assert digest.waiting == 0 and digest.next == 1
    for i in range(6):
        digest.add(i, memoryview(parts[i]))
        digest.advance()
    assert digest.verified


@pytest.mark.slow
def test_in_the_announced_order_every_byte_comes_once(capfd: pytest.CaptureFixture[str]) -> None:
    with opened(layers(6)) as one:
        one.file.expect(one.keys)
        for key in one.keys:
            assert one.tensor(key) == one.right(key)
        one.file.complete()
        assert one.file.unverified is None and one.file.again == 0
        assert one.source.fetched == len(one.source.data) - one.file.header.end
        assert len(one.source.reads) <= -(-len(one.source.data) // LARGE) + 6


@pytest.mark.slow
def test_thousands_of_small_tensors_come_in_few_requests() -> None:
    tensors = {f"expert.{i:05d}": torch.full((2000 + i % 900,), i % 251, dtype=torch.uint8) for i in range(8_000)}
    with opened(tensors) as one:
        one.file.expect(one.keys)
        assert all(one.tensor(key) == one.right(key) for key in one.keys)
        assert len(one.source.reads) == 3, "19 MB in requests of 8 MiB"
        one.file.complete()
        assert one.file.unverified is None


def test_without_an_announcement_only_what_is_asked_for_comes() -> None:
    with opened(matrices(6, 2)) as one:
        assert one.tensor("layer.003") == one.right("layer.003")
        assert one.source.reads == [
            (one.file.header.offsets["layer.003"], one.file.header.offsets["layer.003"] + 2 * MIB)
        ]


@pytest.mark.slow
def test_what_is_announced_is_read_ahead_and_nothing_else() -> None:
    with opened(matrices(12, 2), memory=16 * MIB) as one:
        wanted = ["layer.007", "layer.002", "layer.003", "layer.009"]
        one.file.expect(wanted)
        one.tensor("layer.007")
        for key in wanted[1:]:
            assert one.tensor(key) == one.right(key)
        assert one.source.fetched == 4 * 2 * MIB and len(one.source.reads) == 3, "neighbours come together"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_memory_stays_bounded_whatever_is_read(threads: int) -> None:
    """Four files of 24 MiB through 8 MiB, by several threads, in the announced order."""
    peak = 0
    tensors = matrices(12, 2)
    data = save(tensors, {"format": "pt"})
    store = BlockStore()
    store.memory, store.sources = 8 * MIB, 4
    files = []
    for _ in range(4):
        source = Counted(data)
        header, head = remote_header(source, "x")
        files.append(Opened(RemoteFile(store, source, header, head, hashlib.sha256(data).hexdigest()), source, store))
        files[-1].file.expect(files[-1].keys)

    def visit(key: str) -> None:
        nonlocal peak
        for one in files:
            assert one.tensor(key) == one.right(key)
            peak = max(peak, store._held)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(visit, files[0].keys))
    for one in files:
        one.file.complete()
        assert one.file.unverified is None
    store.close()
    in_flight = threads * 2 * MIB
    assert peak <= store.memory + 8 * MIB + in_flight
    again = sum(one.file.again for one in files)
    assert again == 0 if threads == 1 else again <= 8 * MIB


@pytest.mark.slow
def test_going_over_parameters_tile_by_tile_asks_once() -> None:
    """As a method does that surveys a parameter before it merges it: three readers, three files, three sweeps."""
    readers, tile = 3, 1 << 17
    data = save(matrices(9, 2), {"format": "pt"})
    store = BlockStore()
    store.sources, store.readers, store.memory = 3, readers, 2 * readers * 3 * 2 * MIB
    files = []
    for _ in range(3):
        source = Counted(data)
        header, head = remote_header(source, "x")
        files.append(RemoteFile(store, source, header, head, hashlib.sha256(data).hexdigest()))
        files[-1].expect(sorted(header.offsets))

    def visit(key: str) -> None:
        for _ in range(3):
            for at in range(0, 2 * MIB, tile):
                for file in files:
                    start = file.header.offsets[key] + at
                    view = memoryview(bytearray(tile))
                    file.read_into(start, view)
                    assert view == data[start : start + tile]

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(visit, sorted(files[0].header.offsets)))
    store.close()
    assert sum(file.again for file in files) <= 54 * MIB, "at worst every block twice, for 432 reads of each file"


@pytest.mark.slow
def test_a_second_pass_reads_again_and_says_so() -> None:
    with opened(matrices(12, 2), memory=4 * MIB) as one:
        for _ in range(2):
            one.file.expect(one.keys)
            for key in one.keys:
                assert one.tensor(key) == one.right(key)
        one.file.complete()
        assert one.file.unverified is None
        assert 0 < one.file.again == one.source.fetched - 24 * MIB
    with opened(matrices(12, 2)) as one:
        for _ in range(2):
            one.file.expect(one.keys)
            assert all(one.tensor(key) == one.right(key) for key in one.keys)
        assert one.file.again == 0, "what fits into memory is not read again"


def test_threads_share_requests() -> None:
    with opened(matrices(3, 4)) as one, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one.tensor, ["layer.001"] * 16))
        assert set(results) == {one.right("layer.001")}
        assert one.source.fetched == 4 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("read", [["layer.000"], ["layer.011", "layer.000"], ["layer.005"]])
def test_little_that_is_missing_is_fetched_for_the_digest(read: list[str]) -> None:
    with opened(matrices(12, 2)) as one:
        assert 24 * MIB <= COMPLETION_LIMITS[0]
        for key in read:
            one.tensor(key)
        one.file.complete()
        assert one.file.unverified is None
        assert one.source.fetched == len(one.source.data) - one.file.header.end
        assert one.file.taken == one.file.header.end + 2 * MIB * len(read)


def test_a_file_that_nothing_is_read_of_is_left_alone() -> None:
    with opened(matrices(3, 2)) as one:
        one.file.expect([])
        one.file.complete()
        assert not one.file.used and one.source.reads == []


def test_much_that_is_missing_is_not() -> None:
    with opened(matrices(20, 2)) as one:
        one.tensor("layer.000")
        one.file.complete()
        assert one.file.unverified is not None and str(38 * MIB) in one.file.unverified
        assert one.source.fetched == 2 * MIB


@pytest.mark.slow
def test_an_order_that_no_memory_can_mend_is_told() -> None:
    """Read backwards: blocks wait for those before them until memory is full."""
    with opened(matrices(40, 2), memory=4 * MIB) as one:
        backwards = one.keys[::-1]
        one.file.expect(backwards)
        for key in backwards:
            assert one.tensor(key) == one.right(key)
            assert one.file.waiting <= 4 * MIB + 8 * 2 * MIB, "memory, and what was on its way"
        one.file.complete()
        assert one.file.unverified == (
            "it was read in another order than it is stored in, and memory to hash it ran out"
        )
        assert one.file.again <= COMPLETION_LIMITS[0]
        one.file.expect(one.keys)


@pytest.mark.slow
def test_a_later_pass_in_order_mends_it() -> None:
    with opened(matrices(40, 2), memory=4 * MIB) as one:
        for order in (one.keys[::-1], one.keys):
            one.file.expect(order)
            for key in order:
                one.tensor(key)
        one.file.complete()
        assert one.file.unverified is None


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_is_an_error_by_name(place: str) -> None:
    size = len(save(matrices(6, 2), {"format": "pt"}))
    at = {"first": size - 12 * MIB, "middle": size // 2, "last": size - 1}[place]
    with opened(matrices(6, 2), flip=at) as one:
        with pytest.raises(CorruptFileError, match="org/m@0123abcd: model.safetensors: the bytes received are not"):
            one.file.expect(one.keys)
            for key in one.keys:
                one.tensor(key)
            one.file.complete()


def test_a_file_known_to_be_wrong_is_not_read_on() -> None:
    with opened(matrices(3, 2), flip=6 * MIB - 5) as one:
        one.tensor("layer.001")
        with pytest.raises(CorruptFileError):
            one.file.complete()
        with pytest.raises(CorruptFileError):
            one.tensor("layer.000")


def test_an_error_of_a_request_reaches_all_who_wait() -> None:
    with opened(matrices(6, 2)) as one:
        one.source.broken = one.file.header.offsets["layer.002"] + 5
        one.file.expect(one.keys)
        assert one.tensor("layer.005") == one.right("layer.005")
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(one.tensor, "layer.002") for _ in range(4)]:
                with pytest.raises(OfflineError):
                    future.result()
        one.source.broken = None
        assert one.tensor("layer.002") == one.right("layer.002")


def test_digests_that_cannot_be_checked_are_not_begun() -> None:
    with opened(matrices(6, 2)) as one:
        one.file.unchecked = "several processes read a part of it each"
        one.tensor("layer.004")
        one.file.complete()
        assert one.file.unverified == "several processes read a part of it each"
        assert one.source.fetched == 2 * MIB


@pytest.mark.slow
def test_a_header_that_is_longer_than_the_first_request() -> None:
    tensors = {
        f"a.rather.long.name.for.a.tensor.{i:06d}": torch.full((2,), i % 251, dtype=torch.uint8) for i in range(3000)
    }
    data = save(tensors, {"format": "pt"})
    source = Counted(data)
    header, head = remote_header(source, "model.safetensors")
    assert data.startswith(head) and len(head) == header.end > 100_000
    assert source.reads == [(0, 100_000), (100_000, header.end)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a safetensors file, or is truncated"),
        (b"\x10\0\0", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"<html>" * 100, "not a safetensors file"),
        (save({"a": torch.zeros(4)}) + b"\0", "overlong"),
    ],
)
def test_files_that_are_none(data: bytes, words: str) -> None:
    with pytest.raises(CorruptFileError, match=words):
        remote_header(Counted(data), "model.safetensors")
