"""What a source brings beside its weights: code in a chosen tokenizer, and what an adapter says of its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures import tiny


TOKENS = [f"w{i}" for i in range(48)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune and an adapter of it."""
    root = tmp_path_factory.mktemp("chosen-files")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.tokenizer(tiny.save(base, root / "base"), TOKENS)
    tiny.tokenizer(tiny.save(tiny.fine_tune(base, 1), root / "tuned"), TOKENS)
    tiny.adapter(root / "adapter", tiny.attention(), 1)
    return root


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def merge(root: Path, model: Path, out: Path, *flags: str, base: str | Path = "base") -> tiny.Run:
    base = root / base
    return tiny.cli("merge", model, "--base", base, "--method", "linear", "--output", out, *flags)


CODE = {"AutoTokenizer": ["evil/code--tokenizer.Evil", None]}


def test_a_chosen_tokenizer_brings_no_code(plain: Path, tmp_path: Path) -> None:
    """Neither files that a loader runs or unpickles, nor a name of code of another repository."""
    model = copied(plain / "tuned", tmp_path / "tuned")
    for name in ("tokenizer.py", "tokenizer_more.pyc", "vocab.pkl", "vocab.bin", "tokenizer.so"):
        (model / name).write_bytes(b"raise SystemExit('run')")
    tiny.edit_config(model, "tokenizer_config.json", auto_map=CODE, extra={"auto_map": CODE}, eos_token="w2")
    (model / "generation_config.json").write_text(json.dumps({"auto_map": CODE, "eos_token_id": 2}))
    flags = ("--tokenizer", "tuned", "--generation-config", "tuned", "--chat-template", "tuned")
    tiny.edit_config(model, "tokenizer_config.json", chat_template="{{ messages }}")
    for consent in ((), ("--trust-remote-code",)):
        out = tmp_path / f"out-{len(consent)}"
        run = merge(plain, model, out, *flags, *consent)
        assert run.code == 0, run.err
        held = {path.name for path in out.rglob("*") if path.is_file()}
        assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "w2"
        assert not held & {"tokenizer.py", "tokenizer_more.pyc", "vocab.pkl", "vocab.bin", "tokenizer.so"}
        assert not [name for name in held if name.endswith("config.json") and "auto_map" in
                    next(out.rglob(name)).read_text()]  # fmt: skip


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json", "generation_config.json"])
def test_no_configuration_of_the_base_names_code_that_nobody_allowed(file: str, plain: Path, tmp_path: Path) -> None:
    base = copied(plain / "base", tmp_path / "named")
    said = json.loads((base / file).read_text()) if (base / file).exists() else {}
    (base / file).write_text(json.dumps({**said, "auto_map": CODE, "inner": [{"auto_map": CODE}]}))
    run = merge(plain, plain / "tuned", tmp_path / "out", base=base)
    assert run.code == 0, run.err
    assert "auto_map" not in (tmp_path / "out" / file).read_text()
    assert json.loads((tmp_path / "out" / file).read_text())["inner"] == [{}]
    (base / "tokenizer.py").write_text("class Evil: ...\n")  # a consent is taken only where there is code
    run = merge(plain, plain / "tuned", tmp_path / "allowed", "--trust-remote-code", base=base)
    assert run.code == 0, run.err
    assert (tmp_path / "allowed" / file).read_bytes() == (base / file).read_bytes()


NAMES = ["~nobody-here/x", "~", "..", "/models/..", "a\x1b[31m\nverified", "\\\\", "x" * 400, "a/b/c\x00", "C:", "//"]


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("onto", ["base", "an adapter beneath"])
def test_what_an_adapter_calls_its_base_breaks_nothing(named: str, onto: str, plain: Path, tmp_path: Path) -> None:
    """No traceback, no line of its own, and a ledger that can be opened again."""
    beneath = tmp_path / "beneath"
    model = copied(plain / "adapter", tmp_path / "mine")
    tiny.edit_config(model, "adapter_config.json", base_model_name_or_path=named)
    if onto != "base":
        copied(plain / "adapter", beneath)
        tiny.edit_config(beneath, "adapter_config.json", base_model_name_or_path=named)
        tiny.edit_config(model, "adapter_config.json", base_model_name_or_path=str(beneath))
    run = merge(plain, model, tmp_path / "out")
    assert run.code == 0 if onto == "base" else run.err.startswith("hfmerge: ") or run.code == 0, run.err
    assert "Traceback" not in run.err and "\x1b" not in run.out + run.err
    assert not [line for line in (run.out + run.err).splitlines() if line.startswith("verified")]
    if run.code == 0:
        tiny.done("verify", tmp_path / "out", "--replay")
        tiny.done("history", tmp_path / "out")


def test_an_adapter_of_the_hub_has_no_path_of_this_machine_opened(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that a stranger writes says nothing here: it may be a mount that is slow, or tells of the visit."""
    from hfmerge.checkpoint.describe import describe
    from hfmerge.checkpoint.model import Model
    from hfmerge.engine.adapter_chain import below_adapters

    model = copied(plain / "adapter", tmp_path / "mine")
    tiny.edit_config(
        model, "adapter_config.json", base_model_name_or_path=str(copied(plain / "adapter", tmp_path / "b"))
    )
    base, source = describe(str(plain / "base")), describe(str(model))
    assert below_adapters(base, [source]).problems or below_adapters(base, [source]).warnings
    hub = Model(
        source.ref, source.snapshot.__class__(source.snapshot.ref, "org/a", "0" * 40, None, source.snapshot.files),
        "adapter", {}, source.adapter, source.tensors,
    )  # fmt: skip
    looked: list[Path] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looked.append(path) or is_file(path))
    below = below_adapters(base, [hub])
    assert not looked and not below.problems and not below.warnings


def test_other_values_of_a_named_base_are_quoted(plain: Path, tmp_path: Path) -> None:
    from hfmerge.checkpoint.describe import describe
    from hfmerge.engine.named_base import _config_difference

    other = copied(plain / "base", tmp_path / "other")
    tiny.edit_config(other, hidden_size="\x1b[2J" + "x" * 5000)
    text = _config_difference(describe(str(other)).snapshot, describe(str(plain / "base")).config)
    assert "hidden_size" in text and "\x1b" not in text and len(text) < 500


def test_modules_to_save_may_be_one_name(plain: Path) -> None:
    from hfmerge.checkpoint.lora_targets import Targets
    from hfmerge.checkpoint.patterns import Patterns

    targets = Targets({"target_modules": ["q"], "modules_to_save": "score"}, Patterns())
    assert targets.has("model.q") and not targets.has("model.score") and targets.has("s.q")
