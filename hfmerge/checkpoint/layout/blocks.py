"""Which real matrices a stored tensor holds: parts of fused projections, experts of a stack, transposed weights.

A tensor is split only where the class's own forward pass is known to take the parts apart (`_FUSED` and the experts
below); every other linear weight is one matrix, which is right, if coarser, for a fused weight too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfmerge.task_vector import WHOLE, Segment


if TYPE_CHECKING:
    from torch import nn

    from hfmerge.checkpoint.layout.conversion import Group

Blocks = tuple[Segment, ...]
Cut = tuple[int, tuple[tuple[str, int], ...]]
"""How rows are shared out: the number of repetitions, and (label, rows) of each part within one repetition."""

MATRIX: Blocks = (Segment(matrix=True),)
TRANSPOSED: Blocks = (Segment(matrix=True, transposed=True),)
UNSPLIT: Blocks = (WHOLE,)


def memory_blocks(model: nn.Module) -> dict[str, Blocks]:
    """Blocks of every in-memory parameter of a model that may be on the meta device; buffers are not listed."""
    blocks: dict[str, Blocks] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        above, _, leaf = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            blocks[full] = _parameter(module, name, tuple(parameter.shape), modules[above], leaf)
    return blocks


def _parameter(module: nn.Module, name: str, shape: tuple[int, ...], parent: nn.Module, leaf: str) -> Blocks:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kind = type(module).__name__
    if len(shape) == 3 and "Experts" in kind:
        return _experts(module, name, shape)
    if len(shape) != 2:
        return UNSPLIT
    if isinstance(module, nn.Linear) and name == "weight":
        return _cut(_fused(leaf, parent, shape[0]), axis=0) or MATRIX
    if isinstance(module, Conv1D) and name == "weight":
        return _cut(_fused(leaf, parent, shape[1]), axis=1, transposed=True) or TRANSPOSED
    if isinstance(module, nn.MultiheadAttention):
        thirds = (1, _equal(("q", "k", "v"), shape[0]))
        return _cut(thirds, axis=0) if name == "in_proj_weight" else MATRIX
    if name == "weight" and _native(module) and ("Router" in kind or kind.endswith(("Gate", "Gating"))):
        return MATRIX
    return UNSPLIT


def _native(module: nn.Module) -> bool:
    """Part of transformers itself: only its own classes are known well enough to take a weight apart."""
    return type(module).__module__.startswith("transformers.")


def _cut(cut: Cut | None, axis: int, transposed: bool = False, expert: int | None = None, prefix: str = "") -> Blocks:
    if cut is None:
        return ()
    repetitions, parts = cut
    stride = sum(size for _, size in parts)
    blocks = []
    start = 0
    for label, size in parts:
        ranges = tuple((i * stride + start, i * stride + start + size) for i in range(repetitions))
        blocks.append(Segment(prefix + label, True, transposed, expert, axis, ranges))
        start += size
    return tuple(blocks)


def _equal(labels: tuple[str, ...], rows: int) -> tuple[tuple[str, int], ...]:
    return tuple((label, rows // len(labels)) for label in labels)


def _experts(module: nn.Module, name: str, shape: tuple[int, ...]) -> Blocks:
    """A stack of expert weights: (experts, out, in), or (experts, in, out) in classes that multiply from the left."""
    transposed = bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))
    out = shape[2] if transposed else shape[1]
    cut: Cut | None = None
    if name == "gate_up_proj" and out % 2 == 0:
        concatenated = getattr(module, "is_concatenated", True)
        cut = (1, _equal(("gate", "up"), out)) if concatenated else (out // 2, (("gate", 1), ("up", 1)))
    if cut is None:
        return tuple(Segment(f"experts.{i}", True, transposed, i) for i in range(shape[0]))
    first = _cut(cut, 1 if transposed else 0, transposed, 0)  # the ranges are long where they alternate: share them
    return tuple(
        replace(block, expert=i, label=f"experts.{i}.{block.label}") for i in range(shape[0]) for block in first
    )


def _fused(leaf: str, parent: nn.Module, rows: int) -> Cut | None:
    """How the rows of the linear layer `leaf` of `parent` are shared out, None if it is one matrix (or not known)."""
    rule = _FUSED.get(leaf)
    if rule is None or not _native(parent):
        return None
    cut = rule(parent, rows)
    if cut is None or cut[0] * sum(size for _, size in cut[1]) != rows or any(size <= 0 for _, size in cut[1]):
        return None
    return cut


def _number(module: Any, *names: str) -> int:
    """The first of these attributes that the module or its config has as a number, else 0."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return 0


def _sizes(module: Any) -> tuple[int, int, int]:
    heads = _number(module, "num_heads", "num_attention_heads")
    groups = _number(module, "num_key_value_heads", "num_kv_heads") or heads
    return heads, groups, _number(module, "head_dim", "head_size", "attention_head_size")


def _thirds(module: Any, rows: int) -> Cut | None:
    return (1, _equal(("q", "k", "v"), rows)) if rows % 3 == 0 else None


