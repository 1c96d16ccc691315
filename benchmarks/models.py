"""Generates the checkpoints the benchmarks merge: a random base and fine-tunes near it, seeded, once, in a folder.

A fine-tune is the base plus noise of a fixed relative norm. In a structured kind, half of the noise's energy in every
matrix is low-rank with a decaying spectrum (one part shared by all fine-tunes, one part its own) and the other half is
dense, so that matrices have full rank, a steep head and a long tail, as differences of really trained models have.
Run as `python -m benchmarks.models KIND FOLDER COUNT`, so that the timing process itself never imports torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor


SHARED_RANK = 16
OWN_RANK = 32


@dataclass(frozen=True)
class Kind:
    """One family of generated checkpoints.

    Attributes:
        config: contents of `config.json`.
        dtype: torch dtype name of the stored tensors.
        relative: norm of a fine-tune's difference over the norm of the base, tensor by tensor.
        structured: generate the low-rank parts too; False leaves dense noise alone, which is faster to generate.
    """

    config: dict[str, object]
    dtype: str
    relative: float
    structured: bool


CLIP_VISION = Kind(
    config={
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "image_size": 224,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 12,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "projection_dim": 512,
        "torch_dtype": "float32",
    },
    dtype="float32",
    relative=0.02,
    structured=True,
)

LLAMA = Kind(
    config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 2816,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    dtype="bfloat16",
    relative=0.05,
    structured=False,
)

KINDS = {"clip-vision": CLIP_VISION, "llama": LLAMA}


def clip_vision_shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a CLIP vision tower, in the names published checkpoints use."""
    hidden, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    patch, image = int(str(config["patch_size"])), int(str(config["image_size"]))
    embeddings = "vision_model.embeddings"
    yield f"{embeddings}.class_embedding", (hidden,)
    yield f"{embeddings}.patch_embedding.weight", (hidden, 3, patch, patch)
    yield f"{embeddings}.position_embedding.weight", ((image // patch) ** 2 + 1, hidden)
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for layer in range(int(str(config["num_hidden_layers"]))):
        prefix = f"vision_model.encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
            yield f"{prefix}.self_attn.{name}.bias", (hidden,)
        yield f"{prefix}.mlp.fc1.weight", (inner, hidden)
        yield f"{prefix}.mlp.fc1.bias", (inner,)
        yield f"{prefix}.mlp.fc2.weight", (hidden, inner)
        yield f"{prefix}.mlp.fc2.bias", (hidden,)
    for norm in norms:
        yield f"{norm}.weight", (hidden,)
        yield f"{norm}.bias", (hidden,)


def llama_shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama with as many key-value heads as heads."""
    hidden, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    vocabulary = int(str(config["vocab_size"]))
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(int(str(config["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


SHAPES = {"clip-vision": clip_vision_shapes, "llama": llama_shapes}


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


def write_checkpoint(kind_name: str, folder: Path, index: int | None) -> None:
    """Write one checkpoint as `config.json` and a single `model.safetensors`; `index` None is the base."""
    import torch
    from safetensors.torch import save_file

    kind = KINDS[kind_name]
    dtype: torch.dtype = getattr(torch, kind.dtype)
    tensors: dict[str, Tensor] = {}
    for name, shape in SHAPES[kind_name](kind.config):
        base = base_tensor(name, shape)
        # Differences are taken from the *stored* base, so rounding of the base is no part of a task vector.
        stored = base.to(dtype)
        tensors[name] = stored if index is None else (stored.float() + task_vector(kind, name, base, index)).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(kind.config, indent=2) + "\n")
    # Under a temporary name first: a killed run leaves no half checkpoint that a later one would take for a whole one.
    partial = folder / "partial.tmp"
    save_file(tensors, str(partial), metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def generate(kind_name: str, folder: Path, count: int) -> None:
    """Write `folder/base` and `folder/model-00 ..`, skipping those that are there."""
    for index in [None, *range(count)]:
        target = folder / ("base" if index is None else f"model-{index:02d}")
        if not (target / "model.safetensors").exists():
            write_checkpoint(kind_name, target, index)


if __name__ == "__main__":
    generate(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
