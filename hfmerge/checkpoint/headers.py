"""Headers of weight files: what each tensor is and where it lies, from safetensors headers and from pickles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.errors import CorruptFileError
from hfmerge.validation.limits import DIMENSIONS, HEADER_BYTES, HEADER_VALUES, TENSOR_NAME, TENSORS
from hfmerge.validation.strict_json import read_json
from hfmerge.validation.values import show, table


FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Floating safetensors dtypes that can be merged, with their bytes per element."""
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}
LFS_POINTER = b"version https://git-lfs.github.com/spec"
MET_AT_ONCE = 100_000
"""Bytes that hold the header of nearly every file."""


@dataclass(frozen=True)
class TensorEntry:
    """Header entry of a stored tensor. `dtype` is the safetensors name (`BF16`), `nbytes` its length in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def floating(self) -> bool:
        """True when the tensor can be merged; integer and boolean buffers are copied."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Header:
    """A safetensors header.

    Attributes:
        end: first byte after it, where the data begin.
        entries: tensor -> its header entry, in the header's order.
        offsets: tensor -> its first byte in the file.
    """

    end: int
    entries: Mapping[str, TensorEntry]
    offsets: Mapping[str, int]


def header_length(head: bytes, size: int, where: str) -> int:
    """Bytes of the header, its own eight bytes of length included, from the first bytes of a file of `size` bytes.

    Raises:
        CorruptFileError: a Git-LFS pointer, or no safetensors file.
    """
    if head[:8] == LFS_POINTER[:8]:
        raise CorruptFileError(f"{where} is a Git-LFS pointer, not weights; run `git lfs pull` or download it again.")
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(size, HEADER_BYTES.most):
        raise CorruptFileError(f"{where} is not a safetensors file, or is truncated ({size} bytes); get it again.")
    return 8 + length


def parse_header(head: bytes, file: str, size: int, where: str) -> Header:
    """The header of a safetensors file.

    Args:
        head: the file's first bytes, all of the header among them.
        file: its name in the repository.
        size: bytes of the whole file.
        where: names it in errors.

    Raises:
        CorruptFileError: no safetensors file, or one whose header, tensors and length do not agree.
    """
    end = header_length(head, size, where)
    entries: dict[str, TensorEntry] = {}
    spans: dict[str, tuple[int, int]] = {}
    try:
        header = read_json(head[8:end], HEADER_BYTES, values=HEADER_VALUES)
        if not isinstance(header, dict):
            raise ValueError("holds no JSON object")
        table(_said, _said)(header.pop("__metadata__", {}))
        TENSORS.check(len(header))
        for key, info in header.items():
            TENSOR_NAME.check(len(key))
            spans[key], entries[key] = _entry(file, info)
    except ValueError as error:
        raise CorruptFileError(f"{where}: broken safetensors header: it {error}; get it again.") from error
    last = _end_of_data(where, spans)
    if end + last != size:
        raise CorruptFileError(f"{where} is truncated or overlong: {size} bytes, header says {end + last}.")
    for key, entry in entries.items():
        each = FLOATS.get(entry.dtype) or OTHERS.get(entry.dtype)
        if each is not None and entry.nbytes != each * math.prod(entry.shape):
            raise CorruptFileError(
                f"{where}: broken safetensors header: {key} has {entry.nbytes} bytes for {entry.dtype} "
                f"{entry.shape}; get it again."
            )
    return Header(end, entries, {key: end + start for key, (start, _) in spans.items()})


def _said(value: Any) -> str:
    """A key or value of the metadata, where some trainers leave long texts. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {show(value)}")
    return value


def _entry(file: str, info: Any) -> tuple[tuple[int, int], TensorEntry]:
    """First byte and end of a tensor, and what it is. Raises ValueError."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("has an entry that does not describe a tensor")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise ValueError("has an entry that does not describe a tensor")
    DIMENSIONS.check(len(shape))
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        raise ValueError("has a size that is not a whole number from 0 on")
    return (offsets[0], offsets[1]), TensorEntry(file, dtype, tuple(shape), offsets[1] - offsets[0])


def read_header(path: Path, where: str) -> Header:
    """The header of a safetensors file on this machine.

    Raises:
        CorruptFileError: see `parse_header`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            head = handle.read(8)
            head += handle.read(header_length(head, size, where) - 8)
    except OSError as error:
        raise CorruptFileError(f"{where} cannot be read: {error.strerror}.") from error
    return parse_header(head, path.name, size, where)


def _end_of_data(where: str, spans: Mapping[str, tuple[int, int]]) -> int:
    """Length of the data that tensors from `start` to `stop` fill, which they must without gap or overlap."""
    end = 0
    for key, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end or stop < start:
            raise CorruptFileError(
                f"{where}: broken safetensors header: {key} does not follow the tensor before; get it again."
            )
        end = stop
    return end


def pickle_entries(path: Path, file: str, where: str) -> dict[str, TensorEntry]:
    """What a `.bin` file holds."""
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
    names |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
    return {
        key: TensorEntry(
            file,
            names.get(str(value.dtype).removeprefix("torch."), str(value.dtype)),
            tuple(value.shape),
            value.numel() * value.element_size(),
        )
        for key, value in load_pickle(path, where, device="meta").items()
    }


def load_pickle(path: Path, where: str, device: str) -> dict[str, Any]:
    """State dict of a `.bin` file, unpickled with `weights_only`; `device="meta"` gives shapes without data."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=device != "meta")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CorruptFileError(
            f"{where}: cannot be unpickled as plain weights ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptFileError(f"{where}: not a plain dictionary of tensors.")
    return state
