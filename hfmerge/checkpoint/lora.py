"""LoRA adapters as task vectors: which factors change which stored tensor of the base, and by what scale.

The only place that knows PEFT's file format: key suffixes, alpha / r, rank-stabilised scaling, rank and alpha
patterns, `fan_in_fan_out`, `modules_to_save`. Formula: `delta W = scale * B @ A`, `scale = alpha / r`, or `alpha /
sqrt(r)` with `use_rslora`. Source: "LoRA", arXiv 2106.09685, section 4.1; "rsLoRA", arXiv 2312.03732; scaling as PEFT
applies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.patterns import Patterns
from hfmerge.errors import CorruptFileError, ShapeError, UnsupportedError
from hfmerge.task_vector import LowRank
from hfmerge.validation.values import show


if TYPE_CHECKING:
    from hfmerge.checkpoint.layout import Layout
    from hfmerge.checkpoint.reader import Reader

PEFT_PREFIX = "base_model.model."

PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
    "lora_bias": (False, None),
    "bias": ("none", None),
}
"""Fields that change what the weights mean, with the values at which an adapter is plain LoRA."""

CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that alter the base weights at load, so that B @ A alone is not the change."""


@dataclass(frozen=True)
class LoraOrigin:
    """The factors that change one stored tensor of the base.

    Attributes:
        down_key, up_key: stored keys of A (r, in) and B (out, r).
        scale: factor of `B @ A`.
        rank: r.
        swapped: the stored tensor is (in, out): the change is `(B @ A)^T`.
    """

    down_key: str
    up_key: str
    scale: float
    rank: int
    swapped: bool

    def read(self, reader: Reader) -> LowRank:
        """The change as float32 factors shaped like the stored tensor."""
        down, up = reader.value(self.down_key), reader.value(self.up_key) * self.scale
        if self.swapped:
            return LowRank(down.T.contiguous(), up.T.contiguous())
        return LowRank(up, down.clone())


@dataclass(frozen=True)
class AdapterMap:
    """What an adapter holds, in terms of the base.

    Attributes:
        lora: base stored key -> factors.
        replaced: base stored key -> adapter key of a whole copy (`modules_to_save`, or an embedding beneath a LoRA).
        heads: adapter key -> name in the model, for trained modules the base does not have.
    """

    lora: dict[str, LoraOrigin]
    replaced: dict[str, str]
    heads: dict[str, str]


