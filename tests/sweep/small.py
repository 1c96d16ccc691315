"""A small random model of every type that transformers knows, from the type's own default configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto


MOST = 30_000_000
"""Elements of the largest model that the sweep makes."""
TASKS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)
"""Tables of transformers in which the class of a type is looked for, the class that people tune first."""
WIDTHS = re.compile(
    r"(^|_)(hidden_size|hidden_sizes|d_model|n_embd|n_inner|dim|dims|embed_dim|embed_dims|embedding_size|inner_dim"
    r"|intermediate_size|ffn_dim|ffn_size|d_ff|d_inner|mlp_dim|hidden_dim|projection_dim|width|embedding_dim"
    r"|hidden_channels|channels|lora_rank|rank|lora_dim|proj_size|ffn_hidden_size|input_width)$"
)
LAYERS = re.compile(r"^(?!.*feat_extract)(.*_)?(n_layers?|layers|num_blocks|depth)$")
WORDS = re.compile(r"(^|_)(vocab_size|vocabulary_size|codebook_size|vocab_size_per_layer_input)$")
EXPERTS = re.compile(r"(^|_)(n_routed_experts|num_experts|num_local_experts|n_experts|moe_num_experts)$")
CHOSEN = re.compile(r"(^|_)(num_experts_per_tok|moe_topk|top_k_experts|moe_k|top_k)$")
TOKENS = re.compile(r"(_token_id|_token_index|_token_ids|_index|_id)$")
PLACES = re.compile(r"(max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx)$")

DERIVED = ("out_features", "out_indices", "stage_names")
"""Keys that follow from the number of layers."""
UNSET = {
    "vocab_size": 128, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "prediction_length": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
}  # fmt: skip
"""What is given for keys that have no value by default."""
HEADS = {"head_dim": 16, "num_key_value_heads": 2, "dropout": 0.0, "dropout_rate": 0.0}
"""What is given for other such keys if a class cannot be built without."""
RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
"""Stands in for a network of the package timm, which the sweep does not need."""


def model_class(kind: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the sweep makes of a type, None if no table of transformers has one."""
    for table in TASKS:
        found = getattr(modeling_auto, table, {}).get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def build(kind: str) -> PreTrainedModel:
    """A model of a type, as small as the type can be made without knowing it.

    Raises:
        ValueError: says why none can be made.
    """
    default = CONFIG_MAPPING[kind]()
    cls = model_class(kind, default)
    if cls is None:
        raise ValueError("is a part of other types, with no class of its own")
    reasons: list[str] = []
    for config in _smaller(default):
        try:
            made = type(default).from_dict(config)
            with torch.device("meta"), initialization.meta_device_safe_creation_ops(), _bounded():
                cls(made)
            torch.manual_seed(0)
            return cls(made).float().eval()
        except Exception as error:  # a class may raise anything at a configuration it was not written for
            reasons.append(" ".join(str(error).split())[:160] or type(error).__name__)
    raise ValueError(f"cannot be made small: {reasons[0]}")


class _bounded:
    """While the block runs, no module is made that brings the elements made so far above `MOST`."""

    def __enter__(self) -> None:
        self.count = 0
        self.hook = nn.modules.module.register_module_parameter_registration_hook(self._measure)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _measure(self, _module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        self.count += 0 if parameter is None else parameter.numel()
        if self.count > MOST:
            raise ValueError(f"has more than {MOST // 1_000_000} million parameters however small it is asked for")


def _smaller(default: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Configurations to be tried, the smallest first."""
    data = json.loads(json.dumps(default.to_dict(), default=str))
    for width in (64, 16, 8, 4, 1):
        for heads in (True, False):
            for layers in (4, 2):
                found = _reduced(data, width, layers, heads)
                if found.get("use_timm_backbone"):
                    found["use_timm_backbone"] = False
                    found["backbone_config"] = RESNET
                yield {"pad_token_id": None, **found}
    for layers in (4, 2):
        found = _reduced(data, 64, layers, True)
        given = {key: value for key, value in found.items() if value is not None}
        yield {"pad_token_id": None, **HEADS, **given}
    yield data


def _reduced(data: Mapping[str, Any], width: int, layers: int, heads: bool) -> dict[str, Any]:
    """The configuration with fewer layers, words and experts; widths are 64, or divided by a smaller number.

    Args:
        heads: whether there are fewer heads too.
    """
    counts = [value for key, value in data.items() if LAYERS.search(key) and type(value) is int]
    said = data.get("num_hidden_layers")
    depth = said if type(said) is int else max(counts, default=0)
    kept = _kept(data, depth, layers)
    result: dict[str, Any] = {}
    for key, value in data.items():
        if key in DERIVED:
            continue
        if key == "per_layer_config" and isinstance(value, dict):
            result[key] = {i: of for i, of in value.items() if int(i) < len(kept)}
        elif isinstance(value, dict) and value.get("model_type") == "timm_backbone":
            result[key] = RESNET
        elif isinstance(value, dict):
            result[key] = value if "__float__" in value else _reduced(value, width, layers, heads)
        elif isinstance(value, list) and depth and len(value) == depth and key != "hidden_sizes":
            result[key] = [value[i] for i in kept]
        elif key in ("depths", "num_blocks", "layers_block_type") and isinstance(value, list):
            result[key] = [min(one, 1) if type(one) is int else one for one in value]
        elif value is None and key in UNSET:
            result[key] = UNSET[key]
        elif type(value) is int:
            result[key] = _number(key, value, width, len(kept) or layers, heads)
        elif isinstance(value, list) and WIDTHS.search(key) and all(type(one) is int for one in value) and width < 64:
            result[key] = [max(8, one // width) for one in value]
        else:
            result[key] = value
    return result


def _number(key: str, value: int, width: int, layers: int, heads: bool) -> int:
    if LAYERS.search(key):
        return min(value, layers)
    if WORDS.search(key):
        return min(value, 128)
    if TOKENS.search(key):
        return value if value < 128 else 3
    if PLACES.search(key):
        return min(value, 128)
    if EXPERTS.search(key):
        return min(value, 4)
    if CHOSEN.search(key):
        return min(value, 2)
    if WIDTHS.search(key) and value > 64:
        return 64 if width == 64 else max(8, value // width)
    if heads and "head" in key and width == 64:
        least = 16 if key.endswith("dim") else 2 if re.search("kv|key_value|group", key) else 4
        return min(value, least)
    if heads and key.endswith("heads") and not re.search("kv|key_value", key):
        return max(1, value // width)
    return value


def _kept(data: Mapping[str, Any], depth: int, layers: int) -> list[int]:
    """Which layers stay: one of every kind that a list of kinds names, and the first ones."""
    kinds = [value for value in data.values() if isinstance(value, list) and depth and len(value) == depth]
    kept = {kind.index(one) for kind in kinds for one in kind if isinstance(one, str)}
    kept |= {i for i in range(min(depth, layers)) if len(kept) < layers}
    return sorted(kept)[: max(layers, math.ceil(len(kept)))]