def _halves(module: Any, rows: int) -> Cut | None:
    return (1, _equal(("gate", "up"), rows)) if rows % 2 == 0 else None


def _grouped(module: Any, rows: int) -> Cut:
    """All query heads, then all key heads, then all value heads; fewer key and value heads than query heads."""
    heads, groups, width = _sizes(module)
    return 1, (("q", heads * width), ("k", groups * width), ("v", groups * width))


def _per_head(module: Any, rows: int) -> Cut:
    """Head by head: its query, key and value rows."""
    heads, _, width = _sizes(module)
    return heads, (("q", width), ("k", width), ("v", width))


def _query_key_value(module: Any, rows: int) -> Cut:
    heads, groups, width = _sizes(module)
    if getattr(module, "new_decoder_architecture", False):  # Falcon: each group of query heads, then its key and value
        return groups, (("q", heads // groups * width), ("k", width), ("v", width)) if groups else ()
    if getattr(module, "multi_query", False):
        return 1, (("q", heads * width), ("k", width), ("v", width))
    return _per_head(module, rows)


def _qkv_proj(module: Any, rows: int) -> Cut:
    kind = type(module).__name__
    if kind.startswith("CodeGen"):  # four slices made for four devices, each with its query, value and key rows
        return 4, (("q", rows // 12), ("v", rows // 12), ("k", rows // 12))
    return _per_head(module, rows) if kind.startswith("MiniMaxLightning") else _grouped(module, rows)


def _qkv(module: Any, rows: int) -> Cut | None:
    query, key = _number(module, "q_dim"), _number(module, "kv_dim")
    return (1, (("q", query), ("k", key), ("v", key))) if query and key else _thirds(module, rows)


def _wqkv(module: Any, rows: int) -> Cut | None:
    return _grouped(module, rows) if hasattr(module, "num_key_value_heads") else _thirds(module, rows)


def _c_attn(module: Any, rows: int) -> Cut | None:
    cross = getattr(module, "is_cross_attention", False)
    if hasattr(module, "multi_query"):  # GPTBigCode
        return None if cross else _query_key_value(module, rows)
    if cross:
        return (1, _equal(("k", "v"), rows)) if rows % 2 == 0 else None
    return _thirds(module, rows)


def _in_proj(module: Any, rows: int) -> Cut | None:
    return _per_head(module, rows) if type(module).__name__ == "DisentangledSelfAttention" else None


def _input_linear(module: Any, rows: int) -> Cut | None:
    return _halves(module, rows) if type(module).__name__.startswith("GraniteMoe") else None


_FUSED: Mapping[str, Callable[[Any, int], Cut | None]] = {
    "qkv": _qkv,
    "qkv_linear": _thirds,
    "att_proj": _thirds,
    "qkv_proj": _qkv_proj,
    "query_key_value": _query_key_value,
    "Wqkv": _wqkv,
    "c_attn": _c_attn,
    "in_proj": _in_proj,
    "gate_up_proj": _halves,
    "Wi": _halves,
    "input_linear": _input_linear,
}
"""Name of a fused linear layer in transformers' own classes -> how its rows are shared out."""


def stored_blocks(group: Group, shape: tuple[int, ...], sizes: tuple[int, ...], memory: tuple[Blocks, ...]) -> Blocks:
    """Blocks of one stored tensor of a group, from those of the in-memory tensors that the group fills.

    Args:
        shape: of the stored tensor.
        sizes: rows of each in-memory tensor.
        memory: blocks of each in-memory tensor.
    """
    if not group.operations:
        return memory[0]
    if not all(block.matrix for blocks in memory for block in blocks):
        return UNSPLIT
    transposed = memory[0][0].transposed
    if group.kinds == ("Transpose",):
        return tuple(
            replace(block, transposed=not transposed, axis=None if block.axis is None else 1 - block.axis)
            for block in memory[0]
        )
    dim = getattr(group.operations[0], "dim", None)
    if group.kinds in (("Chunk",), ("Split",), ("Chunk", "PermuteForRope")) and dim == 0 and len(shape) == 2:
        if all(len(blocks) == 1 for blocks in memory) and sum(sizes) == shape[0] and not transposed:
            return _cut((1, tuple(zip(map(_short, group.outputs), sizes, strict=True))), axis=0)
    # Merged or concatenated in memory: what is stored is one matrix each, as the parts in memory are oriented.
    if len(shape) == 2:
        return TRANSPOSED if transposed else MATRIX
    if len(shape) == 3:
        return tuple(Segment(f"experts.{i}", True, transposed, i) for i in range(shape[0]))
    return UNSPLIT


def _short(name: str) -> str:
    """ "q" for "layers.0.self_attn.q_proj.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")


def guessed_blocks(key: str, shape: tuple[int, ...]) -> Blocks:
    """Blocks of a tensor whose class is not known: a 2-D `weight` that is no embedding is taken for a linear layer."""
    linear = len(shape) == 2 and key.endswith(".weight")
    return MATRIX if linear and not any(word in key for word in ("embed", "wte", "wpe", "position")) else UNSPLIT
