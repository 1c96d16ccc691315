"""Models that change one end of a tie: the merge computes what the adapter or the fine-tune itself computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.fixtures import tiny


pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False) but the target module:UserWarning"),
]
OWNER, COPY = "model.embed_tokens.weight", "lm_head.weight"
BART = {
    "vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip


def built(kind: str) -> PreTrainedModel:
    if kind == "bart":
        return tiny.build("BartForConditionalGeneration", transformers.BartConfig(**BART))
    titles = {
        "qwen3": "Qwen3ForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "whisper": "WhisperForConditionalGeneration",
        "t5": "T5ForConditionalGeneration",
        "bert": "BertForMaskedLM",
    }
    return tiny.build(titles[kind], tiny.config(kind))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("tied")
    kinds = ("qwen3", "gpt2", "whisper", "t5", "bart", "bert")
    return {kind: tiny.save(built(kind), root / kind) for kind in kinds}


def trained(base: Path, folder: Path, seed: int = 1, saving: Any = "auto", **settings: Any) -> Path:
    """An adapter made and saved by PEFT."""
    model = get_peft_model(loaded(base), LoraConfig(r=3, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=saving)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    title = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, title).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    result: PreTrainedModel = model.eval()
    return result


@torch.no_grad()
def answers(model: Any) -> Tensor:
    words = torch.arange(3, 9)[None]
    kind = model.config.model_type
    if kind == "whisper":
        features = torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16)
        return model(input_features=features, decoder_input_ids=words).logits
    return model(input_ids=words, **({"decoder_input_ids": words} if kind in ("t5", "bart") else {})).logits


def by_peft(base: Path, adapter: Path) -> Tensor:
    """What the adapter computes beside its base, unmerged."""
    return answers(PeftModel.from_pretrained(loaded(base), adapter).eval())


def same(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def merge(out: Path, base: Path, *models: Path, method: str = "task_arithmetic", flags: tuple[str, ...] = ()) -> Path:
    tiny.done("merge", *models, "--base", base, "--method", method, "--output", out, *flags)
    return out


def untied_tune(base: Path, folder: Path, seed: int = 5) -> Path:
    """A fine-tune of a tied base that was saved with an output embedding of its own."""
    model = loaded(base)
    model.config.tie_word_embeddings = False
    free = type(model)(model.config)
    free.load_state_dict(model.state_dict())
    return tiny.save(tiny.fine_tune(free, seed), folder)


ENDS = [
    ("qwen3", {"target_modules": ["lm_head", "q_proj"]}),
    ("qwen3", {"target_modules": ["embed_tokens"]}),
    ("qwen3", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("gpt2", {"target_modules": ["wte"]}),
    ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
    ("whisper", {"target_modules": ["proj_out", "q_proj"]}),
    ("bart", {"target_modules": ["lm_head"]}),
    ("bart", {"target_modules": ["decoder.embed_tokens", "v_proj"]}),
    ("bert", {"target_modules": ["word_embeddings"]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), ENDS)
@pytest.mark.parametrize("saving", ["auto", False])
def test_an_adapter_of_one_end_computes_what_it_computed(
    bases: Mapping[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any], saving: Any
) -> None:
    adapter = trained(bases[kind], tmp_path / "adapter", saving=saving, **settings)
    out = merge(tmp_path / "out", bases[kind], adapter)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert same(answers(loaded(out)), by_peft(bases[kind], adapter))
    assert not same(answers(loaded(out)), answers(loaded(bases[kind])))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_an_adapter_that_keeps_the_tie_is_merged_tied(
    bases: Mapping[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = trained(bases["qwen3"], tmp_path / "adapter", **settings)
    out = merge(tmp_path / "out", bases["qwen3"], adapter)
    assert COPY not in tiny.tensors(out) and loaded(out).config.tie_word_embeddings
    assert same(answers(loaded(out)), by_peft(bases["qwen3"], adapter))


def test_equal_copies_beside_an_adapter_are_accepted(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base = bases["qwen3"]
    adapter = trained(base, tmp_path / "adapter", saving=True, target_modules=["q_proj"])
    out = merge(tmp_path / "out", base, adapter)
    assert COPY not in tiny.tensors(out)
    assert same(answers(loaded(out)), by_peft(base, adapter))
    tiny.edit(adapter, lambda held: held[f"base_model.model.{COPY}"].add_(1.0), "adapter_model.safetensors")
    run = tiny.cli("merge", adapter, "--base", base, "--method", "linear", "--output", tmp_path / "other")
    assert run.code == 1 and f"{OWNER} differs from base_model.model.{COPY}" in run.err


def test_an_untied_fine_tune_of_a_tied_base_brings_its_head(bases: Mapping[str, Path], tmp_path: Path) -> None:
    tuned = untied_tune(bases["qwen3"], tmp_path / "tuned")
    out = merge(tmp_path / "out", bases["qwen3"], tuned)
    assert same(answers(loaded(out)), answers(loaded(tuned)))
    assert not (out / "heads").exists()


@pytest.mark.parametrize("stored", ["both", "the copy alone", "pickled", "in shards"])
def test_every_way_to_store_a_tied_base(bases: Mapping[str, Path], tmp_path: Path, stored: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["qwen3"], base)
    flags: tuple[str, ...] = ()
    if stored == "both":
        tiny.edit(base, lambda held: held.update({COPY: held[OWNER].clone()}))
    elif stored == "the copy alone":
        tiny.edit(base, lambda held: held.update({COPY: held.pop(OWNER)}))
    elif stored == "pickled":
        torch.save(tiny.tensors(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        flags = ("--allow-pickle",)
    else:
        model = loaded(base)
        (base / "model.safetensors").unlink()
        tiny.save(model, base, max_shard_size="4KB")
    adapter = trained(bases["qwen3"], tmp_path / "adapter", target_modules=["lm_head"])
    out = merge(tmp_path / "out", base, adapter, flags=flags)
    assert same(answers(loaded(out)), by_peft(bases["qwen3"], adapter))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "opcm", "linear", "ties"])
def test_a_removal_ties_again(bases: Mapping[str, Path], tmp_path: Path, method: str) -> None:
    """What never was untied and what was untied and tied again have the same bytes; so have the ways to get there."""
    base = bases["qwen3"]
    tied = [tiny.save(tiny.fine_tune(loaded(base), seed), tmp_path / f"tuned{seed}") for seed in (1, 2)]
    adapter = trained(base, tmp_path / "adapter", target_modules=["lm_head", "v_proj"])
    flags = ("--state", "all")
    never = merge(tmp_path / "never", base, *tied, method=method, flags=flags)
    whole = merge(tmp_path / "whole", base, *tied, adapter, method=method, flags=flags)
    assert COPY in tiny.tensors(whole)
    grown = tmp_path / "grown"
    shutil.copytree(never, grown)
    tiny.done("add", grown, adapter)
    assert tiny.files(grown, states=False) == tiny.files(whole, states=False)
    tiny.done("unmerge", whole, "--remove", "adapter", "--output", tmp_path / "left")
    assert tiny.files(tmp_path / "left") == tiny.files(never)
    # the tie stays open when another model leaves
    tiny.done("unmerge", whole, "--remove", "tuned1", "--output", tmp_path / "rest")
    rest = merge(tmp_path / "fresh", base, tied[1], adapter, method=method, flags=flags)
    assert tiny.files(tmp_path / "rest", states=False) == tiny.files(rest, states=False)
    for folder in (whole, grown, tmp_path / "left", tmp_path / "rest"):
        tiny.done("verify", folder, "--replay")


def test_ledger_card_and_warning_name_the_model(bases: Mapping[str, Path], tmp_path: Path) -> None:
    adapter = trained(bases["qwen3"], tmp_path / "adapter", target_modules=["lm_head"])
    tuned = tiny.save(tiny.fine_tune(loaded(bases["qwen3"]), 3), tmp_path / "tuned")
    out = tmp_path / "out"
    run = tiny.done(
        "merge", tuned, adapter, "--base", bases["qwen3"], "--method", "task_arithmetic", "--output", out,
        "--keep-sources",
    )  # fmt: skip
    assert "adapter changes lm_head.weight apart from the weight that the base ties it to" in run.err
    models = json.loads((out / "merge_history" / "0001.json").read_text())["materials"]["models"]
    assert ["untied" in model for model in models] == [False, True]
    assert "(`tie_word_embeddings: false`), as adapter changes them apart." in (out / "README.md").read_text()
    tensors, base, head = tiny.tensors(out), tiny.tensors(bases["qwen3"])[OWNER], tiny.tensors(adapter)
    new = tiny.tensors(tuned)[OWNER] - base
    factors = [head[f"base_model.model.lm_head.lora_{one}.weight"] for one in "BA"]
    assert torch.allclose(tensors[OWNER], base + new, atol=1e-6)
    assert torch.allclose(tensors[COPY], base + new + 2 * factors[0] @ factors[1], atol=1e-6)
    # from the kept copies alone
    shutil.rmtree(tuned)
    tiny.done("unmerge", out, "--remove", "adapter", "--output", tmp_path / "left")
    assert COPY not in tiny.tensors(tmp_path / "left")


@pytest.mark.slow
def test_a_class_that_cannot_be_untied_is_refused_with_a_way_on(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base = bases["t5"]
    for name, key in {"lm_head": "lm_head.weight", "shared": "shared.weight"}.items():
        adapter = trained(base, tmp_path / name, target_modules=[name, "q"])
        out = tmp_path / f"o{name}"
        arguments = ("merge", adapter, "--base", base, "--method", "task_arithmetic", "--output", out)
        run = tiny.cli(*arguments)
        assert run.code == 1 and f"`exclude: [{key}]`" in run.err and "scales its output" in run.err
        run = tiny.done(*arguments, "--exclude", key)
        assert "matches no parameter" not in run.err
        assert torch.equal(tiny.tensors(out)["shared.weight"], tiny.tensors(base)["shared.weight"])
    # PEFT changes a module that T5 never calls: what is left is all that the adapter does
    assert same(answers(loaded(tmp_path / "oshared")), by_peft(base, tmp_path / "shared"))
