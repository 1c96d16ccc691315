"""The binary formats of Xet: xorbs (chunks with their hashes) and shards (which chunks make which file).

Facts from the public Xet protocol specification; the shape of the hash tree (a node ends after the third or a later
child whose hash is divisible by four, at nine children at most) was checked against uploads of hf_xet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lz4.frame
from blake3 import blake3


# What the protocol and its clients keep to: bytes of a xorb's chunks together, their number, bytes of one.
MOST_XORB = 64 << 20
_MOST_CHUNKS = 8 << 10
_MOST_CHUNK = 128 << 10
# Room for chunk headers and a footer beside the data.
MOST_XORB_BODY = MOST_XORB + (4 << 20)
# The service takes shards of this size.
MOST_SHARD_BODY = 64 << 20

_CHUNK_HEADER = 8
_FOOTER = b"XETBLOB"
_RECORD = 48
_BOOKEND = b"\xff" * 32
_WITH_VERIFICATION = 1 << 31
_WITH_METADATA = 1 << 30
_SHARD_VERSION = 2

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_RANGE_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")

_LONGEST_NODE = 9
_SHORTEST_NODE = 3
_BRANCHING = 4


@dataclass(frozen=True)
class Chunk:
    """One chunk of a xorb: where its data lies, and what it becomes."""

    start: int
    stored: int
    scheme: int
    size: int


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb, the end excluded; `check` is the hash over their hashes."""

    xorb: str
    size: int
    first: int
    end: int
    check: bytes | None


@dataclass(frozen=True)
class FileRecipe:
    """How a file is put together, and its sha256."""

    terms: Sequence[Term]
    sha256: str


def hash_text(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def chunk_hash(data: bytes) -> bytes:
    """The hash of a chunk's content."""
    return blake3(data, key=_CHUNK_KEY).digest()


def tree_hash(nodes: Sequence[tuple[bytes, int]]) -> bytes:
    """The root over the (hash, size) pairs of chunks; of no chunks, zeros."""
    level = list(nodes)
    if not level:
        return bytes(32)
    while len(level) > 1:
        above = []
        while level:
            end = _node_end(level)
            text = "".join(f"{hash_text(digest)} : {size}\n" for digest, size in level[:end])
            above.append((blake3(text.encode(), key=_NODE_KEY).digest(), sum(size for _, size in level[:end])))
            level = level[end:]
        level = above
    return level[0][0]


def range_hash(hashes: Sequence[bytes]) -> bytes:
    """The hash over a run of chunk hashes."""
    return blake3(b"".join(hashes), key=_RANGE_KEY).digest()


def _node_end(level: Sequence[tuple[bytes, int]]) -> int:
    last = min(_LONGEST_NODE, len(level))
    for index in range(_SHORTEST_NODE - 1, last):
        if struct.unpack_from("<Q", level[index][0], 24)[0] % _BRANCHING == 0:
            return index + 1
    return last


def read_chunks(xorb: bytes) -> list[Chunk]:
    """The chunks of a xorb, from their headers; a footer, if there is one, is ignored.

    Raises:
        ValueError: malformed.
    """
    chunks: list[Chunk] = []
    position = total = 0
    while position < len(xorb) and not xorb.startswith(_FOOTER, position):
        if position + _CHUNK_HEADER > len(xorb):
            raise ValueError("a chunk header is cut off")
        version, scheme = xorb[position], xorb[position + 4]
        stored = int.from_bytes(xorb[position + 1 : position + 4], "little")
        size = int.from_bytes(xorb[position + 5 : position + 8], "little")
        position += _CHUNK_HEADER
        if version != 0 or scheme > 2 or position + stored > len(xorb):
            raise ValueError(f"chunk {len(chunks)} is malformed")
        total += size
        # A few bytes that become gigabytes are refused by what their headers say, before anything is decompressed.
        if size > _MOST_CHUNK or total > MOST_XORB or len(chunks) == _MOST_CHUNKS:
            limits = f"{MOST_XORB} bytes, {_MOST_CHUNKS} chunks, {_MOST_CHUNK} bytes of one chunk"
            raise ValueError(f"the xorb is beyond the limits of Xet: {limits}")
        chunks.append(Chunk(position, stored, scheme, size))
        position += stored
    return chunks


def chunk_data(xorb: bytes, chunk: Chunk) -> bytes:
    """The content of a chunk.

    Raises:
        ValueError: it does not decompress to what its header says.
    """
    data = xorb[chunk.start : chunk.start + chunk.stored]
    if chunk.scheme != 0:
        try:
            # Asking for no more than announced keeps a small chunk from becoming a huge one.
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=chunk.size + 1)
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"a chunk does not decompress: {error}") from error
    if len(data) != chunk.size:
        raise ValueError(f"a chunk has {len(data)} bytes instead of {chunk.size}")
    return _ungroup(data) if chunk.scheme == 2 else data


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping of bytes by their place in groups of four; the first groups hold what is left over."""
    whole = bytearray(len(data))
    position = 0
    for lane in range(4):
        count = len(range(lane, len(data), 4))
        whole[lane::4] = data[position : position + count]
        position += count
    return bytes(whole)


def check_xorb(xorb: bytes, expected: str) -> list[bytes]:
    """The hashes of a xorb's chunks, after checking that they make the xorb's own.

    Raises:
        ValueError: malformed, or another hash.
    """
    nodes = [(chunk_hash(chunk_data(xorb, chunk)), chunk.size) for chunk in read_chunks(xorb)]
    if not nodes:
        raise ValueError("the xorb holds no chunk")
    found = hash_text(tree_hash(nodes))
    if found != expected:
        raise ValueError(f"the xorb's chunks make {found}, not {expected}")
    return [digest for digest, _ in nodes]


def read_shard(shard: bytes) -> list[FileRecipe]:
    """The files a shard registers.

    Raises:
        ValueError: malformed, or a file without its sha256.
    """
    if len(shard) < _RECORD or struct.unpack_from("<Q", shard, 32)[0] != _SHARD_VERSION:
        raise ValueError("not a shard of a known version")
    records = _records(shard)
    recipes: list[FileRecipe] = []
    for header in records:
        if header[:32] == _BOOKEND:
            return recipes
        flags, count = struct.unpack_from("<2I", header, 32)
        entries = [next(records) for _ in range(count)]
        checks = [next(records)[:32] for _ in range(count)] if flags & _WITH_VERIFICATION else [None] * count
        if not flags & _WITH_METADATA:
            raise ValueError("a file has no sha256")
        terms = []
        for entry, check in zip(entries, checks, strict=True):
            _, size, first, end = struct.unpack_from("<4I", entry, 32)
            terms.append(Term(hash_text(entry[:32]), size, first, end, check))
        # Like every hash in a shard, the sha256 is written as four numbers.
        recipes.append(FileRecipe(terms, hash_text(next(records)[:32])))
    raise ValueError("the list of files has no end")


def _records(shard: bytes) -> Iterator[bytes]:
    for position in range(_RECORD, len(shard), _RECORD):
        record = shard[position : position + _RECORD]
        if len(record) < _RECORD:
            break
        yield record
    raise ValueError("the shard is cut off")
