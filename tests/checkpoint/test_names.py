"""Names: stored tensors of many classes and file layouts are understood, moved bit for bit, and cut into matrices."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfmerge.checkpoint.layout import Layout, Match, describe_layout, load_back, match
from hfmerge.errors import CorruptFileError, NotFoundError, ShapeError, UnsupportedError
from hfmerge.task_vector import WHOLE


TEXT = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8}
CLIP_TEXT = {**TEXT, "max_position_embeddings": 20, "projection_dim": 12}
CLIP_VISION = {**IMAGE, "hidden_size": 20, "num_hidden_layers": 3, "patch_size": 4, "projection_dim": 12}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 10,
    "max_target_positions": 10,
    "num_mel_bins": 6,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**TEXT, "max_position_embeddings": 20}),
    "vit": ("ViTConfig", {**IMAGE, "patch_size": 4}),
    "dinov2": ("Dinov2Config", {**IMAGE, "patch_size": 4}),
    "dinov2_swiglu": ("Dinov2Config", {**IMAGE, "patch_size": 4, "use_swiglu_ffn": True}),
    "clip": ("CLIPConfig", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 12}),
    "clip_text": ("CLIPTextConfig", CLIP_TEXT),
    "clip_vision": ("CLIPVisionConfig", CLIP_VISION),
    "t5": ("T5Config", T5),
    "whisper": ("WhisperConfig", WHISPER),
    "llama": ("LlamaConfig", DECODER),
    "llama_tied": ("LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**DECODER, "head_dim": 8}),
    "mixtral": ("MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**DECODER, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": 30, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 20}),
    "phi3": ("Phi3Config", DECODER),
    "gpt_neox": ("GPTNeoXConfig", TEXT),
    "bloom": ("BloomConfig", {"vocab_size": 30, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {**TEXT, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_multi_query": ("FalconConfig", {**TEXT, "multi_query": True}),
    "gpt_oss": ("GptOssConfig", {**DECODER, "num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2}),
    "llama4": ("Llama4TextConfig", {**DECODER, "num_local_experts": 2, "intermediate_size_mlp": 24, "head_dim": 8}),
}
CASES = [
    ("BertModel", "bert"),
    ("BertForSequenceClassification", "bert"),
    ("BertForMaskedLM", "bert"),
    ("ViTModel", "vit"),
    ("ViTForImageClassification", "vit"),
    ("Dinov2Model", "dinov2"),
    ("Dinov2Model", "dinov2_swiglu"),
    ("CLIPModel", "clip"),
    ("CLIPTextModel", "clip_text"),
    ("CLIPVisionModel", "clip_vision"),
    ("CLIPVisionModelWithProjection", "clip_vision"),
    ("T5ForConditionalGeneration", "t5"),
    ("T5EncoderModel", "t5"),
    ("WhisperForConditionalGeneration", "whisper"),
    ("LlamaForCausalLM", "llama"),
    ("LlamaForCausalLM", "llama_tied"),
    ("Qwen3ForCausalLM", "qwen3"),
    ("MixtralForCausalLM", "mixtral"),
    ("Qwen3MoeForCausalLM", "qwen3_moe"),
    ("GPT2LMHeadModel", "gpt2"),
    ("GPT2Model", "gpt2"),
    ("Phi3ForCausalLM", "phi3"),
    ("GPTNeoXForCausalLM", "gpt_neox"),
    ("FalconForCausalLM", "falcon"),
    ("GptOssForCausalLM", "gpt_oss"),
    ("Llama4ForCausalLM", "llama4"),
]


def build(title: str, kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model in which every parameter, norms and biases included, has values of its own."""
    config_class, values = CONFIGS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, title)(getattr(transformers, config_class)(**{**values, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def layout_of(folder: Path) -> Layout:
    return describe_layout(config_of(folder), shapes_of(folder), origin=folder.name)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """The folder with other tensors and changed entries of config.json."""
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **config}))
    return folder


def moved(base: Path, source: Path, found: Match) -> dict[str, Tensor]:
    """The base's file with every value that the source has for it."""
    tensors, theirs = tensors_of(base), tensors_of(source)
    for key, origin in found.origins.items():
        assert theirs.keys() >= set(origin.keys)
        taken = {name: theirs[name] for name in origin.keys}
        value = taken[origin.keys[0]] if not origin.converted else found.converters[key](taken)
        assert value.dtype == tensors[key].dtype
        tensors[key] = value
    return tensors


def assert_equal_state(found: nn.Module, expected: nn.Module) -> None:
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(state[name], wanted[name]), name


@pytest.mark.parametrize(("title", "kind"), CASES)
@pytest.mark.parametrize("original", [True, False], ids=["original", "as_in_memory"])
def test_every_stored_tensor_is_understood(title: str, kind: str, original: bool, tmp_path: Path) -> None:
    base = save(build(title, kind), tmp_path / "base", save_original_format=original)
    tuned = save(build(title, kind, seed=1), tmp_path / "tuned", save_original_format=original)
    layout = layout_of(base)
    assert layout.architecture == title
    assert (layout.missing, layout.unexpected, layout.tied) == ((), (), {})
    assert list(layout.canonical) == list(layout.shapes) == list(layout.blocks)
    assert len(set(layout.canonical.values())) == len(layout.shapes)
    found = match(layout, layout_of(tuned))
    assert (found.extra, found.absent) == ((), ())
    assert {key: (origin.keys, origin.converted) for key, origin in found.origins.items()} == {
        key: ((key,), False) for key in layout.shapes
    }
    for key, shape in layout.shapes.items():
        assert_cut_and_put_back(layout, key, torch.arange(torch.Size(shape).numel()).reshape(shape))
    assert load_back(base) == ((), ())


