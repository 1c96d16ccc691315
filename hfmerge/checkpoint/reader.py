"""Lazy tensors of pinned sources: opens each file once and reads one stored tensor, or some rows of it, at a time.

Files are read with `pread` into fresh, aligned memory: mapped pages would count as resident memory until the kernel
drops them, and safetensors' own slices read the whole tensor. Files that are streamed are read by ranges of bytes too,
only from the Hub.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.headers import Header, TensorEntry, load_pickle, read_header
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.streaming.remote_file import RemoteFile
from hfmerge.checkpoint.streaming.session import Streaming
from hfmerge.checkpoint.writer import SIZES, TORCH_NAMES, bytes_of
from hfmerge.errors import CorruptFileError, NonFiniteError
from hfmerge.hub.download import fetch
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[int, int]
"""Half-open range of indices along the first axis."""


@dataclass(frozen=True)
class _Opened:
    """An open safetensors file and what its header says now; it is a descriptor, or streamed from the Hub."""

    file: int | RemoteFile
    header: Header

    def read_into(self, start: int, view: memoryview, where: str) -> None:
        """Fill `view` with the file's bytes from `start` on."""
        if isinstance(self.file, RemoteFile):
            self.file.read_into(start, view)
            return
        while view:
            try:
                count = os.preadv(self.file, [view[: 1 << 30]], start)
            except OSError as error:
                raise CorruptFileError(f"{where} cannot be read: {error.strerror}.") from error
            if count <= 0:
                raise CorruptFileError(f"{where}: the file ends before the tensor does; get it again.")
            view, start = view[count:], start + count

    def close(self) -> None:
        """Close a descriptor; a streamed file belongs to its run."""
        if not isinstance(self.file, RemoteFile):
            os.close(self.file)


@dataclass(frozen=True)
class Window:
    """One stored tensor, of which pieces are read in the order its elements lie.

    Attributes:
        file, start: where it begins; None, and `data` holds it, of a pickled checkpoint.
        where: for messages.
        itemsize: bytes of an element.
    """

    file: _Opened | None
    start: int
    where: str
    itemsize: int
    data: memoryview | None = None

    def read_into(self, first: int, view: memoryview) -> None:
        """Fill `view` with the bytes of the elements from the one numbered `first` on."""
        at = first * self.itemsize
        if self.file is not None:
            self.file.read_into(self.start + at, view, self.where)
        elif self.data is not None:
            view[:] = self.data[at : at + len(view)]


