"""Safetensors files written tensor by tensor: the header first, then each tensor at its own offset, in any order.

With the same names, dtypes and shapes the bytes equal those of `safetensors.torch.save_file`.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.errors import OutputError
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from torch import Tensor

RANKS = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
)
"""Alignment order of safetensors' own serializer: later dtypes come first in the file."""

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
SIZES = {name: {"BOOL": 1, "BF16": 2}.get(name) or int(name.lstrip("UIF")) // 8 for name in TORCH_NAMES}
"""Bytes per element."""


@dataclass(frozen=True)
class Slot:
    """The safetensors dtype and shape of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length in the file."""
        count = 1
        for size in self.shape:
            count *= size
        return count * SIZES[self.dtype]


def header_bytes(
    slots: Mapping[str, Slot], metadata: Mapping[str, str], prefix: str = ""
) -> tuple[bytes, dict[str, int]]:
    """Length prefix and header of a file, and the absolute offset of every tensor.

    Args:
        prefix: what the names of `slots` begin with, and names in the file do not.
    """
    order = sorted(slots, key=lambda name: (-RANKS.index(slots[name].dtype), name.encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    starts = {}
    for name in order:
        slot = slots[name]
        header[name.removeprefix(prefix)] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [at, at + slot.nbytes],
        }
        starts[name] = at
        at += slot.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + start for name, start in starts.items()}


class SafetensorsWriter:
    """One file being filled. Threads and processes may write different tensors at once (`pwrite`).

    Args:
        path: the file.
        slots: its tensors.
        metadata: strings for the header; default `{"format": "pt"}`.
        create: lay the file out; without it, open one that another process of the run has laid out.
        prefix: what the names begin with here and not in the file.
    """

    def __init__(
        self,
        path: Path,
        slots: Mapping[str, Slot],
        metadata: Mapping[str, str] | None = None,
        *,
        create: bool = True,
        prefix: str = "",
    ):
        self.path = path
        self.slots = dict(slots)
        header, self._offsets = header_bytes(slots, {"format": "pt"} if metadata is None else metadata, prefix)
        self._missing = {name: slot.nbytes for name, slot in self.slots.items()}
        self._lock = threading.Condition()
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
            if not create:
                return
            try:
                size = len(header) + sum(slot.nbytes for slot in self.slots.values())
                if hasattr(os, "posix_fallocate") and size:
                    _allocate(self._fd, size)
                os.ftruncate(self._fd, size)
                _pwrite_all(self._fd, header, 0)
            except OSError:
                os.close(self._fd)
                raise

    def write(self, name: str, tensor: Tensor, row: int | None = None) -> memoryview:
        """Put a tensor into its place; its dtype and shape must be the slot's.

        Args:
            row: `tensor` holds whole rows from this one on, instead of the whole slot.

        Returns:
            The bytes written.
        """
        slot = self.slots[name]
        shape = slot.shape if row is None else (min(tensor.shape[0], slot.shape[0] - row), *slot.shape[1:])
        if tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{TORCH_NAMES[slot.dtype]}":
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} for a slot of {slot.dtype} {slot.shape}")
        data = bytes_of(tensor)
        if data:
            start = self._offsets[name] + (row or 0) * (slot.nbytes // slot.shape[0] if slot.shape else 0)
            with disk_errors(self.path):
                _pwrite_all(self._fd, data, start)
        self.claim(name, len(data))
        return data

    def claim(self, name: str, nbytes: int) -> None:
        """Count bytes of a tensor as written, because an earlier process wrote them and they are intact.

        A negative number takes back what will be written again.
        """
        with self._lock:
            self._missing[name] -= nbytes
            if not self._missing[name]:
                self._lock.notify_all()

    def order(self) -> list[tuple[str, int]]:
        """The tensors as they lie in the file, each with the offset of its end."""
        names = sorted(self.slots, key=lambda name: self._offsets[name])
        return [(name, self._offsets[name] + self.slots[name].nbytes) for name in names]

    def wait_for(self, name: str, seconds: float) -> bool:
        """Whether all of a tensor is written; waits for it so long."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._missing[name], seconds)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor written before, or some rows of it, read back."""
        import torch

        slot = self.slots[name]
        start, shape = self._offsets[name], slot.shape
        if rows is not None:
            start += rows[0] * (slot.nbytes // slot.shape[0])
            shape = (rows[1] - rows[0], *slot.shape[1:])
        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[slot.dtype]))
        view = bytes_of(tensor)
        while view:
            count = os.preadv(self._fd, [view[: 1 << 30]], start)
            if count <= 0:
                raise OutputError(f"{self.path}: {name} cannot be read back.")
            view, start = view[count:], start + count
        return tensor

    def missing(self) -> dict[str, int]:
        """Bytes of every tensor that this process has not written."""
        with self._lock:
            return dict(self._missing)

    def count_others(self, others: Sequence[Mapping[str, int]]) -> None:
        """Count what other processes have written, given their `missing`."""
        with self._lock:
            for other in others:
                for name, left in other.items():
                    self._missing[name] -= self.slots[name].nbytes - left

    def close(self, *, complete: bool = True) -> None:
        """Flush to the disk and close.

        Args:
            complete: every slot must have been written.

        Raises:
            OutputError: the disk refused; ValueError: a slot was never written.
        """
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            missing = [name for name, left in self._missing.items() if left]
            if complete and missing:
                raise ValueError(f"{self.path}: not written, or not once: {', '.join(missing[:3])}")
            if complete:
                with disk_errors(self.path):
                    os.fsync(fd)
        finally:
            os.close(fd)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes as a safetensors file holds them; a view of its memory if it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class disk_errors:
    """Re-raise a failed write as one line that names the file and the remedy."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{self.path}: the disk is full; free some space or choose another {parameter('output')}."
                ) from error
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}.") from error


def _allocate(fd: int, size: int) -> None:
    """Reserve the space, so that a full disk fails now; a file system that cannot reserve fails at the write."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise


def _pwrite_all(fd: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[: 1 << 30], at)
        view, at = view[count:], at + count


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """`model.safetensors.index.json` of a sharded checkpoint; `total_size` in bytes."""
    text = json.dumps(
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    )
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


SINGLE = "model.safetensors"
"""The weight file of a model, or of a module, that has only one."""


def shard_names(files: Sequence[str]) -> dict[str, str]:
    """The output's weight files for the base's: `model.safetensors`, or `model-0000i-of-0000n.safetensors`."""
    if len(files) == 1:
        return {files[0]: SINGLE}
    return {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(sorted(files), 1)}


MOST_SHARDS = 500
"""Weight files of one output: all are open at once."""


def split_slots(slots: Mapping[str, Slot], size: int) -> dict[str, str]:
    """Tensor -> its file, of files of at most `size` bytes of tensors, filled in order as `save_pretrained` does."""
    from huggingface_hub import split_state_dict_into_shards_factory

    found = split_state_dict_into_shards_factory(
        dict(slots), get_storage_size=lambda slot: slot.nbytes, get_storage_id=lambda slot: None, max_shard_size=size,
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    return {key: file for file, keys in found.filename_to_tensors.items() for key in keys}