def check_plain(source: Model) -> None:
    """Raise UnsupportedError unless the adapter's configuration is plain LoRA."""
    config = source.adapter or {}
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{source.snapshot.label}: a {kind} adapter; only LoRA is merged (export it as a full model)."
        )
    for name, allowed in PLAIN.items():
        if name in config and config[name] not in allowed:
            raise UnsupportedError(
                f"{source.snapshot.label}: `{name}: {config[name]}` is not plain LoRA; merge it into its base with "
                "peft (merge_and_unload) and give the full model."
            )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGING_INITS) or config.get("loftq_config"):
        raise UnsupportedError(
            f"{source.snapshot.label}: initialised with {init}, which changes the base weights; convert it to plain "
            "LoRA "
            "(peft: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )


def map_adapter(source: Model, base: Layout) -> AdapterMap:
    """Match every tensor of a LoRA adapter with the base, from headers alone.

    Raises:
        UnsupportedError: not plain LoRA. ShapeError: factors do not fit the base. CorruptFileError: a factor is
            missing.
    """
    check_plain(source)
    config = source.adapter or {}
    known = Patterns()
    lora: dict[str, LoraOrigin] = {}
    replaced: dict[str, str] = {}
    heads: dict[str, str] = {}
    for key in source.tensors:
        path = key.removeprefix(PEFT_PREFIX)
        if path.endswith((".lora_B.weight", ".lora_embedding_B")):
            continue
        if path.endswith(".lora_A.weight"):
            module = path.removesuffix(".lora_A.weight")
            up_key = key.replace(".lora_A.weight", ".lora_B.weight")
            _add_lora(lora, source, base, config, known, module, key, up_key)
        elif path.endswith(".lora_embedding_A"):
            module = path.removesuffix(".lora_embedding_A")
            up_key = key.replace(".lora_embedding_A", ".lora_embedding_B")
            _add_lora(lora, source, base, config, known, module, key, up_key)
        elif "lora_" in path or (".base_layer." in path and not path.endswith(".base_layer.weight")):
            raise UnsupportedError(f"{source.snapshot.label}: {key} is not part of plain LoRA.")
        else:
            # the embedding that PEFT saves beneath a LoRA of it is loaded in place of the base's
            _add_copy(replaced, heads, source, base, config, key, path.replace(".base_layer.weight", ".weight"))
    ups = {origin.up_key for origin in lora.values()}
    for key in source.tensors:
        if key.endswith((".lora_B.weight", ".lora_embedding_B")) and key not in ups:
            raise CorruptFileError(
                f"{source.snapshot.label}: {key} has no lora_A beside it; the adapter is incomplete."
            )
    if not lora and not replaced:
        raise UnsupportedError(f"{source.snapshot.label}: changes no parameter of the base {base.architecture}.")
    return AdapterMap(lora, replaced, heads)


def _add_copy(
    replaced: dict[str, str],
    heads: dict[str, str],
    source: Model,
    base: Layout,
    config: Mapping[str, Any],
    key: str,
    path: str,
) -> None:
    """Sort a whole trained parameter into those of the base and those of the adapter's own head."""
    label, shape = source.snapshot.label, source.tensors[key].shape
    target = base.parameter_of_module(path)
    own_head = target in base.heads and target not in base.vocab_axis
    if target is None or (own_head and shape != base.shapes[target]):
        heads[key] = path
        return
    if shape != base.shapes[target]:
        raise ShapeError(
            f"{label}: its copy of {target} is {shape}, the base has {base.shapes[target]}; it was trained on another "
            "base, or on one with more tokens."
        )
    tied = base.canonical[target] in base.memory.ties.values()
    if (tied or target in replaced) and ".base_layer." not in key and not config.get("ensure_weight_tying"):
        raise UnsupportedError(
            f"{label}: trains {path} apart from what the base ties it to (`ensure_weight_tying` is not set); merge it "
            "into its base with peft (merge_and_unload) and give the full model."
        )
    replaced.setdefault(target, key)


def _add_lora(
    lora: dict[str, LoraOrigin],
    source: Model,
    base: Layout,
    config: Mapping[str, Any],
    known: Patterns,
    module: str,
    down_key: str,
    up_key: str,
) -> None:
    label, embedding = source.snapshot.label, down_key.endswith(".lora_embedding_A")
    if up_key not in source.tensors:
        raise CorruptFileError(f"{label}: {down_key} has no lora_B beside it; the adapter is incomplete.")
    target = base.parameter_of_module(module)
    if target is None:
        raise ShapeError(f"{label}: changes {module}, which the base {base.architecture} does not have.")
    down, up = source.tensors[down_key].shape, source.tensors[up_key].shape
    wanted = base.shapes[target]
    if len(down) != 2 or len(up) != 2 or len(wanted) != 2:
        raise UnsupportedError(
            f"{label}: {down_key} {down} changes a {len(wanted)}-D tensor; only matrices are merged."
        )
    rank = down[0]
    if up[1] != rank:
        raise ShapeError(f"{label}: {module}: A has rank {rank}, B has rank {up[1]}.")
    try:
        alpha = matching(known, config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        configured = matching(known, config.get("rank_pattern"), module, config.get("r", 8))
    except ValueError as error:
        raise UnsupportedError(f"{label}: adapter_config.json: {error}.") from error
    if configured != rank:
        raise CorruptFileError(f"{label}: {module}: the configuration says r = {configured}, the file holds {rank}.")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    full = (up[0], down[1])
    swapped = embedding or any(block.transposed for block in base.blocks[target])
    if wanted != (full[::-1] if swapped else full):
        raise ShapeError(
            f"{label}: {module}: the adapter changes {full}, the base has {wanted}; it was trained on another base."
        )
    if target in lora:
        raise UnsupportedError(
            f"{label}: {module} shares its weight with another module that the adapter changes too; merge it into its "
            "base with peft (merge_and_unload) and give the full model."
        )
    lora[target] = LoraOrigin(down_key, up_key, scale, rank, swapped)


def matching(known: Patterns, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module path, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        try:
            if known.fits(pattern, module):
                return value
        except ValueError as error:
            raise ValueError(f"the pattern {show(pattern)} {error}") from error
    return default
