"""The arithmetic of a process, on which the last bits of a merge depend, and the tolerance between two kinds of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.engine.device import CPU, Device, full_float32
from hfmerge.version import __version__


if TYPE_CHECKING:
    import torch

DECIDING = ("torch", "device", "fingerprint", "machine", "blas", "cpu", "threads_per_matrix")
"""Entries that must agree for two runs to give the same bytes."""
TOLERANCE = 1e-4
"""Largest difference of an element between machines, as a share of the root mean square of the changes it is made of.

Spectral methods multiply float64 round-off by the gaps between singular values; measured between instruction sets and
against other transcriptions it stays below 1e-5.
"""


def environment(device: Device | None = None, *, moved: bool = False, mixed: bool = False) -> dict[str, Any]:
    """Versions, device and arithmetic of this process, for the ledger.

    Args:
        device: what computes; None: the CPU.
        moved: a part was computed on the CPU instead, because the device had no room.
        mixed: other arithmetic took part, such as that of another machine. With `moved` or `mixed` the fingerprint is
            None.
    """
    import torch

    device = device or Device()
    return {
        "hfmerge": __version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "safetensors": _version("safetensors"),
        "device": device.recorded(moved=moved),
        "fingerprint": None if moved or mixed else arithmetic_fingerprint(device.place),
        "machine": platform.machine(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads_per_matrix": 1,
    }


@functools.cache
def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@functools.cache
def arithmetic_fingerprint(place: str = CPU) -> str | None:
    """SHA-256 of the results of fixed small computations. It differs between kinds of arithmetic with the same name.

    The instruction set that the linear algebra library chooses, or that `MKL_CBWR` makes it choose, changes last bits
    and shows nowhere else. Takes about 10 ms, on one thread.

    Args:
        place: where to compute, as torch names it.

    Returns:
        None if the device has no room for it now.
    """
    import torch

    found = hashlib.sha256()
    try:
        with _one_thread(), full_float32(place):
            for dtype in (torch.float32, torch.float64):
                for result in _samples(dtype, place):
                    found.update(result.cpu().contiguous().numpy().tobytes())
    except torch.OutOfMemoryError:
        return None
    return found.hexdigest()


def _samples(dtype: torch.dtype, place: str) -> Iterator[torch.Tensor]:
    """Products, sums and decompositions of fixed matrices."""
    import torch

    def matrix(rows: int, columns: int, salt: int) -> torch.Tensor:
        # whole numbers, and one division, which is rounded alike everywhere
        i = torch.arange(rows * columns, dtype=torch.int64)
        whole = (48271 * i * i + (16807 + salt) * i) % 65521 - 32760
        return (whole.to(dtype) / 65521).reshape(rows, columns).to(place)

    wide, tall, square = matrix(67, 129, 1), matrix(129, 71, 2), matrix(48, 48, 3)
    yield wide @ tall
    yield torch.stack([wide.sum(), torch.linalg.vector_norm(wide), torch.vdot(wide.flatten(), wide.flatten())])
    yield from torch.linalg.svd(wide[:40, :56], full_matrices=False)
    yield from torch.linalg.eigh(square + square.mT)
    yield from torch.linalg.qr(square)
    yield torch.linalg.cholesky(wide @ wide.mT)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two environments so that bytes may differ too: "torch 2.13.0, here 2.14.0"."""
    return [
        f"{name} {_shown(name, made)}, here {_shown(name, here)}"
        for name in DECIDING
        if made.get(name) != here.get(name)
    ]


def excuses(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Reasons why two runs of the same work may give other last bits; empty if they must give the same bytes.

    A reason is a different or unknown fingerprint, or a different version of torch. What a ledger says of processor,
    library or device is no reason.

    Args:
        made: environment in a ledger, which anybody may have written.
        here: environment of a run just made.
    """
    if made.get("fingerprint") is None:
        reasons = ["the ledger has no fingerprint of the arithmetic"]
    elif here["fingerprint"] is None:
        reasons = ["other arithmetic took part here"]
    elif made["fingerprint"] != here["fingerprint"]:
        reasons = ["the arithmetic differs"]
    elif made.get("torch") != here["torch"]:
        reasons = ["the version of torch differs"]
    else:
        return []
    return [f"{reasons[0]}: {'; '.join(told)}" if (told := differences(made, here)) else reasons[0]]


def _shown(name: str, where: Mapping[str, Any]) -> str:
    value = where.get(name)
    return str(value or "unknown")[:12] if name == "fingerprint" else str(value)


def far_apart(claimed: Path, made: Path, changes: Mapping[str, float]) -> str | None:
    """The first tensor of a weight file that differs by more than other arithmetic explains, or None.

    An element may differ by `TOLERANCE` of its tensor's change, plus one step of the file's dtype, because a value
    near the middle between two steps may be rounded either way. Both bounds are computed from the file that was made
    here. Tensors that no model changes, NaN and infinite values need the same bits.

    Args:
        claimed: the safetensors file to check; it is not trusted.
        made: the file that the same computation gave here.
        changes: tensor -> root mean square of the changes that it is made of; no other tensor may differ.
    """
    from safetensors import safe_open

    if claimed.stat().st_size != made.stat().st_size or _header(claimed) != _header(made):
        return "its header or its length differs"
    with safe_open(claimed, framework="pt") as one, safe_open(made, framework="pt") as other:
        for name in sorted(other.keys()):
            text = _tensor_apart(one.get_tensor(name), other.get_tensor(name), changes.get(name))
            if text is not None:
                return f"{name} {text}"
    return None


def _header(path: Path) -> bytes:
    """The bytes of a safetensors file that come before its tensors: names, dtypes, shapes, places."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))


def _tensor_apart(claimed: torch.Tensor, made: torch.Tensor, change: float | None) -> str | None:
    """What is wrong with a tensor of the same dtype and shape; None if other arithmetic explains it."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[made.element_size()]
    other = claimed.contiguous().view(bits) != made.contiguous().view(bits)
    if not bool(other.any()):
        return None
    if change is None or not math.isfinite(change) or not made.is_floating_point():
        return "differs, and has to be the same everywhere"
    a, b = claimed[other].double(), made[other].double()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return "has other values that are not finite"
    limits = torch.finfo(made.dtype)
    step = limits.eps * b.abs().clamp(min=limits.tiny)
    apart = (a - b).abs()
    # a comparison with NaN is false, so NaN is refused
    if bool((apart <= step + TOLERANCE * change).all()):
        return None
    return f"differs by up to {float(apart.max()):.3g}"
