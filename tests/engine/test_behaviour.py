"""Chat template, special tokens and generation config of sources: said where they differ, taken where asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.fixtures import tiny


TOKENS = [f"w{i}" for i in range(48)]
PLAIN, CHAT = "{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base without a template, an adapter and a fine-tune with templates, and a fine-tune like the base."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    for seed, name in enumerate(("base", "tuned", "same")):
        tiny.tokenizer(tiny.save(tiny.fine_tune(base, seed) if seed else base, tmp_path / name), TOKENS)
    tiny.tokenizer(tiny.adapter(tmp_path / "adapter", tiny.attention(), 1), TOKENS)
    (tmp_path / "adapter" / "chat_template.jinja").write_text(CHAT)
    tiny.edit_config(tmp_path / "tuned", "tokenizer_config.json", chat_template=PLAIN, eos_token="w2")
    tiny.edit_config(tmp_path / "tuned", "generation_config.json", eos_token_id=[2, 5])
    return tmp_path


def merge(root: Path, out: str, *models: str, flags: tuple[str, ...] = ()) -> tiny.Run:
    paths = [root / model for model in models]
    return tiny.done("merge", *paths, "--base", root / "base", "--method", "linear", "--output", root / out, *flags)


def template(folder: Path) -> str | None:
    found = AutoTokenizer.from_pretrained(folder).chat_template
    assert found is None or isinstance(found, str)
    return found


def test_what_differs_is_said_once_for_each_model_and_in_the_card(root: Path) -> None:
    run = merge(root, "out", "adapter", "tuned", "same")
    said = [line for line in run.err.splitlines() if "is used otherwise than the base" in line]
    assert [line.split()[1].rpartition("/")[2] for line in said] == ["adapter", "tuned"]
    assert 'chat template, eos_token "w2", generation config (eos_token_id).' in said[1]
    card = (root / "out" / "README.md").read_text()
    assert "adapter has another chat template; tuned has another chat template" in card and "same has" not in card
    tiny.done("verify", root / "out", "--replay")


def test_each_choice_takes_the_files_of_its_model(root: Path) -> None:
    flags = ("--tokenizer", "tuned", "--chat-template", "adapter", "--generation-config", str(root / "tuned"))
    merge(root, "out", "adapter", "tuned", flags=flags)
    out = root / "out"
    assert template(out) == CHAT and AutoTokenizer.from_pretrained(out).eos_token == "w2"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    settings = json.loads((out / "merge_history" / "0001.json").read_text())["settings"]
    assert [settings[key] for key in ("tokenizer", "chat_template", "generation_config")] == [
        "tuned",
        "adapter",
        "tuned",
    ]
    tiny.done("verify", out, "--replay")


def test_the_template_comes_with_the_tokenizer_unless_it_is_chosen(root: Path) -> None:
    merge(root, "with", "tuned", flags=("--tokenizer", "tuned"))
    merge(root, "without", "tuned", flags=("--tokenizer", "tuned", "--chat-template", "base"))
    merge(root, "alone", "tuned", flags=("--chat-template", "tuned"))
    assert [template(root / name) for name in ("with", "without", "alone")] == [PLAIN, None, PLAIN]


@pytest.mark.slow
def test_a_choice_leaves_with_its_model(root: Path) -> None:
    """What is left has the bytes of a merge that never saw the model."""
    merge(root, "out", "tuned", "same", flags=("--tokenizer", "tuned", "--generation-config", "tuned"))
    merge(root, "never", "same")
    tiny.done("unmerge", root / "out", "--remove", "tuned", "--output", root / "left")
    assert tiny.files(root / "left", states=False) == tiny.files(root / "never", states=False)
    tiny.done("verify", root / "left", "--replay")
    tiny.done("unmerge", root / "out", "--remove", "same", "--output", root / "kept")
    assert template(root / "kept") == PLAIN


def test_a_choice_of_no_model_and_of_no_files_is_refused(root: Path) -> None:
    arguments = ("merge", root / "tuned", "--base", root / "base", "--method", "linear", "--output", root / "out")
    run = tiny.cli(*arguments, "--tokenizer", "nobody")
    assert run.code == 1 and '"nobody" is neither base nor a model of the merge: tuned' in run.err
    (root / "tuned" / "generation_config.json").unlink()
    run = tiny.cli(*arguments, "--generation-config", "tuned")
    assert run.code == 1 and "has none" in run.err


def test_tokens_in_padding_rows_come_with_their_tokenizer(root: Path) -> None:
    """The base has 48 rows for 46 tokens; the fine-tune put two chat tokens into the last ones."""
    for name in ("base", "same"):
        tiny.tokenizer(root / name, TOKENS[:46])
    tiny.tokenizer(root / "tuned", [*TOKENS[:46], "<|start|>", "<|end|>"])
    arguments = ("merge", root / "tuned", root / "same", "--base", root / "base", "--method", "linear")
    run = tiny.cli(*arguments, "--output", root / "out")
    assert run.code == 1 and "`tokenizer: tuned` to have them in the merge, or `vocabulary: base`" in run.err
    tiny.done(*arguments, "--output", root / "out", "--tokenizer", "tuned")
    assert AutoTokenizer.from_pretrained(root / "out").get_vocab()["<|end|>"] == 47
    ours, theirs = (tiny.tensors(root / name)["model.embed_tokens.weight"] for name in ("out", "tuned"))
    other = tiny.tensors(root / "same")["model.embed_tokens.weight"]
    assert torch.allclose(ours, (theirs + other) / 2, atol=1e-6)
    left = tiny.done(*arguments, "--output", root / "less", "--vocabulary", "base")
    assert "<|start|>, <|end|> are tokens that the base does not have" in left.err
