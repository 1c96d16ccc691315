"""Vocabularies that grew: adapters that bring rows for new tokens, and tokens in the base's padding rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.vocabulary import write_tokenizer
from hfmerge.engine.planner import make_plan
from hfmerge.errors import RecipeError
from hfmerge.lifecycle.session import given_recipe
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.recipe.recipe import parse_recipe
from tests.fixtures import tiny


pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target:UserWarning"),
]
BASE = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat"]
LONGER = [*BASE, "alpha", "beta"]
OTHER = [*BASE, "gamma", "beta", "delta"]
UNION = [*BASE, "alpha", "beta", "gamma", "delta"]
EMBEDDING = "model.embed_tokens.weight"
KINDS: dict[str, dict[str, Any]] = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "plain": {"target_modules": ["q_proj"]},
}


def llama(tmp_path: Path, **changes: Any) -> Path:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", vocab_size=len(BASE), **changes))
    return tiny.tokenizer(tiny.save(base, tmp_path / "base"), BASE)


def grown(base: Path, name: str, kind: str, tokens: list[str], seed: int = 1) -> tuple[Path, Tensor]:
    """An adapter whose model had its embedding resized, as PEFT saves it, and what the model says of its tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokens), mean_resizing=False)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **KINDS[kind]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    wrapped.save_pretrained(base.parent / name)
    with torch.no_grad():
        said = wrapped.eval()(input_ids=torch.arange(len(tokens)).unsqueeze(0)).logits
    return tiny.tokenizer(base.parent / name, tokens), said


