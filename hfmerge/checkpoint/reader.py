"""Lazy tensors of pinned sources: opens each file once and reads one stored tensor at a time, without mapping files.

Files are read with `pread` into fresh memory: mapped pages would count as resident memory until the kernel drops them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hfmerge.errors import CorruptFileError, NonFiniteError
from hfmerge.source import Source, check_safetensors, fetch, load_pickle
from hfmerge.taskvector import squared_norm


if TYPE_CHECKING:
    from torch import Tensor


class Reader:
    """Reads stored tensors of one source; safe to call from several threads.

    The files must be on this machine or downloadable; a file is opened at its first tensor and kept open until `close`.
    """

    def __init__(self, source: Source, *, allow_nonfinite: bool = False):
        self.source = source
        self.allow_nonfinite = allow_nonfinite
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for handle in self._open.values():
                if hasattr(handle, "__exit__"):
                    handle.__exit__(None, None, None)
            self._open.clear()

    def stored(self, key: str) -> Tensor:
        """The tensor as it lies in the file.

        Raises:
            CorruptFileError: the file cannot be read where its header says the tensor lies.
        """
        entry = self.source.tensors[key]
        handle = self._handle(entry.file)
        try:
            tensor = handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        except Exception as error:
            raise CorruptFileError(
                f"{self.source.pinned.label}: {entry.file}: {key} cannot be read: {error}"
            ) from error
        if tuple(tensor.shape) != entry.shape:
            raise CorruptFileError(
                f"{self.source.pinned.label}: {entry.file}: {key} is {tuple(tensor.shape)}, its header said {entry.shape}."
            )
        return tensor

    def value(self, key: str) -> Tensor:
        """The tensor as float32, checked for NaN and Inf.

        Raises:
            NonFiniteError: names the tensor and the model.
        """
        tensor = self.stored(key).float()
        if not self.allow_nonfinite:
            total = squared_norm(tensor)
            if total != total or (total == float("inf") and not bool(tensor.isfinite().all())):
                bad = int((~tensor.isfinite()).sum())
                raise NonFiniteError(
                    f"{self.source.pinned.label}: {self.source.tensors[key].file}: {key} holds {bad} NaN or Inf of "
                    f"{tensor.numel()} values; repair the source, leave the tensor out with `exclude`, or pass "
                    "--allow-nonfinite."
                )
        return tensor

    def _handle(self, file: str) -> Any:
        with self._lock:
            if file not in self._open:
                self._open[file] = self._opened(file)
            return self._open[file]

    def _opened(self, file: str) -> Any:
        path = fetch(self.source.pinned, file)
        where = f"{self.source.pinned.label}: {file}"
        if self.source.pickled:
            return load_pickle(path, where, device="cpu")
        check_safetensors(path, where)
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, "pt", backend="pread").__enter__()
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{where}: {error}; get the file again.") from error
