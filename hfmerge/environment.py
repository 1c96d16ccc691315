"""What a merge's last bits depend on beside its inputs, and how far two machines may differ that do not share it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfmerge.version import __version__


DECIDING = ("torch", "device", "machine", "blas", "cpu", "threads_per_matrix")
"""Entries that must agree for two runs to give the same bytes."""
TOLERANCE = 1e-4
"""Largest difference of an element between machines, as a share of the root mean square of the merged change.

Spectral methods multiply float64 round-off by the gaps between singular values; measured between instruction sets and
against other transcriptions it stays below 1e-5.
"""


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, device and arithmetic of this process, for the ledger.

    Args:
        device: what computed: "cpu", or the name of an accelerator.
    """
    from importlib.metadata import version

    import torch

    return {
        "hfmerge": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "device": device,
        "machine": platform.machine(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads_per_matrix": 1,
    }


def differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two environments so that bytes may differ too: "torch 2.13.0, here 2.14.0"."""
    return [f"{name} {made.get(name)}, here {here.get(name)}" for name in DECIDING if made.get(name) != here.get(name)]


def far_apart(first: Path, second: Path, change: float) -> str | None:
    """The first tensor in which two safetensors files differ by more than other arithmetic explains, or None.

    An element may differ by `TOLERANCE` of the root mean square of the merged change, and then by one step of the
    file's dtype, because a value near the middle between two steps may be rounded either way.

    Args:
        first, second: weight files.
        change: root mean square of the merged change.
    """
    import torch
    from safetensors import safe_open

    with safe_open(first, framework="pt") as one, safe_open(second, framework="pt") as other:
        if sorted(one.keys()) != sorted(other.keys()):
            return "their tensors have other names"
        for name in sorted(one.keys()):
            a, b = one.get_tensor(name), other.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name} has another shape or dtype"
            if not a.is_floating_point():
                if not torch.equal(a, b):
                    return f"{name} differs"
                continue
            step = torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).double()
            apart = (a.double() - b.double()).abs()
            if bool((apart > step + TOLERANCE * change).any()):
                return f"{name} differs by up to {float(apart.max()):.3g}"
    return None