def merge(
    base: Path, out: str, *models: str, method: str = "task_arithmetic", flags: tuple[str, ...] = ()
) -> tiny.Run:
    folders = [base.parent / model for model in models]
    return tiny.cli("merge", *folders, "--base", base, "--method", method, "--output", base.parent / out, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_union_says_what_the_adapter_says(kind: str, tied: bool, tmp_path: Path) -> None:
    base = llama(tmp_path, tie_word_embeddings=tied)
    _, wanted = grown(base, "adapter", kind, LONGER)
    run = merge(base, "out", "adapter", flags=("--vocabulary", "union"))
    assert run.code == 0, run.err
    out = tmp_path / "out"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and model.config.vocab_size == len(LONGER)
    with torch.no_grad():
        got = model(input_ids=torch.arange(len(LONGER)).unsqueeze(0)).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(range(len(LONGER))) == LONGER
    tiny.done("verify", out, "--replay")


def test_rows_of_adapters_are_matched_by_token(tmp_path: Path) -> None:
    """A token of one adapter has its row, factors added; one of both has their mean; `base` drops them."""
    base = llama(tmp_path)
    grown(base, "one", "factors", LONGER, 1)
    grown(base, "two", "saved", OTHER, 2)
    run = merge(base, "out", "one", "two", method="linear", flags=("--tokenizer", "union"))
    assert run.code == 0, run.err
    got = tiny.tensors(tmp_path / "out")[EMBEDDING]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens(range(13)) == UNION
    path, held = f"base_model.model.{EMBEDDING}", tiny.tensors(tmp_path / "one")
    stem = path.removesuffix(".weight")
    one = (
        held[f"{stem}.base_layer.weight"] + 2 * (held[f"{stem}.lora_embedding_B"] @ held[f"{stem}.lora_embedding_A"]).T
    )
    two = tiny.tensors(tmp_path / "two")[path]
    assert torch.allclose(got[UNION.index("alpha")], one[LONGER.index("alpha")], atol=1e-6)
    assert torch.allclose(got[UNION.index("delta")], two[OTHER.index("delta")], atol=1e-6)
    for token in ("beta", "cat"):
        both = (one[LONGER.index(token)] + two[OTHER.index(token)]) / 2
        assert torch.allclose(got[UNION.index(token)], both, atol=1e-6)
    run = merge(base, "less", "one", "two", method="linear", flags=("--vocabulary", "base"))
    assert run.code == 0, run.err
    assert torch.allclose(tiny.tensors(tmp_path / "less")[EMBEDDING], got[: len(BASE)], atol=1e-6)


@pytest.mark.slow
def test_an_adapter_leaves_with_its_tokens(tmp_path: Path) -> None:
    base = llama(tmp_path)
    grown(base, "one", "factors", LONGER, 1)
    grown(base, "two", "plain", OTHER, 2)
    for out, models in (("out", ["one", "two"]), ("never", ["two"])):
        assert merge(base, out, *models, method="linear", flags=("--vocabulary", "union")).code == 0
    tiny.done("unmerge", tmp_path / "out", "--remove", "one", "--output", tmp_path / "left")
    assert tiny.files(tmp_path / "left", states=False) == tiny.files(tmp_path / "never", states=False)
    tiny.done("add", tmp_path / "never", tmp_path / "one", "--output", tmp_path / "added")
    tiny.done("verify", tmp_path / "added", "--replay")
    assert "gamma alpha".split() == transformers.AutoTokenizer.from_pretrained(
        tmp_path / "added"
    ).convert_ids_to_tokens([9, 12])


def test_what_is_missing_for_rows_of_an_adapter_is_named(tmp_path: Path) -> None:
    base = llama(tmp_path)
    adapter, _ = grown(base, "adapter", "factors", LONGER)
    run = merge(base, "out", "adapter")
    assert run.code == 1 and "its vocabulary has 11 rows, the base 9; set `vocabulary: base`" in run.err
    assert "put the files" not in run.err
    tiny.edit(adapter, lambda held: held.pop(f"base_model.model.{EMBEDDING}".replace(".weight", ".base_layer.weight")),
              "adapter_model.safetensors")  # fmt: skip
    run = merge(base, "out", "adapter", flags=("--vocabulary", "union"))
    assert run.code == 1 and f"its factors change 11 rows of {EMBEDDING}" in run.err
    assert "`save_embedding_layers=True`" in run.err
    bare, _ = grown(base, "bare", "plain", LONGER)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    run = merge(base, "out", "bare")
    assert run.code == 1 and "put the files of the tokenizer that it was trained with beside it" in run.err
    run = merge(base, "out", "bare", flags=("--vocabulary", "union"))
    assert run.code == 1 and "no tokenizer files" in run.err and "beside it" in run.err


def test_rows_of_differing_numbers_are_refused(tmp_path: Path) -> None:
    base = llama(tmp_path)
    adapter, _ = grown(base, "adapter", "plain", LONGER)

    def shorter(held: dict[str, Tensor]) -> None:
        held["base_model.model.lm_head.weight"] = held["base_model.model.lm_head.weight"][:10].clone()

    tiny.edit(adapter, shorter, "adapter_model.safetensors")
    run = merge(base, "out", "adapter", flags=("--vocabulary", "union"))
    assert run.code == 1 and "rows of differing numbers of tokens: 10 of lm_head.weight and 11 of" in run.err
    tiny.edit(adapter, lambda held: held.pop("base_model.model.lm_head.weight"), "adapter_model.safetensors")
    run = merge(base, "out", "adapter", flags=("--vocabulary", "union"))
    assert run.code == 0 and "holds no rows of lm_head.weight for tokens that the base does not have" in run.err


def special(folder: Path, tokens: list[str], *more: str) -> None:
    """A tokenizer with special tokens after its words."""
    tiny.tokenizer(folder, tokens)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.add_special_tokens({"additional_special_tokens": list(more)})
    words.save_pretrained(folder)


@pytest.fixture
def padded(tmp_path: Path) -> Path:
    """A base with 12 rows for 9 tokens; two fine-tunes with chat tokens in the padding; one like the base."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", vocab_size=12))
    for seed, name in enumerate(("base", "one", "two", "same")):
        tiny.save(tiny.fine_tune(base, seed) if seed else base, tmp_path / name)
        tiny.tokenizer(tmp_path / name, BASE)
    special(tmp_path / "one", BASE, "<|start|>", "<|end|>")
    special(tmp_path / "two", BASE, "<|tool|>", "<|end|>")
    return tmp_path / "base"


def test_new_tokens_get_padding_rows_first(padded: Path) -> None:
    run = merge(padded, "out", "one", "two", "same", method="linear", flags=("--vocabulary", "union"))
    assert run.code == 0, run.err
    root = padded.parent
    words = transformers.AutoTokenizer.from_pretrained(root / "out")
    assert words.convert_ids_to_tokens([9, 10, 11]) == ["<|start|>", "<|end|>", "<|tool|>"]
    assert words.decode([3, 9], skip_special_tokens=True) == "the"
    assert json.loads((root / "out" / "config.json").read_text())["vocab_size"] == 12
    for name in (EMBEDDING, "lm_head.weight"):
        base, one, two, same = (tiny.tensors(root / model)[name] for model in ("base", "one", "two", "same"))
        got = tiny.tensors(root / "out")[name]
        assert got.shape == base.shape
        assert torch.allclose(got[9], one[9], atol=1e-6) and torch.allclose(got[11], two[9], atol=1e-6)
        assert torch.allclose(got[10], (one[10] + two[10]) / 2, atol=1e-6)
        assert torch.allclose(got[:9], (one + two + same)[:9] / 3, atol=1e-6)
    tiny.done("verify", root / "out", "--replay")


@pytest.mark.slow
def test_new_tokens_go_on_after_the_padding_and_leave_with_their_model(padded: Path) -> None:
    root = padded.parent
    longer = tiny.build("LlamaForCausalLM", tiny.config("llama", vocab_size=14), 7)
    tiny.tokenizer(tiny.save(longer, root / "long"), [*BASE, "alpha", "beta", "gamma", "delta", "eps"])
    flags = ("--vocabulary", "union")
    assert merge(padded, "out", "one", "long", method="linear", flags=flags).code == 0
    got, theirs = (tiny.tensors(root / name)[EMBEDDING] for name in ("out", "long"))
    assert got.shape[0] == 16 and torch.allclose(got[11:], theirs[9:], atol=1e-6)
    tiny.done("unmerge", root / "out", "--remove", "long", "--output", root / "left")
    assert merge(padded, "never", "one", method="linear", flags=flags).code == 0
    assert tiny.files(root / "left", states=False) == tiny.files(root / "never", states=False)


def test_an_adapter_may_train_the_padding_rows(padded: Path) -> None:
    """Its copy has the base's shape; its tokenizer has tokens that the base lacks."""
    root = padded.parent
    model = transformers.AutoModelForCausalLM.from_pretrained(padded)
    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **KINDS["saved"]))
    tiny.disturb(wrapped.base_model.model.get_input_embeddings(), 3, 0.1)
    wrapped.save_pretrained(root / "adapter")
    special(root / "adapter", BASE, "<|start|>", "<|end|>")
    run = merge(padded, "out", "adapter")
    assert run.code == 0 and "<|start|>, <|end|> are tokens that the base does not have" in run.err
    run = merge(padded, "united", "two", "adapter", method="linear", flags=("--tokenizer", "union"))
    assert run.code == 0, run.err
    assert transformers.AutoTokenizer.from_pretrained(root / "united").convert_ids_to_tokens(11) == "<|start|>"
    got, copy = tiny.tensors(root / "united")[EMBEDDING], tiny.tensors(root / "adapter")
    assert torch.allclose(got[11], copy[f"base_model.model.{EMBEDDING}"][9], atol=1e-6)
    own = merge(padded, "own", "adapter", flags=("--tokenizer", "adapter"))
    assert own.code == 0 and "tokens that the base does not have" not in own.err


