"""Packs of git objects from strangers: how much is in them is found out a little at a time, before any is unpacked."""

from __future__ import annotations

import zlib
from typing import BinaryIO


# Regular files are smaller than `attributes.LARGE_BYTES`; trees and older files may be larger.
MOST_OBJECT = 256 << 20
MOST_TOTAL = 64 << 30
_CHUNK = 64 << 10
_OFS_DELTA, _REF_DELTA = 6, 7


class _Reader:
    """Bytes of a file, a few at a time, some of which may be given back."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._data = b""

    def take(self, count: int) -> bytes:
        """Exactly so many bytes."""
        while len(self._data) < count:
            more = self._file.read(_CHUNK)
            if not more:
                raise ValueError("the pack ends early")
            self._data += more
        result, self._data = self._data[:count], self._data[count:]
        return result

    def some(self) -> bytes:
        """Whatever is at hand, at least one byte."""
        result = self._data or self._file.read(_CHUNK)
        if not result:
            raise ValueError("the pack ends early")
        self._data = b""
        return result

    def give_back(self, data: bytes) -> None:
        """Bytes that belong to the next object."""
        self._data = data + self._data


def check_pack(file: BinaryIO) -> None:
    """Read a pack once, in little memory.

    Raises:
        ValueError: it is malformed, or it would unpack to more than the limits.
    """
    reader = _Reader(file)
    if reader.take(4) != b"PACK" or int.from_bytes(reader.take(4), "big") not in (2, 3):
        raise ValueError("not a pack of git")
    total = 0
    for _ in range(int.from_bytes(reader.take(4), "big")):
        kind, size = _head(reader)
        if kind == _REF_DELTA:
            reader.take(20)
        elif kind == _OFS_DELTA:
            while reader.take(1)[0] & 0x80:
                pass
        if size > MOST_OBJECT:
            raise ValueError(f"an object of {size} bytes; the limit is {MOST_OBJECT}")
        beginning = _inflated(reader, size)
        if kind in (_OFS_DELTA, _REF_DELTA) and (made := _made_by(beginning)) > MOST_OBJECT:
            raise ValueError(f"an object of {made} bytes; the limit is {MOST_OBJECT}")
        total += size
        if total > MOST_TOTAL:
            raise ValueError(f"more than {MOST_TOTAL} bytes in all")


def _head(reader: _Reader) -> tuple[int, int]:
    byte = reader.take(1)[0]
    kind, size, shift = (byte >> 4) & 7, byte & 15, 4
    while byte & 0x80:
        byte = reader.take(1)[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise ValueError("a size that is none")
    return kind, size


def _inflated(reader: _Reader, size: int) -> bytes:
    """The first bytes of a compressed object, which must have the size that was announced."""
    unpacker = zlib.decompressobj()
    beginning, seen = b"", 0
    try:
        while not unpacker.eof:
            data = unpacker.decompress(unpacker.unconsumed_tail or reader.some(), _CHUNK)
            beginning = (beginning + data)[:32] if len(beginning) < 32 else beginning
            seen += len(data)
            if seen > size:
                raise ValueError("an object is longer than announced")
    except zlib.error as error:
        raise ValueError(f"an object is not compressed as git does it ({error})") from error
    if seen != size:
        raise ValueError("an object is shorter than announced")
    reader.give_back(unpacker.unused_data)
    return beginning


def _made_by(delta: bytes) -> int:
    """The size of what a difference makes, the second of two numbers at its beginning."""
    position = 0
    value = 0
    for _ in range(2):
        value, shift = 0, 0
        while True:
            if position >= len(delta) or shift > 63:
                raise ValueError("a difference without sizes")
            byte = delta[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
    return value