def assert_cut_and_put_back(layout: Layout, key: str, stored: Tensor) -> None:
    seen = torch.zeros_like(stored)
    rebuilt = torch.full_like(stored, -1)
    for block in layout.blocks[key]:
        piece = block.take(stored)
        assert tuple(piece.shape) == block.shape(tuple(stored.shape))
        assert piece.ndim == 2 or not block.matrix
        seen.view(-1).index_add_(0, piece.reshape(-1), torch.ones(piece.numel(), dtype=seen.dtype))
        block.put(rebuilt, piece)
    assert torch.equal(seen, torch.ones_like(seen)), key
    assert torch.equal(rebuilt, stored), key
    labels = [block.label for block in layout.blocks[key]]
    assert len(set(labels)) == len(labels)


Part = Callable[[Any], nn.Module]


def same(model: Any) -> nn.Module:
    return model


@dataclass(frozen=True)
class Pair:
    """A base, a source, and the part of either that must be equal after moving the source into the base's file."""

    base: tuple[str, str]
    source: tuple[str, str]
    in_base: Part = same
    in_source: Part = same
    base_original: bool = True
    source_original: bool = True
    extra: int = 0
    absent: int = 0


MOE = [
    Pair((title, kind), (title, kind), base_original=mine, source_original=its)
    for title, kind in (("MixtralForCausalLM", "mixtral"), ("Qwen3MoeForCausalLM", "qwen3_moe"))
    for mine, its in ((True, False), (False, True), (True, True), (False, False))
]
PAIRS = [
    Pair(("BertModel", "bert"), ("BertForSequenceClassification", "bert"), same, lambda m: m.bert, extra=2),
    Pair(("BertForSequenceClassification", "bert"), ("BertModel", "bert"), lambda m: m.bert, absent=2),
    Pair(
        ("BertForSequenceClassification", "bert"),
        ("BertForMaskedLM", "bert"),
        lambda m: m.bert.encoder,
        lambda m: m.bert.encoder,
        extra=5,
        absent=4,
    ),
    Pair(("BertForMaskedLM", "bert"), ("BertForMaskedLM", "bert")),
    Pair(
        ("ViTModel", "vit"),
        ("ViTForImageClassification", "vit"),
        lambda m: m.layers,
        lambda m: m.vit.layers,
        extra=2,
        absent=2,
    ),
    Pair(("ViTForImageClassification", "vit"), ("ViTForImageClassification", "vit"), source_original=False),
    Pair(("Dinov2Model", "dinov2"), ("Dinov2Model", "dinov2"), source_original=False),
    Pair(("Dinov2Model", "dinov2_swiglu"), ("Dinov2Model", "dinov2_swiglu"), source_original=False),
    Pair(("Dinov2Model", "dinov2_swiglu"), ("Dinov2Model", "dinov2_swiglu"), base_original=False),
    Pair(("CLIPModel", "clip"), ("CLIPModel", "clip")),
    Pair(("CLIPModel", "clip"), ("CLIPVisionModel", "clip_vision"), lambda m: m.vision_model, absent=39),
    Pair(("CLIPModel", "clip"), ("CLIPTextModel", "clip_text"), lambda m: m.text_model, absent=58),
    Pair(
        ("CLIPModel", "clip"),
        ("CLIPVisionModelWithProjection", "clip_vision"),
        lambda m: nn.ModuleList([m.vision_model, m.visual_projection]),
        lambda m: nn.ModuleList([m.vision_model, m.visual_projection]),
        absent=38,
    ),
    Pair(("CLIPVisionModel", "clip_vision"), ("CLIPModel", "clip"), same, lambda m: m.vision_model, extra=39),
    Pair(("T5ForConditionalGeneration", "t5"), ("T5ForConditionalGeneration", "t5")),
    Pair(
        ("T5ForConditionalGeneration", "t5"),
        ("T5EncoderModel", "t5"),
        lambda m: m.encoder,
        lambda m: m.encoder,
        absent=28,
    ),
    Pair(("WhisperForConditionalGeneration", "whisper"), ("WhisperForConditionalGeneration", "whisper")),
    Pair(("WhisperForConditionalGeneration", "whisper"), ("WhisperModel", "whisper"), lambda m: m.model),
    Pair(("LlamaForCausalLM", "llama"), ("LlamaForCausalLM", "llama")),
    Pair(("LlamaForCausalLM", "llama"), ("LlamaForCausalLM", "llama_tied")),
    Pair(("LlamaForCausalLM", "llama_tied"), ("LlamaForCausalLM", "llama_tied")),
    Pair(
        ("LlamaForCausalLM", "llama_tied"),
        ("LlamaForCausalLM", "llama"),
        lambda m: m.model,
        lambda m: m.model,
        extra=1,
    ),
    Pair(("LlamaForCausalLM", "llama"), ("LlamaModel", "llama"), lambda m: m.model, absent=1),
    Pair(("Qwen3ForCausalLM", "qwen3"), ("Qwen3ForCausalLM", "qwen3")),
    *MOE,
    Pair(("MixtralModel", "mixtral"), ("MixtralForCausalLM", "mixtral"), same, lambda m: m.model, False, extra=1),
    Pair(("GPT2LMHeadModel", "gpt2"), ("GPT2LMHeadModel", "gpt2")),
    Pair(("GPT2LMHeadModel", "gpt2"), ("GPT2Model", "gpt2"), lambda m: m.transformer),
    Pair(("Phi3ForCausalLM", "phi3"), ("Phi3ForCausalLM", "phi3")),
    Pair(("GPTNeoXForCausalLM", "gpt_neox"), ("GPTNeoXModel", "gpt_neox"), lambda m: m.gpt_neox, absent=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.base[0]}-{pair.source[0]}-{pair.source[1]}")
def test_values_move_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    original = build(*pair.base)
    base = save(original, tmp_path / "base", save_original_format=pair.base_original)
    model = build(*pair.source, seed=1)
    source = save(model, tmp_path / "source", save_original_format=pair.source_original)
    ours = layout_of(base)
    found = match(ours, layout_of(source))
    assert (len(found.extra), len(found.absent)) == (pair.extra, pair.absent)
    assert set(found.origins) | set(found.absent) | set(ours.tied) == set(ours.shapes)
    if pair.base_original == pair.source_original:
        assert all(not origin.converted and len(origin.keys) == 1 for origin in found.origins.values())
    shutil.copytree(base, tmp_path / "before")
    rewrite(base, moved(base, source, found))
    assert load_back(base) == ((), ())
    result = type(original).from_pretrained(base)
    assert_equal_state(pair.in_base(result), pair.in_source(model))
    kept, before = tensors_of(base), tensors_of(tmp_path / "before")
    assert all(torch.equal(kept[key], before[key]) for key in found.absent)


def test_only_needed_tensors_are_read(tmp_path: Path) -> None:
    stacked = layout_of(save(build("MixtralForCausalLM", "mixtral"), tmp_path / "a", save_original_format=False))
    single = layout_of(save(build("MixtralForCausalLM", "mixtral"), tmp_path / "b"))
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    origin = match(single, stacked).origins[key]
    assert origin.keys == ("model.layers.1.mlp.experts.gate_up_proj",)
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    keys = match(stacked, single).origins[stack].keys
    wanted = [f"model.layers.1.block_sparse_moe.experts.{i}.{w}.weight" for w in ("w1", "w3") for i in range(4)]
    assert list(keys) == wanted
    assert single.canonical[key] == "layers.1.mlp.experts.gate_up_proj#2.1"
    assert stacked.canonical[stack] == "layers.1.mlp.experts.gate_up_proj"


def test_heads_ties_and_vocabulary(tmp_path: Path) -> None:
    classifier = layout_of(save(build("BertForSequenceClassification", "bert"), tmp_path / "a"))
    assert classifier.heads == ("classifier.bias", "classifier.weight")
    assert classifier.vocab_axis == {"bert.embeddings.word_embeddings.weight": 0}
    masked = layout_of(save(build("BertForMaskedLM", "bert"), tmp_path / "b"))
    assert all(key.startswith("cls.") for key in masked.heads) and len(masked.heads) == 5
    assert masked.vocab_axis == {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0}
    untied = layout_of(save(build("LlamaForCausalLM", "llama"), tmp_path / "c"))
    assert untied.heads == ("lm_head.weight",)
    assert untied.vocab_axis == {"lm_head.weight": 0, "model.embed_tokens.weight": 0}
    tied = layout_of(save(build("LlamaForCausalLM", "llama_tied"), tmp_path / "d"))
    assert tied.heads == () and tied.vocab_axis == {"model.embed_tokens.weight": 0}
    assert layout_of(save(build("CLIPModel", "clip"), tmp_path / "f")).heads == ()


def test_a_file_with_both_tied_tensors_names_the_copy(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", "llama_tied")
    folder = save(model, tmp_path / "both")
    tensors = tensors_of(folder)
    rewrite(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    both = layout_of(folder)
    assert both.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert both.heads == () and both.missing == ()
    assert "lm_head.weight" not in match(both, both).origins
    assert match(layout_of(save(model, tmp_path / "one")), both).extra == ()


@pytest.mark.parametrize("said", ["tie_word_embeddings", "scale_decoder_outputs"])
def test_t5_with_a_head_of_its_own(said: str, tmp_path: Path) -> None:
    """The class of T5 ties always; files that keep `lm_head` apart are loaded untied because the values differ."""
    model = build("T5ForConditionalGeneration", "t5", seed=1)
    base = save(build("T5ForConditionalGeneration", "t5"), tmp_path / "base")
    folder = save(model, tmp_path / "apart")
    head, copy = torch.randn(30, 16), model.shared.weight.detach()
    for place, first in ((base, torch.zeros(30, 16)), (folder, head)):
        tensors = {**tensors_of(place), "lm_head.weight": first}
        rewrite(place, {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}, **{said: False})
    ours, theirs = layout_of(base), layout_of(folder)
    assert ours.heads == ("lm_head.weight",)  # encoder and decoder lie at the top, so no prefix tells it
    assert ours.tied == {"encoder.embed_tokens.weight": "shared.weight"}
    assert ours.vocab_axis["lm_head.weight"] == 0
    assert ours.parameter_of_module("lm_head") == "lm_head.weight"
    tensors = moved(base, folder, match(ours, theirs))
    assert torch.equal(tensors["lm_head.weight"], head) and torch.equal(tensors["shared.weight"], copy)
    rewrite(base, {**tensors, "encoder.embed_tokens.weight": copy})
    result = type(model).from_pretrained(base)
    assert torch.equal(result.lm_head.weight, head) and torch.equal(result.shared.weight, copy)


def test_a_file_with_only_the_copy_owns_the_value(tmp_path: Path) -> None:
    """T5 files of other libraries hold `lm_head.weight` and one encoder embedding, and no `shared.weight`."""
    base = save(build("LlamaForCausalLM", "llama_tied"), tmp_path / "base")
    model = build("LlamaForCausalLM", "llama_tied", seed=1)
    folder = save(model, tmp_path / "copy")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    rewrite(folder, tensors)
    layout = layout_of(folder)
    assert (layout.missing, layout.tied, layout.heads) == ((), {}, ())
    assert layout.canonical["lm_head.weight"] == "embed_tokens.weight"
    assert layout.blocks["lm_head.weight"] == (WHOLE,)
    assert layout.parameter_of_module("model.embed_tokens") == "lm_head.weight"
    found = match(layout_of(base), layout)
    assert found.origins["model.embed_tokens.weight"].keys == ("lm_head.weight",)
    rewrite(base, moved(base, folder, found))
    assert_equal_state(type(model).from_pretrained(base), model)


def test_an_untied_source_keeps_its_own_head(tmp_path: Path) -> None:
    tied = layout_of(save(build("LlamaForCausalLM", "llama_tied"), tmp_path / "a"))
    untied = layout_of(save(build("LlamaForCausalLM", "llama"), tmp_path / "b"))
    assert match(tied, untied).extra == ("lm_head.weight",)
    assert match(untied, tied).origins["lm_head.weight"].keys == ("model.embed_tokens.weight",)


def test_names_of_old_files(tmp_path: Path) -> None:
    model = build("BertModel", "bert", seed=1)
    base = save(build("BertForSequenceClassification", "bert"), tmp_path / "base")
    old = save(model, tmp_path / "old")
    renamed = {
        "bert." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors_of(old).items()
    }
    rewrite(old, {**renamed, "bert.embeddings.position_ids": torch.arange(20)[None]})
    layout = layout_of(old)
    assert layout.missing == () and layout.unexpected == ("bert.embeddings.position_ids",)
    assert layout.canonical["bert.embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"
    found = match(layout_of(base), layout)
    assert found.extra == ("bert.embeddings.position_ids",)
    assert found.absent == ("classifier.bias", "classifier.weight")
    rewrite(base, moved(base, old, found))
    assert_equal_state(transformers.BertForSequenceClassification.from_pretrained(base).bert, model)
    assert load_back(old) == ((), ())  # transformers itself ignores position_ids
    again = match(layout, layout)
    assert again.origins["bert.embeddings.position_ids"].keys == ("bert.embeddings.position_ids",)


@pytest.mark.slow
def test_prefixes_of_clip_towers(tmp_path: Path) -> None:
    """Towers are saved with and without `vision_model.`; both are the same tower."""
    model = build("CLIPVisionModel", "clip_vision", seed=1)
    base = save(build("CLIPModel", "clip"), tmp_path / "base")
    bare = save(model, tmp_path / "tower")
    long = {"vision_model." + key.removeprefix("vision_model."): value for key, value in tensors_of(bare).items()}
    short = {key.removeprefix("vision_model."): value for key, value in long.items()}
    for tensors in (long, short):
        rewrite(bare, tensors)
        layout = layout_of(bare)
        assert (layout.missing, layout.unexpected) == ((), ())
        rewrite(base, moved(base, bare, match(layout_of(base), layout)))
        assert_equal_state(transformers.CLIPModel.from_pretrained(base).vision_model, model)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = save(build("BertForSequenceClassification", "bert"), tmp_path / "bert")
    whole = layout_of(folder)
    tensors = tensors_of(folder)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    broken = layout_of(rewrite(folder, tensors))
    assert broken.missing == ("bert.encoder.layer.1.output.dense.weight",)
    with pytest.raises(CorruptFileError, match=r"bert: 1 parameters .* encoder\.layer\.1\.output\.dense\.weight"):
        match(whole, broken)
    assert load_back(folder) == (("bert.encoder.layer.1.output.dense.weight",), ())


@pytest.mark.parametrize("lost", ["experts.2.w1.", "experts.3.w1.", "w3.", "experts.3."])
def test_missing_experts_are_named(lost: str, tmp_path: Path) -> None:
    folder = save(build("MixtralForCausalLM", "mixtral"), tmp_path / "mixtral")
    whole = layout_of(folder)
    tensors = {key: value for key, value in tensors_of(folder).items() if lost not in key or "layers.1" not in key}
    broken = layout_of(rewrite(folder, tensors))
    assert "model.layers.1.mlp.experts.gate_up_proj" in broken.missing
    assert len(broken.missing) == (2 if lost == "experts.3." else 1)
    assert list(broken.canonical) == list(tensors)
    with pytest.raises(CorruptFileError, match="are not stored"):
        match(whole, broken)


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    base = layout_of(save(build("LlamaForCausalLM", "llama"), tmp_path / "base"))
    deeper = layout_of(save(build("LlamaForCausalLM", "llama", num_hidden_layers=3), tmp_path / "deeper"))
    for one, other in ((base, deeper), (deeper, base)):
        with pytest.raises(ShapeError, match=r"another number of layers: layers\.2\."):
            match(one, other)
    wider = layout_of(save(build("LlamaForCausalLM", "llama", intermediate_size=32), tmp_path / "wider"))
    with pytest.raises(ShapeError, match=r"wider: layers.0.mlp.gate_proj.weight is \(32, 16\), base has \(24, 16\)"):
        match(base, wider)
    vit = layout_of(save(build("ViTModel", "vit"), tmp_path / "vit"))
    with pytest.raises(UnsupportedError, match="no parameter in common"):
        match(base, vit)
    words = layout_of(save(build("LlamaForCausalLM", "llama", vocab_size=40), tmp_path / "words"))
    assert match(base, words).origins["lm_head.weight"].keys == ("lm_head.weight",)  # rows are the caller's to align
    three = build("BertForSequenceClassification", "bert", num_labels=3)
    two = layout_of(save(build("BertForSequenceClassification", "bert"), tmp_path / "two"))
    found = match(two, layout_of(save(three, tmp_path / "three")))
    assert found.origins["classifier.weight"].keys == ("classifier.weight",)


@pytest.mark.slow
def test_a_tower_is_found_by_its_class(tmp_path: Path) -> None:
    encoder = build("BertModel", "bert", seed=1)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.CLIPVisionConfig(**CLIP_VISION), encoder.config, projection_dim=8
    )
    base = save(transformers.VisionTextDualEncoderModel(config), tmp_path / "both")
    source = save(encoder, tmp_path / "one")
    found = match(layout_of(base), layout_of(source))
    assert found.extra == () and not any(key.startswith("text_model.") for key in found.absent)
    rewrite(base, moved(base, source, found))
    assert_equal_state(transformers.VisionTextDualEncoderModel.from_pretrained(base).text_model, encoder)


@pytest.mark.slow
def test_a_tower_that_fits_twice_is_refused(tmp_path: Path) -> None:
    settings = [build("BertModel", "bert").config for _ in range(2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*settings)
    both = layout_of(save(transformers.EncoderDecoderModel(config), tmp_path / "both"))
    assert match(both, both).absent == ()
    encoder = layout_of(save(build("BertModel", "bert"), tmp_path / "encoder"))
    found = match(both, encoder)  # only the encoder has a pooler
    assert all(key.startswith("decoder.") for key in found.absent)
    decoder = layout_of(save(build("BertLMHeadModel", "bert", is_decoder=True), tmp_path / "decoder"))
    with pytest.raises(UnsupportedError, match=r"decoder fits both equally well as 'encoder' or 'decoder\.bert'"):
        match(both, decoder)


@pytest.mark.slow
def test_config_decides_the_class(tmp_path: Path) -> None:
    folder = save(build("BertForSequenceClassification", "bert"), tmp_path / "bert")
    config, shapes = config_of(folder), shapes_of(folder)
    plain = describe_layout({**config, "architectures": None}, shapes, origin="bert")
    assert plain.architecture == "BertModel" and plain.unexpected == ("classifier.bias", "classifier.weight")
    other = describe_layout({**config, "architectures": ["OurBertWithExtras"]}, shapes, origin="bert")
    assert other.architecture == "BertModel"
    kernel = describe_layout({**config, "_attn_implementation": "flash_attention_2"}, shapes, origin="bert")
    assert kernel.missing == ()
    with pytest.raises(UnsupportedError, match=r"bert: .* no class for architecture Nope, model_type nope"):
        describe_layout({"architectures": ["Nope"], "model_type": "nope"}, shapes, origin="bert")
    with pytest.raises(UnsupportedError, match=r"bert: transformers cannot .*Bert"):
        describe_layout({**config, "hidden_size": 15}, shapes, origin="bert")
    with pytest.raises(
        ShapeError, match=r"bert: bert\.embeddings\.word_embeddings\.weight gives .*\(30, 16\).*\(31, 16\)"
    ):
        describe_layout({**config, "vocab_size": 31}, shapes, origin="bert")
    tower = save(build("CLIPVisionModel", "clip_vision"), tmp_path / "tower")
    whole = save(build("CLIPModel", "clip"), tmp_path / "clip")
    mixed = {**config_of(whole), "architectures": ["CLIPVisionModel"]}  # the whole model's config beside one tower
    assert describe_layout(mixed, shapes_of(tower), origin="tower").missing == ()


@pytest.mark.parametrize("section", [None, "text_config"])
def test_quantised_weights_are_refused(section: str | None, tmp_path: Path) -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert"}
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UnsupportedError, match="some/model: quantised with gptq in 4 bits, which"):
        describe_layout({**config, **({section: quantised} if section else quantised)}, {}, origin="some/model")
    assert (
        describe_layout({**config, "quantization_config": None}, {}, origin="some/model").architecture == "BertModel"
    )


def test_two_layouts_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = save(build("MixtralForCausalLM", "mixtral"), tmp_path / "mixtral")
    shapes = {**shapes_of(folder), "model.layers.0.mlp.experts.down_proj": (4, 16, 24)}
    with pytest.raises(CorruptFileError, match=r"mixtral: .*both fill model\.layers\.0\.mlp\.experts\.down_proj"):
        describe_layout(config_of(folder), shapes, origin="mixtral")
    bert = save(build("BertModel", "bert"), tmp_path / "bert")
    twice = {**shapes_of(bert), "bert.pooler.dense.bias": (16,)}
    layout = describe_layout(config_of(bert), twice, origin="bert")
    assert layout.unexpected == ("pooler.dense.bias",)  # the loader takes the first of the two
    assert len(set(layout.canonical.values())) == len(twice)


MODULES = [
    ("ViTForImageClassification", "vit", "vit.encoder.layer.0.attention.attention.query", 0),
    ("ViTForImageClassification", "vit", "vit.layers.0.attention.q_proj", 0),
    ("ViTForImageClassification", "vit", "layers.0.attention.q_proj", 0),
    ("ViTForImageClassification", "vit", "encoder.layer.0.attention.attention.query", 0),
    ("ViTForImageClassification", "vit", "classifier", "classifier.weight"),
    ("BertModel", "bert", "bert.encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.query.weight"),
    ("BertModel", "bert", "classifier", None),
    ("BertForMaskedLM", "bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
    ("LlamaForCausalLM", "llama", "lm_head", "lm_head.weight"),
    ("LlamaForCausalLM", "llama_tied", "lm_head", "model.embed_tokens.weight"),
    ("LlamaForCausalLM", "llama", "layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
    ("LlamaForCausalLM", "llama", "model.layers.9.mlp.up_proj", None),
    ("CLIPVisionModel", "clip_vision", "vision_model.encoder.layers.0.self_attn.q_proj", 1),
    ("CLIPVisionModel", "clip_vision", "encoder.layers.0.self_attn.q_proj", 1),
    ("MixtralForCausalLM", "mixtral", "model.layers.0.block_sparse_moe.experts.3.w3", 2),
    ("MixtralForCausalLM", "mixtral", "layers.0.mlp.experts.3.w3", 2),
    ("MixtralForCausalLM", "mixtral", "model.layers.0.mlp.experts.4.w3", None),
    ("MixtralForCausalLM", "mixtral", "model.layers.0.mlp.experts.gate_up_proj", None),
    ("GPT2LMHeadModel", "gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn.weight"),
    ("GPT2LMHeadModel", "gpt2", "h.0.attn.c_attn", "transformer.h.0.attn.c_attn.weight"),
    ("Dinov2Model", "dinov2_swiglu", "encoder.layer.0.mlp.gate_proj", None),
]
STORED = {
    0: "vit.encoder.layer.0.attention.attention.query.weight",
    1: "encoder.layers.0.self_attn.q_proj.weight",
    2: "model.layers.0.block_sparse_moe.experts.3.w3.weight",
}


@pytest.mark.parametrize(("title", "kind", "path", "expected"), MODULES)
def test_modules_of_adapters_are_found(
    title: str, kind: str, path: str, expected: int | str | None, tmp_path: Path
) -> None:
    layout = layout_of(save(build(title, kind), tmp_path / "model"))
    wanted = STORED[expected] if isinstance(expected, int) else expected
    assert layout.parameter_of_module(path) == wanted
    assert wanted is None or wanted in layout.shapes


def test_modules_are_found_in_a_stacked_file(tmp_path: Path) -> None:
    layout = layout_of(save(build("MixtralForCausalLM", "mixtral"), tmp_path / "a", save_original_format=False))
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert layout.parameter_of_module("layers.0.mlp.experts.gate_up_proj") == stack
    assert layout.parameter_of_module("model.layers.0.mlp.experts.0.w1") is None


def test_conv1d_parts_are_what_attention_multiplies_with(tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", "gpt2")
    folder = save(model, tmp_path / "gpt2")
    layout, tensors = layout_of(folder), tensors_of(folder)
    attention = model.transformer.h[1].attn
    key = "transformer.h.1.attn.c_attn.weight"
    blocks = layout.blocks[key]
    assert [block.label for block in blocks] == ["q", "k", "v"]
    x = torch.randn(3, 16)
    parts = attention.c_attn(x).split(attention.split_size, dim=-1)
    biases = attention.c_attn.bias.split(attention.split_size)
    for block, part, bias in zip(blocks, parts, biases, strict=True):
        torch.testing.assert_close(nn.functional.linear(x, block.take(tensors[key]), bias), part)
    (block,) = layout.blocks["transformer.h.1.mlp.c_fc.weight"]
    assert block.transposed and block.matrix
    w, b = block.take(tensors["transformer.h.1.mlp.c_fc.weight"]), tensors["transformer.h.1.mlp.c_fc.bias"]
    torch.testing.assert_close(nn.functional.linear(x, w, b), model.transformer.h[1].mlp.c_fc(x))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(("title", "kind"), [("MixtralForCausalLM", "mixtral"), ("Qwen3MoeForCausalLM", "qwen3_moe")])
def test_expert_blocks_are_what_the_experts_multiply_with(
    title: str, kind: str, original: bool, tmp_path: Path
) -> None:
    model = build(title, kind)
    folder = save(model, tmp_path / "model", save_original_format=original)
    layout, tensors = layout_of(folder), tensors_of(folder)
    experts = model.model.layers[1].mlp.experts
    if original:
        names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        where = "block_sparse_moe" if kind == "mixtral" else "mlp"
        keys = [f"model.layers.1.{where}.experts.2.{name}.weight" for name in names]
        assert all(len(layout.blocks[key]) == 1 for key in keys)
        gate, up, down = (layout.blocks[key][0].take(tensors[key]) for key in keys)
    else:
        both, last = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
        blocks = {block.label: block.take(tensors[both]) for block in layout.blocks[both]}
        blocks |= {block.label: block.take(tensors[last]) for block in layout.blocks[last]}
        gate, up, down = blocks["experts.2.gate"], blocks["experts.2.up"], blocks["experts.2"]
    x = torch.randn(3, 16)
    expected = experts(x, torch.full((3, 1), 2), torch.ones(3, 1))
    found = nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T
    torch.testing.assert_close(found, expected)


def test_transposed_experts(tmp_path: Path) -> None:
    """Two classes multiply from the left: one stores gate and up side by side, one stores them alternating."""
    model = build("Llama4ForCausalLM", "llama4")
    folder = save(model, tmp_path / "llama4")
    layout, tensors = layout_of(folder), tensors_of(folder)
    prefix = "model.layers.1.feed_forward.experts."
    parts = {}
    for name in ("gate_up_proj", "down_proj"):
        parts |= {block.label: block.take(tensors[prefix + name]) for block in layout.blocks[prefix + name]}
    x = torch.randn(2, 3, 16)
    found = [
        (x[i] @ parts[f"experts.{i}.up"].T * nn.functional.silu(x[i] @ parts[f"experts.{i}.gate"].T))
        @ parts[f"experts.{i}"].T
        for i in range(2)
    ]
    experts = model.model.layers[1].feed_forward.experts
    torch.testing.assert_close(torch.cat(found), experts(x.reshape(-1, 16)))

    oss = build("GptOssForCausalLM", "gpt_oss").model.layers[1].mlp.experts
    with torch.no_grad():
        oss.gate_up_proj_bias.zero_()
    blocks = layout_of(save(build("GptOssForCausalLM", "gpt_oss"), tmp_path / "oss")).blocks
    cut = {block.label: block for block in blocks["model.layers.1.mlp.experts.gate_up_proj"]}
    down = {block.label: block for block in blocks["model.layers.1.mlp.experts.down_proj"]}
    x = torch.randn(3, 16)
    gate = (x @ cut["experts.2.gate"].take(oss.gate_up_proj).T).clamp(max=oss.limit)
    up = (x @ cut["experts.2.up"].take(oss.gate_up_proj).T).clamp(-oss.limit, oss.limit)
    inner = (up + 1) * gate * torch.sigmoid(gate * oss.alpha)
    wanted = inner @ down["experts.2"].take(oss.down_proj).T + oss.down_proj_bias[2]
    torch.testing.assert_close(oss(x, torch.full((3, 1), 2), torch.ones(3, 1)), wanted)


FUSED = [
    ("Phi3ForCausalLM", "phi3", "self_attn.qkv_proj", "self_attn.o_proj", (16, 8, 8)),
    ("GPTNeoXForCausalLM", "gpt_neox", "attention.query_key_value", "attention.dense", (16, 16, 16)),
    ("BloomForCausalLM", "bloom", "self_attention.query_key_value", "self_attention.dense", (16, 16, 16)),
    ("FalconForCausalLM", "falcon", "self_attention.query_key_value", "self_attention.dense", (16, 8, 8)),
    ("FalconForCausalLM", "falcon_multi_query", "self_attention.query_key_value", "self_attention.dense", (16, 4, 4)),
]


@pytest.mark.parametrize(("title", "kind", "fused", "after", "sizes"), FUSED)
def test_fused_attention_is_cut_into_query_key_and_value(
    title: str, kind: str, fused: str, after: str, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """Without values attention gives nothing; without queries or without keys it averages, the same either way."""
    model = build(title, kind, attn_implementation="eager")
    layout = layout_of(save(model, tmp_path / "model"))
    (key,) = (key for key in layout.shapes if f".0.{fused}.weight" in key)
    assert tuple(block.shape(layout.shapes[key])[0] for block in layout.blocks[key]) == sizes
    layer = model.get_submodule(key.removesuffix(".weight"))
    assert isinstance(layer, nn.Linear)
    seen: list[Tensor] = []
    model.get_submodule(key.replace(f"{fused}.weight", after)).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().clone())
    )
    words = torch.arange(1, 9)[None]
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        weight = layer.weight.clone()
        model(words)
        for block in layout.blocks[key]:
            layer.weight.copy_(weight)
            block.put(layer.weight, torch.zeros(block.shape(layout.shapes[key])))
            model(words)
    full, no_query, no_key, no_value = seen
    assert [block.label for block in layout.blocks[key]] == ["q", "k", "v"]
    assert torch.equal(no_value, torch.zeros_like(full)) and not torch.equal(full, torch.zeros_like(full))
    torch.testing.assert_close(no_query, no_key)
    assert not torch.allclose(no_query, full)


def test_fused_feed_forward_is_cut_into_gate_and_up(tmp_path: Path) -> None:
    model = build("Phi3ForCausalLM", "phi3")
    layout = layout_of(save(model, tmp_path / "phi3"))
    mlp = model.model.layers[0].mlp
    gate, up = (
        block.take(mlp.gate_up_proj.weight) for block in layout.blocks["model.layers.0.mlp.gate_up_proj.weight"]
    )
    x = torch.randn(3, 16)
    torch.testing.assert_close(mlp.down_proj(nn.functional.silu(x @ gate.T) * (x @ up.T)), mlp(x))


def test_a_fused_file_tensor_is_cut_into_what_it_becomes(tmp_path: Path) -> None:
    model = build("Dinov2Model", "dinov2_swiglu")
    folder = save(model, tmp_path / "dinov2")
    layout, tensors = layout_of(folder), tensors_of(folder)
    key = "encoder.layer.1.mlp.weights_in.weight"
    gate, up = layout.blocks[key]
    assert (gate.label, up.label) == ("gate", "up")
    mlp = model.encoder.layer[1].mlp
    assert torch.equal(gate.take(tensors[key]), mlp.gate_proj.weight)
    assert torch.equal(up.take(tensors[key]), mlp.up_proj.weight)
    assert layout.canonical[key] == "encoder.layer.1.mlp.gate_proj.weight+encoder.layer.1.mlp.up_proj.weight"


def test_what_is_a_matrix(tmp_path: Path) -> None:
    layout = layout_of(save(build("CLIPModel", "clip"), tmp_path / "clip"))
    matrices = {key for key, blocks in layout.blocks.items() if blocks[0].matrix}
    assert matrices == {
        key
        for key, shape in layout.shapes.items()
        if len(shape) == 2 and key.endswith(".weight") and "embedding" not in key
    }
    assert layout.blocks["vision_model.embeddings.patch_embedding.weight"] == (WHOLE,)
    assert layout.blocks["text_model.embeddings.token_embedding.weight"] == (WHOLE,)
    mixtral = layout_of(save(build("MixtralForCausalLM", "mixtral"), tmp_path / "mixtral"))
    assert mixtral.blocks["model.layers.0.block_sparse_moe.gate.weight"][0].matrix  # the router, no nn.Linear


MODELING = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class PlainConfig(PreTrainedConfig):
    model_type = "plain-of-their-own"
    def __init__(self, width=6, **more):
        super().__init__(**more)
        self.width = width

class PlainModel(PreTrainedModel):
    config_class = PlainConfig
    base_model_prefix = "plain"
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(9, config.width)
        self.first = torch.nn.Linear(config.width, 4)
        self.qkv_proj = torch.nn.Linear(config.width, 12)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
"""
OWN_SHAPES = {
    "embed.weight": (9, 6),
    "first.weight": (4, 6),
    "first.bias": (4,),
    "qkv_proj.weight": (12, 6),
    "qkv_proj.bias": (12,),
}


def own_code(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "modeling_plain.py").write_text(MODELING)
    config = {
        "architectures": ["PlainModel"],
        "model_type": "bert",  # a known type does not make it a known model
        "auto_map": {"AutoConfig": "modeling_plain.PlainConfig", "AutoModel": "modeling_plain.PlainModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_code_of_its_own_is_run_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = own_code(tmp_path / "plain")
    folder = str(tmp_path / "plain")
    unknown = describe_layout(config, OWN_SHAPES, origin=folder)
    assert not (tmp_path / "modules").exists()
    assert unknown.architecture == "PlainModel" and unknown.canonical == {key: key for key in OWN_SHAPES}
    assert (unknown.missing, unknown.heads, unknown.tied, unknown.vocab_axis) == ((), (), {}, {})
    assert unknown.blocks["embed.weight"] == (WHOLE,) and unknown.blocks["first.weight"][0].matrix
    with pytest.raises(UnsupportedError, match="has its own code"):
        load_back(tmp_path / "plain")

    known = describe_layout(config, OWN_SHAPES, origin=folder, trust_remote_code=True)
    assert known.architecture == "PlainModel" and known.missing == ()
    assert known.vocab_axis == {"embed.weight": 0}
    assert len(known.blocks["qkv_proj.weight"]) == 1  # how it takes this apart is not known
    assert match(known, unknown).absent == ()
    save_file(
        {k: torch.zeros(s) for k, s in OWN_SHAPES.items()}, tmp_path / "plain/model.safetensors", {"format": "pt"}
    )
    assert load_back(tmp_path / "plain", trust_remote_code=True) == ((), ())


def test_unknown_models_differ_by_a_first_name_at_most(tmp_path: Path) -> None:
    config = own_code(tmp_path / "plain")
    bare = describe_layout(config, OWN_SHAPES, origin="bare")
    longer = {**{f"plain.{key}": shape for key, shape in OWN_SHAPES.items()}, "score.weight": (2, 6)}
    headed = describe_layout(config, longer, origin="headed")
    found = match(bare, headed)
    assert found.extra == ("score.weight",) and found.absent == ()
    assert found.origins["first.bias"].keys == ("plain.first.bias",)
    assert match(headed, bare).absent == ("score.weight",)
    assert headed.parameter_of_module("first") == "plain.first.weight"
    assert bare.parameter_of_module("plain.first") == "first.weight"
    assert bare.parameter_of_module("third") is None


def test_load_back_of_shards_and_of_damage(tmp_path: Path) -> None:
    folder = save(build("MixtralForCausalLM", "mixtral"), tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and load_back(folder) == ((), ())
    level = transformers.utils.logging.get_verbosity()
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match=shards[0].name):
        load_back(folder)
    shards[0].unlink()
    with pytest.raises(CorruptFileError, match=rf"names {shards[0].name}, which is not there"):
        load_back(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="config.json: not readable"):
        load_back(folder)
    (folder / "config.json").unlink()
    with pytest.raises(NotFoundError, match="config.json: no such file"):
        load_back(folder)
    assert transformers.utils.logging.get_verbosity() == level


def test_load_back_says_what_transformers_says(tmp_path: Path) -> None:
    folder = save(build("MixtralForCausalLM", "mixtral"), tmp_path / "model")
    tensors = tensors_of(folder)
    rewrite(folder, {**tensors, "model.extra.weight": torch.zeros(2)})
    assert load_back(folder) == ((), ("model.extra.weight",))
    rewrite(folder, {**tensors, "model.extra.LayerNorm.gamma": torch.zeros(2)})
    assert load_back(folder) == ((), ("model.extra.LayerNorm.gamma",)) == ((), layout_of(folder).unexpected)
    narrow = {**tensors, "model.norm.weight": torch.zeros(15)}
    with pytest.raises(
        ShapeError, match=r"1 tensors do not fit .*model\.norm\.weight: stored \(15,\), expected \(16,\)"
    ):
        load_back(rewrite(folder, narrow))
    lost = {key: value for key, value in tensors.items() if "layers.1.block_sparse_moe.experts.2.w1" not in key}
    with pytest.raises(CorruptFileError, match="cannot load these weights"):
        load_back(rewrite(folder, lost))
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        load_back(folder)


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """What `save_pretrained` would write of a model on the meta device."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    return {key: tuple(value.shape) for key, value in revert_weight_conversion(model, state).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "config_class", "tensors", "seconds"),
    [("BertForMaskedLM", "BertConfig", 202, 2), ("MixtralForCausalLM", "MixtralConfig", 995, 15)],
)
def test_full_size_models_are_described_at_once(title: str, config_class: str, tensors: int, seconds: float) -> None:
    config = getattr(transformers, config_class)(architectures=[title])
    with torch.device("meta"):
        shapes = stored_shapes(getattr(transformers, title)(config))
    assert len(shapes) == tensors
    start = time.process_time()
    layout = describe_layout(config.to_dict(), shapes, origin=title)
    found = match(layout, layout)
    assert time.process_time() - start < seconds
    assert layout.missing == () and len(found.origins) == tensors
