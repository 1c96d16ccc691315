"""Checkpoints as people bring them: infinities, parts of larger models, parts left out, empty tensors, other forms."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hfmerge.methods import registry
from tests.fixtures import tiny


HYBRIDS = {
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2}),
    "bamba": (
        "BambaForCausalLM",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "mamba_n_heads": 4,
         "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "shared_intermediate_size": 32,
         "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
    ),
}  # fmt: skip
"""Types whose configuration holds an infinity."""
INDEX = "model.safetensors.index.json"


def noise(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    tiny.disturb(model, 0, 0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("literal", [False, True], ids=["as transformers 5 writes it", "as a number"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_infinity_in_the_configuration(kind: str, literal: bool, tmp_path: Path) -> None:
    title, settings = HYBRIDS[kind]
    config = transformers.CONFIG_MAPPING[kind](vocab_size=32, hidden_size=16, num_hidden_layers=2, **settings)
    base = noise(getattr(transformers, title)(config))
    models = [base, tiny.fine_tune(base, 1), tiny.fine_tune(base, 2)]
    folders = [tiny.save(model, tmp_path / f"m{i}") for i, model in enumerate(models)]
    for folder in folders:
        text = (folder / "config.json").read_text()
        assert '"__float__": "Infinity"' in text
        if literal:
            (folder / "config.json").write_text(re.sub(r'\{\s*"__float__": "Infinity"\s*\}', "Infinity", text))
    out = tmp_path / "out"
    tiny.done("merge", *folders[1:], "--base", folders[0], "--method", "linear", "--output", out)
    merged = getattr(transformers, title).from_pretrained(out)
    assert merged.config.time_step_limit[1] == float("inf")
    one, two = (model.state_dict() for model in models[1:])
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)
    assert tiny.done("verify", out, "--replay")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "named"), [("mistral3", True), ("llava", True), ("llava", False)])
def test_a_language_model_is_merged_into_the_one_that_sees(kind: str, named: bool, tmp_path: Path) -> None:
    whole = {"mistral3": "Mistral3ForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}[kind]
    inner, title = {"mistral3": ("mistral", "MistralForCausalLM"), "llava": ("llama", "LlamaForCausalLM")}[kind]
    words = {
        "model_type": inner, "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    sight = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = transformers.CONFIG_MAPPING[kind](text_config=words, vision_config=sight, image_token_index=5)
    base = noise(getattr(transformers, whole)(config))
    folder = tiny.save(base, tmp_path / "base")
    if not named:  # it is the default
        section = json.loads((folder / "config.json").read_text())["text_config"]
        del section["model_type"]
        tiny.edit_config(folder, text_config=section)
    text = getattr(transformers, title)(config.text_config)
    text.model.load_state_dict(base.model.language_model.state_dict())
    text.lm_head.load_state_dict(base.lm_head.state_dict())
    tunes = [tiny.fine_tune(text, seed) for seed in (1, 2)]
    folders = [tiny.save(tune, tmp_path / f"t{i}") for i, tune in enumerate(tunes)]
    tiny.done("merge", *folders, "--base", folder, "--method", "linear", "--output", tmp_path / "out")
    merged = getattr(transformers, whole).from_pretrained(tmp_path / "out")
    one, two = (tune.model.state_dict() for tune in tunes)
    for name, value in merged.model.language_model.state_dict().items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        merged.lm_head.weight, (tunes[0].lm_head.weight + tunes[1].lm_head.weight) / 2, rtol=0, atol=1e-6
    )
    before = base.model.vision_tower.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in merged.model.vision_tower.state_dict().items())


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    tiny.save(tiny.build("BertModel", tiny.config("bert")), tmp_path / "bert")
    tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), tmp_path / "llama")
    run = tiny.cli("plan", tmp_path / "bert", "--base", tmp_path / "llama", "--method", "linear")
    assert run.code == 1 and "a bert model, the base" in run.err and "neither is a part of the other" in run.err


@pytest.fixture
def without_pooler(tmp_path: Path) -> Path:
    """A base and two tunes, saved without the pooler that their class has, and a whole model."""
    config = tiny.config("vit")
    base = noise(transformers.ViTModel(config, add_pooling_layer=False))
    tiny.save(base, tmp_path / "base")
    for seed in (1, 2):
        tiny.save(tiny.fine_tune(base, seed), tmp_path / f"t{seed}")
    tiny.save(tiny.build("ViTModel", config), tmp_path / "whole")
    return tmp_path


@pytest.mark.slow
def test_what_base_and_models_lack_alike_is_not_missed(without_pooler: Path) -> None:
    root, out = without_pooler, without_pooler / "out"
    run = tiny.done("merge", root / "t1", root / "t2", "--base", root / "base", "--method", "linear", "--output", out)
    assert "lacks pooler.dense.weight, pooler.dense.bias" in run.err and "the merge lacks it too" in run.err
    merged, one, two = (tiny.tensors(folder) for folder in (out, root / "t1", root / "t2"))
    assert merged.keys() == one.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)
    tiny.done("verify", out, "--replay")


def test_what_only_one_of_base_and_model_has_is_missed(without_pooler: Path) -> None:
    root = without_pooler
    run = tiny.cli("plan", root / "t1", root / "whole", "--base", root / "base", "--method", "linear")
    assert run.code == 1 and "base lacks pooler" in run.err and "whole has pooler" in run.err
    run = tiny.cli("plan", root / "t1", "--base", root / "whole", "--method", "linear")
    assert run.code == 1 and "t1 lacks pooler.dense.weight" in run.err


def test_a_base_that_lacks_a_piece_of_a_part(without_pooler: Path) -> None:
    root, lost = without_pooler, "encoder.layer.0.output.dense.weight"
    command = ("plan", root / "t1", root / "t2", "--base", root / "base", "--method", "linear")
    tiny.edit(root / "base", lambda held: held.pop(lost))
    run = tiny.cli(*command)
    assert run.code == 1 and "base lacks" in run.err and "t1 has layers.0" in run.err
    for name in ("t1", "t2"):
        tiny.edit(root / name, lambda held: held.pop(lost))
    assert tiny.cli(*command).code == 0  # all were saved alike


@pytest.mark.slow
@pytest.mark.parametrize("method", registry())
def test_tensors_without_elements_are_kept(method: str, tmp_path: Path) -> None:
    base = tiny.build("BertModel", tiny.config("bert", type_vocab_size=0))
    models = [base, tiny.fine_tune(base, 1), tiny.fine_tune(base, 2)]
    folders = [tiny.save(model, tmp_path / f"m{i}") for i, model in enumerate(models)]
    out = tmp_path / "out"
    tiny.done("merge", *folders[1:], "--base", folders[0], "--method", method, "--output", out)
    empty = "embeddings.token_type_embeddings.weight"
    assert tiny.tensors(out)[empty].shape == (0, 16)
    assert tiny.done("verify", out, "--replay")


def moved(name: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)

    return move


def in_checkpoints(folder: Path) -> None:
    for step in (500, 1000):
        (folder / f"checkpoint-{step}").mkdir()
        shutil.copy(folder / "model.safetensors", folder / f"checkpoint-{step}")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def torn(shape: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def tear(folder: Path) -> None:
        tiny.edit(folder, lambda held: held.update({k: shape(v) for k, v in held.items() if v.dim() > 1}))

    return tear


def compiled(folder: Path) -> None:
    held = {f"_orig_mod.{name}": value for name, value in tiny.tensors(folder).items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def quantised(**settings: object) -> Callable[[Path], object]:
    return lambda folder: tiny.edit_config(folder, quantization_config=settings)


FORMS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "GGUF": (moved("model.Q4.gguf"), ["only model.Q4.gguf: GGUF", "gguf_file='model.Q4.gguf'"]),
    "a lost shard": (moved("model-00002-of-00002.safetensors"), ["1 of 2 shards", INDEX, "model-00001-of-00002"]),
    "a lost index": (moved("model-00001-of-00001.safetensors"), ["1 of 1 shards", f"without {INDEX}"]),
    "shards of DeepSpeed": (moved("global_step5/mp_rank_00_model_states.pt"), ["several processes", "zero_to_fp32"]),
    "shards of FSDP": (moved("pytorch_model_fsdp_0/__0_0.distcp"), ["several processes", "accelerate merge-weights"]),
    "TensorFlow": (moved("tf_model.h5"), ["TensorFlow", "transformers 4"]),
    "the form of the authors": (moved("consolidated.00.pth"), ["form of their authors"]),
    "checkpoints": (in_checkpoints, ["in the folders checkpoint-500, checkpoint-1000; name one of them"]),
    "empty tensors": (torn(lambda value: torch.zeros(0)), ["shape (0,)", "ZeRO stage 3", "zero_to_fp32.py"]),
    "flat tensors": (torn(lambda value: value.flatten()[:50].clone()), ["shape (50,)", "is flat", "ZeRO stage 3"]),
    "a compiled model": (compiled, ["_orig_mod.", "compiled model"]),
    "GPTQ": (quantised(quant_method="gptq", bits=4), ["quantised with gptq in 4 bits", "cannot undo"]),
    "AWQ": (quantised(quant_method="awq", bits=4), ["quantised with awq in 4 bits", "cannot undo"]),
    "bitsandbytes": (
        quantised(quant_method="bitsandbytes", load_in_8bit=True),
        ["quantised with bitsandbytes in 8 bits", "model.dequantize()"],
    ),
    "fp8": (quantised(quant_method="fp8"), ["quantised with fp8", "FineGrainedFP8Config(dequantize=True)"]),
}
"""How a folder is spoilt, and what is said of it."""


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_named_and_the_way_on(form: str, tmp_path: Path) -> None:
    spoil, said = FORMS[form]
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "tuned")
    spoil(tmp_path / "tuned")
    run = tiny.cli("plan", tmp_path / "tuned", "--base", tmp_path / "base", "--method", "linear")
    assert run.code == 1 and run.err.count("\n") <= 1
    for part in said:
        assert part in run.err, run.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_eight_bits_are_merged_once_dequantised_as_advised(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", **sizes))
    tiny.save(base, tmp_path / "base")
    folder = tiny.save(tiny.fine_tune(base, 1), tmp_path / "tuned")
    held = {}
    for name, value in tiny.tensors(folder).items():
        if "_proj" in name:
            scale = value.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            held[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in value.shape], scale.item())
            value = (value / scale).to(torch.float8_e4m3fn)
        held[name] = value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    tiny.edit_config(folder, quantization_config=blocks)
    run = tiny.cli("plan", folder, "--base", tmp_path / "base", "--method", "linear")
    asked = (
        "FineGrainedFP8Config(dequantize=True)`, and save it with `save_pretrained(..., save_original_format=False)"
    )
    assert run.code == 1 and asked in run.err
    told = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=told, dtype=torch.float32)
    tiny.save(model, tmp_path / "plain", save_original_format=False)
    out = tmp_path / "out"
    tiny.done("merge", tmp_path / "plain", "--base", tmp_path / "base", "--method", "linear", "--output", out)
    merged = transformers.LlamaForCausalLM.from_pretrained(out).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_an_adapter_with_empty_factors(tmp_path: Path) -> None:
    tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), tmp_path / "base")
    adapter = tiny.adapter(tmp_path / "adapter", tiny.attention(), 1)
    tiny.edit(adapter, lambda held: held.update({k: torch.zeros(0) for k in held}), file="adapter_model.safetensors")
    run = tiny.cli("plan", adapter, "--base", tmp_path / "base", "--method", "linear")
    assert run.code == 1 and "ZeRO stage 3" in run.err