class Reader:
    """Reads stored tensors of one source; safe to call from several threads.

    The files must be on this machine, downloadable, or streamed; a file is opened at its first tensor and kept open
    until `close`.

    Args:
        source: the model whose tensors are read.
        streaming: holds the files that the source streams; may be left out where it streams none.
    """

    def __init__(self, source: Model, streaming: Streaming | None = None):
        self.source, self._streaming = source, streaming
        self._open: dict[str, _Opened | dict[str, Any]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for handle in self._open.values():
                if isinstance(handle, _Opened):
                    handle.close()
            self._open.clear()

    def expect(self, keys: Iterable[str]) -> None:
        """Announce the stored tensors that are read next, in order, so that streamed tensors are fetched in time."""
        files: dict[str, list[str]] = {file: [] for file in self.source.streams}
        for key in keys:
            file = self.source.tensors[key].file
            if file in files:
                files[file].append(self.source.stored_key(key))
        for file, names in files.items():
            self._stream(file).expect(names)

    def stored(self, key: str, rows: Rows | None = None) -> Tensor:
        """The tensor as it lies in the file, or some rows of it, in memory of its own.

        Raises:
            CorruptFileError: the file ends before the tensor does, or holds another one under the name.
        """
        entry = self.source.tensors[key]
        key = self.source.stored_key(key)
        handle = self._handle(entry.file)
        if isinstance(handle, dict):
            tensor: Tensor = handle[key] if rows is None else handle[key][rows[0] : rows[1]]
            return tensor.clone()
        self._check(handle, key, entry)
        start, shape = handle.header.offsets[key], entry.shape
        if rows is not None:
            start += entry.nbytes // entry.shape[0] * rows[0]
            shape = (rows[1] - rows[0], *entry.shape[1:])
        import torch

        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[entry.dtype]))
        if tensor.numel():
            view = tensor.view(-1).view(torch.uint8).numpy().data
            handle.read_into(start, view, f"{self.source.snapshot.label}: {entry.file}: {key}")
        return tensor

    def window(self, key: str) -> Window:
        """A tensor to be read piece by piece into memory that is there.

        Raises:
            CorruptFileError: as for `stored`.
        """
        entry = self.source.tensors[key]
        key = self.source.stored_key(key)
        handle = self._handle(entry.file)
        where = f"{self.source.snapshot.label}: {entry.file}: {key}"
        if isinstance(handle, dict):
            return Window(None, 0, where, SIZES[entry.dtype], bytes_of(handle[key]))
        self._check(handle, key, entry)
        return Window(handle, handle.header.offsets[key], where, SIZES[entry.dtype])

    def _check(self, handle: _Opened, key: str, entry: TensorEntry) -> None:
        """The open file still holds the tensor that was planned with."""
        if key not in handle.header.entries or not _same(handle.header.entries[key], entry):
            raise CorruptFileError(
                f"{self.source.snapshot.label}: {entry.file}: {key} has changed since the plan was made."
            )
        if entry.nbytes != math.prod(entry.shape) * SIZES[entry.dtype]:
            raise CorruptFileError(
                f"{self.source.snapshot.label}: {entry.file}: {key} is {entry.dtype} {entry.shape} in {entry.nbytes} "
                "bytes; its header is broken, get the file again."
            )

    def value(self, key: str, rows: Rows | None = None) -> Tensor:
        """The tensor, or some rows of it, as float32, in memory of its own; not checked for NaN and Inf."""
        return self.stored(key, rows).float()

    def equal(self, first: str, second: str) -> bool:
        """Whether two stored tensors hold the same values; read some rows at a time."""
        import torch

        a, b = self.source.tensors[first], self.source.tensors[second]
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        step = max(1, (1 << 24) * a.shape[0] // max(1, a.nbytes)) if a.shape else 1
        rows = [(at, min(at + step, a.shape[0])) for at in range(0, a.shape[0], step)] if a.shape else [None]
        return all(torch.equal(self.stored(first, part), self.stored(second, part)) for part in rows)

    def check_finite(self, key: str) -> None:
        """Raise NonFiniteError, naming tensor and model, if the tensor holds NaN or Inf."""
        tensor = self.stored(key)
        bad = 0 if bool(tensor.isfinite().all()) else int((~tensor.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"{self.source.snapshot.label}: {self.source.tensors[key].file}: {key} holds {bad} NaN or Inf of "
                f"{tensor.numel()} values; repair the source, leave the tensor out with `exclude`, or pass "
                f"{parameter('allow_nonfinite', True)}."
            )

    def _handle(self, file: str) -> _Opened | dict[str, Any]:
        with self._lock:
            if file not in self._open:
                where = f"{self.source.snapshot.label}: {file}"
                if file in self.source.streams:
                    stream = self._stream(file)
                    self._open[file] = _Opened(stream, stream.header)
                elif self.source.pickled and not file.endswith(".safetensors"):
                    self._open[file] = load_pickle(fetch(self.source.snapshot, file), where, device="cpu")
                else:
                    path = fetch(self.source.snapshot, file)
                    header = read_header(path, where)
                    try:
                        self._open[file] = _Opened(os.open(path, os.O_RDONLY), header)
                    except OSError as error:
                        raise CorruptFileError(f"{where} cannot be read: {error.strerror}.") from error
            return self._open[file]

    def _stream(self, file: str) -> RemoteFile:
        assert self._streaming is not None, f"{self.source.snapshot.label}: {file} is streamed, by no session"
        return self._streaming.open(self.source.snapshot, file)


def _same(a: TensorEntry, b: TensorEntry) -> bool:
    return (a.dtype, a.shape, a.nbytes) == (b.dtype, b.shape, b.nbytes)
