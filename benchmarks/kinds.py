"""The families of generated checkpoints: configurations, and the names and shapes of their stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


Config = Mapping[str, object]
Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Kind:
    """One family of generated checkpoints.

    Attributes:
        config: contents of `config.json`.
        shapes: gives the stored tensors of a configuration.
        dtype: torch dtype name of the stored tensors.
        relative: norm of a fine-tune's difference over the norm of the base, tensor by tensor.
        structured: generate the low-rank parts too; False leaves dense noise alone, which is faster to generate.
    """

    config: Config
    shapes: Callable[[Config], Shapes]
    dtype: str
    relative: float
    structured: bool


def number(config: Config, name: str) -> int:
    """An integer of a configuration."""
    return int(str(config[name]))


def clip_vision_shapes(config: Config) -> Shapes:
    """A CLIP vision tower, in the names published checkpoints use."""
    hidden, inner = number(config, "hidden_size"), number(config, "intermediate_size")
    patch, image = number(config, "patch_size"), number(config, "image_size")
    embeddings = "vision_model.embeddings"
    yield f"{embeddings}.class_embedding", (hidden,)
    yield f"{embeddings}.patch_embedding.weight", (hidden, 3, patch, patch)
    yield f"{embeddings}.position_embedding.weight", ((image // patch) ** 2 + 1, hidden)
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for layer in range(number(config, "num_hidden_layers")):
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


def bert_shapes(config: Config) -> Shapes:
    """A BERT encoder with its pooler."""
    hidden, inner = number(config, "hidden_size"), number(config, "intermediate_size")
    yield "embeddings.word_embeddings.weight", (number(config, "vocab_size"), hidden)
    yield "embeddings.position_embeddings.weight", (number(config, "max_position_embeddings"), hidden)
    yield "embeddings.token_type_embeddings.weight", (number(config, "type_vocab_size"), hidden)
    norms, matrices = ["embeddings.LayerNorm"], [("pooler.dense", (hidden, hidden))]
    for layer in range(number(config, "num_hidden_layers")):
        prefix = f"encoder.layer.{layer}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            matrices.append((f"{prefix}.{name}", (hidden, hidden)))
        matrices.append((f"{prefix}.intermediate.dense", (inner, hidden)))
        matrices.append((f"{prefix}.output.dense", (hidden, inner)))
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    for name, shape in matrices:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]
    for norm in norms:
        yield f"{norm}.weight", (hidden,)
        yield f"{norm}.bias", (hidden,)


def llama_matrices(config: Config) -> dict[str, tuple[int, int]]:
    """The matrices of one layer of a Llama, by the names of their modules."""
    hidden, inner = number(config, "hidden_size"), number(config, "intermediate_size")
    narrow = hidden // number(config, "num_attention_heads") * number(config, "num_key_value_heads")
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def llama_shapes(config: Config) -> Shapes:
    """A Llama for causal language modelling."""
    hidden, vocabulary = number(config, "hidden_size"), number(config, "vocab_size")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(number(config, "num_hidden_layers")):
        for name, shape in llama_matrices(config).items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def moe_shapes(config: Config) -> Shapes:
    """A Qwen3 mixture of experts, in the names published checkpoints use: three tensors an expert."""
    hidden, inner = number(config, "hidden_size"), number(config, "moe_intermediate_size")
    head, heads = number(config, "head_dim"), number(config, "num_attention_heads")
    narrow = head * number(config, "num_key_value_heads")
    yield "model.embed_tokens.weight", (number(config, "vocab_size"), hidden)
    for layer in range(number(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (head * heads, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (narrow, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (narrow, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, head * heads)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.mlp.gate.weight", (number(config, "num_experts"), hidden)
        for expert in range(number(config, "num_experts")):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (number(config, "vocab_size"), hidden)


def clip_vision(hidden: int, inner: int, layers: int, heads: int, image: int, patch: int) -> Kind:
    """Vision towers, float32, with spectra like those of trained differences."""
    config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": hidden,
        "image_size": image,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "projection_dim": 512,
        "torch_dtype": "float32",
    }
    return Kind(config, clip_vision_shapes, "float32", 0.02, True)


def bert(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> Kind:
    """Text encoders, float32, with spectra like those of trained differences."""
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "type_vocab_size": 2,
        "vocab_size": vocabulary,
    }
    return Kind(config, bert_shapes, "float32", 0.02, True)


def llama(
    hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, *, tied: bool = False
) -> Kind:
    """Language models, bfloat16, whose fine-tunes differ by plain noise."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    return Kind(config, llama_shapes, "bfloat16", 0.05, False)


def moe(layers: int, experts: int) -> Kind:
    """Mixtures of many experts of a few hundred numbers each, for what a tensor costs by being one."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "moe_intermediate_size": 12,
        "num_attention_heads": 2,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 48,
    }
    return Kind(config, moe_shapes, "bfloat16", 0.05, False)


KINDS = {
    "clip-vision": clip_vision(768, 3072, 12, 12, 224, 32),
    # the same matrices, of which every one is merged by itself
    "clip-vision-layer": clip_vision(768, 3072, 1, 12, 224, 32),
    "bert": bert(768, 3072, 12, 12, 30522),
    "llama": llama(1024, 2816, 16, 16, 16, 32000),
    # once, twice and four times the bytes, with the same largest tensor
    "llama-x1": llama(1024, 2816, 3, 16, 16, 32000),
    "llama-x2": llama(1024, 2816, 11, 16, 16, 32000),
    "llama-x4": llama(1024, 2816, 27, 16, 16, 32000),
    "llama-1b": llama(2048, 8192, 16, 32, 8, 32000, tied=True),
    "moe-1000": moe(5, 64),
    "moe-20000": moe(100, 64),
}
QUICK = {
    "clip-vision": clip_vision(48, 96, 2, 4, 32, 16),
    "clip-vision-layer": clip_vision(48, 96, 1, 4, 32, 16),
    "bert": bert(48, 96, 2, 4, 200),
    "llama": llama(64, 96, 2, 4, 4, 3000),
    "llama-x1": llama(64, 96, 1, 4, 4, 3000),
    "llama-x2": llama(64, 96, 2, 4, 4, 3000),
    "llama-x4": llama(64, 96, 4, 4, 4, 3000),
    "llama-1b": llama(96, 256, 1, 4, 2, 200, tied=True),
    "moe-1000": moe(1, 16),
    "moe-20000": moe(4, 32),
}
"""The same families in sizes that take no time: to see that a benchmark works, not to measure anything."""
