"""Generates the checkpoints the benchmarks merge: a random base and fine-tunes near it, seeded, once, in a folder.

A fine-tune is the base plus noise of a fixed relative norm. In a structured kind, half of the noise's energy in every
matrix is low-rank with a decaying spectrum (one part shared by all fine-tunes, one part its own) and the other half is
dense, so that matrices have full rank, a steep head and a long tail, as differences of really trained models have.
Run as `python -m benchmarks.models full|quick KIND FOLDER MODELS ADAPTERS`, so that the timing process itself never
imports torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kinds import KINDS, QUICK, Kind, llama_matrices, number


if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor


SHARED_RANK = 16
OWN_RANK = 32
ADAPTER_RANK = 16


def generator(*key: object) -> Generator:
    """A CPU generator seeded by `key` alone."""
    import torch

    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def base_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random float32 base: norm scales near one, everything else Gaussian of deviation 0.02."""
    import torch

    noise = 0.02 * torch.randn(shape, generator=generator("base", name))
    return noise + 1 if "norm" in name and name.endswith("weight") else noise


def low_rank(shape: tuple[int, int], rank: int, gen: Generator) -> Tensor:
    """Sum of `rank` random outer products whose weights decay as 1/i, scaled to unit Frobenius norm."""
    import torch

    weights = 1.0 / torch.arange(1, rank + 1, dtype=torch.float32)
    left = torch.randn(shape[0], rank, generator=gen) * weights
    product = left @ torch.randn(rank, shape[1], generator=gen)
    product /= product.norm()
    return product


def task_vector(kind: Kind, name: str, base: Tensor, index: int) -> Tensor:
    """Float32 difference of fine-tune `index` to the base, of norm `kind.relative` times the base's."""
    import torch

    gen = generator("task", index, name)
    dense = torch.randn(base.shape, generator=gen)
    tau: Tensor = dense / dense.norm()
    if kind.structured and base.dim() == 2:
        shape = (base.shape[0], base.shape[1])
        shared = low_rank(shape, SHARED_RANK, generator("shared", name))
        tau = math.sqrt(0.5) * tau + 0.5 * shared + 0.5 * low_rank(shape, OWN_RANK, gen)
    tau *= kind.relative * base.norm()
    return tau


def write_checkpoint(kind: Kind, folder: Path, index: int | None) -> None:
    """Write one checkpoint as `config.json` and a single `model.safetensors`; `index` None is the base."""
    import torch

    dtype: torch.dtype = getattr(torch, kind.dtype)
    tensors: dict[str, Tensor] = {}
    for name, shape in kind.shapes(kind.config):
        base = base_tensor(name, shape)
        # Differences are taken from the *stored* base, so rounding of the base is no part of a task vector.
        stored = base.to(dtype)
        tensors[name] = stored if index is None else (stored.float() + task_vector(kind, name, base, index)).to(dtype)
    write_folder(folder, "config.json", kind.config, "model.safetensors", tensors)


def write_adapter(kind: Kind, folder: Path, base: Path, index: int) -> None:
    """Write one LoRA adapter of rank 16 on every matrix of a Llama's layers, as peft stores it, float32."""
    import torch

    matrices = llama_matrices(kind.config)
    tensors: dict[str, Tensor] = {}
    for layer in range(number(kind.config, "num_hidden_layers")):
        for name, (rows, columns) in matrices.items():
            gen = generator("adapter", index, layer, name)
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(ADAPTER_RANK, columns, generator=gen) / columns**0.5
            # the second factor of a trained adapter is small and its directions are of different strength
            strength = 1.0 / torch.arange(1, ADAPTER_RANK + 1, dtype=torch.float32)
            tensors[f"{stem}.lora_B.weight"] = 0.02 * torch.randn(rows, ADAPTER_RANK, generator=gen) * strength
    config = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 2 * ADAPTER_RANK,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": ADAPTER_RANK,
        "target_modules": sorted(name.rpartition(".")[2] for name in matrices),
        "task_type": "CAUSAL_LM",
    }
    write_folder(folder, "adapter_config.json", config, "adapter_model.safetensors", tensors)


def write_folder(
    folder: Path, settings: str, config: Mapping[str, object], weights: str, tensors: dict[str, Tensor]
) -> None:
    """A folder of one JSON and one weight file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / settings).write_text(json.dumps(config, indent=2) + "\n")
    # Under a temporary name first: a killed run leaves no half checkpoint that a later one would take for a whole one.
    partial = folder / "partial.tmp"
    save_file(tensors, str(partial), metadata={"format": "pt"})
    os.replace(partial, folder / weights)


def generate(kind: Kind, folder: Path, count: int, adapters: int) -> None:
    """Write `folder/base`, `folder/model-00 ..` and `folder/adapter-00 ..`, skipping those that are there."""
    for index in [None, *range(count)]:
        target = folder / ("base" if index is None else f"model-{index:02d}")
        if not (target / "model.safetensors").exists():
            write_checkpoint(kind, target, index)
    for index in range(adapters):
        target = folder / f"adapter-{index:02d}"
        if not (target / "adapter_model.safetensors").exists():
            write_adapter(kind, target, folder / "base", index)


if __name__ == "__main__":
    size, name, where, models, adapters = sys.argv[1:]
    generate((QUICK if size == "quick" else KINDS)[name], Path(where), int(models), int(adapters))
