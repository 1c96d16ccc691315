"""Chat template, special tokens and generation config of sources: said where they differ, taken where asked for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hfmerge.engine.plan_json import plan_from_json, plan_to_json
from hfmerge.engine.planner import make_plan
from hfmerge.errors import RecipeError
from hfmerge.recipe.chat_template import ChatTemplate
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.recipe.recipe import load_recipe, parse_recipe
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


def test_the_card_shows_a_chat_wherever_the_template_is(root: Path) -> None:
    """In settings of the tokenizer, in a file, or nowhere; what the card shows can be run."""
    merge(root, "none", "tuned")
    merge(root, "settings", "tuned", flags=("--chat-template", "tuned"))
    tiny.edit_config(root / "base", "tokenizer_config.json", chat_template=CHAT)
    merge(root, "base-settings", "tuned")
    for name, chats in (("none", False), ("settings", True), ("base-settings", True)):
        assert ("apply_chat_template" in (root / name / "README.md").read_text()) == chats
        assert not (root / name / "chat_template.jinja").exists() and (template(root / name) is not None) == chats
    tiny.done("verify", root / "settings", "--replay")


OWN = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% endfor %}\n"


@pytest.mark.slow
def test_a_template_of_the_recipe_is_recorded_and_needs_no_file_again(root: Path) -> None:
    """In the place of all templates of the base; the ledger holds text and digest, and the card the recipe."""
    (root / "base" / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    (root / "base" / "additional_chat_templates").mkdir()
    (root / "base" / "additional_chat_templates" / "rag.jinja").write_text(PLAIN)
    (root / "recipes").mkdir()
    (root / "recipes" / "own.jinja").write_bytes(OWN.encode())
    written = {"base": str(root / "base"), "models": [str(root / "tuned"), str(root / "same")], "method": "linear"}
    file = root / "recipes" / "recipe.yaml"
    file.write_text(json.dumps({**written, "tokenizer": "tuned", "chat_template": "own.jinja"}))
    tiny.done("merge", file, "--output", root / "out")
    assert template(root / "out") == OWN and (root / "out" / "chat_template.jinja").read_bytes() == OWN.encode()
    assert "chat_template" not in json.loads((root / "out" / "tokenizer_config.json").read_text())
    assert not (root / "out" / "chat_template.json").exists()
    assert not (root / "out" / "additional_chat_templates").exists()
    held = json.loads((root / "out" / "merge_history" / "0001.json").read_text())["settings"]["chat_template"]
    assert held == {"text": OWN, "sha256": hashlib.sha256(OWN.encode()).hexdigest()}
    (root / "recipes" / "own.jinja").unlink()
    tiny.done("verify", root / "out", "--replay")
    card = (root / "out" / "README.md").read_text()
    assert "The merge has the tokenizer of tuned, the chat template of the recipe; else" in card
    assert held["sha256"] in card
    merge(root, "plain", "tuned", "same")
    said = tiny.cli("diff", root / "plain", root / "out").out
    assert f"setting   chat_template: None -> sha256 {held['sha256'][:12]}\n" in said
    tiny.done("unmerge", root / "out", "--remove", "tuned", "--output", root / "left")
    assert template(root / "left") == OWN
    tiny.done("verify", root / "left", "--replay")


def test_a_template_may_be_a_flag_or_a_text(root: Path) -> None:
    (root / "own.jinja").write_text(OWN)
    given = {"base": str(root / "base"), "models": [str(root / "same")], "method": "linear"}
    by_flag = apply_overrides(parse_recipe(given, "test"), chat_template=str(root / "own.jinja"))
    by_text = parse_recipe({**given, "chat_template": {"text": OWN}}, "test")
    assert by_flag == by_text == parse_recipe(by_text.to_dict(), "test")
    assert by_text.chat_template == ChatTemplate(OWN)
    with pytest.raises(RecipeError, match="must be text that UTF-8 can hold"):
        parse_recipe({**given, "chat_template": {"text": "\ud800"}}, "test")
    (root / "again.yaml").write_text(by_text.to_yaml())
    assert load_recipe(root / "again.yaml") == by_text
    assert plan_from_json(plan_to_json(make_plan(by_text)).encode()).recipe.chat_template == ChatTemplate(OWN)


@pytest.mark.parametrize(
    "value, words",
    [
        ("none.jinja", '"none.jinja" cannot be used: No such file or directory'),
        ("../own.jinja", "it is not in the folder of the recipe; put it there, or give `chat_template`"),
        ("/etc/own.jinja", "it is not in the folder of the recipe"),
        ("link.jinja", "which is outside of this folder"),
        ("folder.jinja", "it is no file"),
        ("pipe.jinja", "is a pipe, and no file"),
        ("broken.jinja", "line 2 is no Jinja: "),
        ("deep.jinja", "cannot be used: "),
        ("empty.jinja", "must be the text of a template"),
        ("bytes.jinja", "cannot be used: 'utf-8' codec can't decode"),
        ("long.jinja", "bytes of chat template"),
        ({"text": OWN, "sha256": "0" * 64}, "is not the text that sha256 is the digest of"),
        ({"file": "x"}, "lacks the key text"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(value: object, words: str, tmp_path: Path) -> None:
    """With the recipe, before anything is downloaded."""
    (tmp_path / "own.jinja").write_text(OWN)
    folder = tmp_path / "recipes"
    (folder / "folder.jinja").mkdir(parents=True)
    (folder / "link.jinja").symlink_to(tmp_path / "own.jinja")
    os.mkfifo(folder / "pipe.jinja")
    (folder / "broken.jinja").write_text("\n{% for %}")
    (folder / "deep.jinja").write_text("{{" + "(" * 100_000)
    (folder / "empty.jinja").write_text(" ")
    (folder / "bytes.jinja").write_bytes(b"\xff\xfe")
    (folder / "long.jinja").write_bytes(b"x" * 600_000)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"base": "org/b", "models": ["org/a"], "method": "linear", "chat_template": value}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(caught.value.problems) == 1 and words in str(caught.value)