def test_a_ledger_without_the_key_gives_words_without_marks(padded: Path) -> None:
    """Merges that were made before `tokenizer: union` was recorded have the tokens as plain words."""
    given = {"base": str(padded), "models": [str(padded.parent / "one")], "method": "linear"}
    asked = parse_recipe({**given, "vocabulary": "union"}, "test")
    assert asked == parse_recipe({**given, "tokenizer": "union"}, "test")
    assert (asked.vocabulary, asked.tokenizer) == ("union", "union")
    words = []
    for recipe in (asked, dataclasses.replace(asked, tokenizer=None)):
        vocabulary = make_plan(recipe).vocabulary
        assert vocabulary is not None and [token.row for token in vocabulary.added] == [9, 10]
        folder = padded.parent / f"words-{recipe.tokenizer}"
        write_tokenizer(vocabulary, describe(str(padded)).snapshot, folder)
        words.append(transformers.AutoTokenizer.from_pretrained(folder))
    assert [one.decode([3, 9], skip_special_tokens=True) for one in words] == ["the", "the <|start|>"]


def test_either_key_says_union_and_a_flag_replaces_both(padded: Path) -> None:
    given = {"base": str(padded), "models": [str(padded.parent / "one")], "method": "linear"}
    with pytest.raises(RecipeError, match="is united only with the rows of its tokens"):
        parse_recipe({**given, "tokenizer": "union", "vocabulary": "base"}, "test")
    united = parse_recipe({**given, "vocabulary": "union"}, "test")
    assert parse_recipe(united.to_dict(), "test") == united
    less = apply_overrides(united, vocabulary="base")
    assert (less.vocabulary, less.tokenizer) == ("base", None)
    assert given_recipe(united, vocabulary="base")[0] == less
    own = apply_overrides(united, tokenizer="one")
    assert (own.vocabulary, own.tokenizer) == (None, "one")
