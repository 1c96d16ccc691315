"""The parser: words in any order, hints for words that it does not know, and the settings of the Hub."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfmerge.cli import terminal
from hfmerge.cli.parsing import EXAMPLES, GROUPS, commands_of, parse
from hfmerge.cli.program import build_parser, main
from hfmerge.cli.shared import weighted
from hfmerge.errors import HfMergeError
from hfmerge.validation import quoting
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    return root


def parsed(*words: str) -> argparse.Namespace:
    return parse(build_parser(), list(words))


def usage(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of wrong usage: one line, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("usage: hfmerge") and err.count("\n") == 1
    return err


def test_models_and_flags_stand_in_any_order() -> None:
    orders = (
        ("merge", "a", "b", "--base", "c", "--method", "opcm"),
        ("merge", "--base", "c", "a", "--method", "opcm", "b"),
        ("merge", "a", "--method", "opcm", "--base", "c", "b"),
    )
    assert len({(tuple(args.items), args.base, args.method) for args in (parsed(*words) for words in orders)}) == 1
    assert parsed("diff", "m", "--json", "-2", "-1").steps == ["-2", "-1"]
    assert parsed("unmerge", "--remove", "a", "m", "--quiet", "--remove", "b").remove == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "items", "learn"),
    [
        (("--learn", "a", "b"), ["a", "b"], [""]),
        (("--learn", "org/a=0.5", "b"), ["org/a=0.5", "b"], [""]),
        (("--learn", "steps=9", "a"), ["a"], ["steps=9"]),
        (("a", "--learn", "replay.rows=8", "--learn", "rate=1e-3", "b"), ["a", "b"], ["replay.rows=8", "rate=1e-3"]),
        (("a", "--learn", "stepz=9"), ["a"], ["stepz=9"]),
        (("a", "--learn"), ["a"], [""]),
    ],
)
def test_learn_takes_no_model(words: tuple[str, ...], items: list[str], learn: list[str]) -> None:
    args = parsed("merge", *words)
    assert (args.items, args.learn) == (items, learn)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("unmereg", "m"), 'there is no command unmereg; did you mean "unmerge"?'),
        (("merge", "a", "--alpha", "0.4"), "--alpha is an option of opcm, mdm_oc_subspace; write --option alpha=0.4"),
        (("plan", "a", "--alpha=0.4"), "write --option alpha=0.4"),
        (("merge", "a", "--patience", "5"), "--patience is a key of learn; write --learn patience=5"),
        (("merge", "a", "--generator", "x"), "write --learn replay.generator=x"),
        (("merge", "a", "--weigth", "5"), 'has no flag --weigth; did you mean "--weight"?'),
        (("certify", "m", "--removed", "a"), 'did you mean "--remove"?'),
        (("evaluate", "m", "--suite", "s", "--push", "org/m"), 'did you mean "--push-to"?'),
        (("merge", "--bas", "a"), 'did you mean "--base"?'),
        (("history", "m", "n"), "too many operands: n"),
        (("merge", "--base", "x", "a\nb", "--no\x1b[31m"), "has no flag"),
    ],
)
def test_a_word_that_is_not_known_gets_a_hint(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in usage(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "a", "--base", "b", "--method", "opcm", "--alpha", "0.4"),
        ("merge", "a", "--patience", "5"),
        ("plan", "a", "--generator", "unigram"),
        ("merge", "a", "--weigth", "5"),
        ("certify", "m", "--removed", "a"),
        ("unmereg", "m", "--remove", "a"),
    ],
)
def test_a_hint_that_is_followed_leads_on(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """What the hint says to write is put in the place of what was wrong, and then parses."""
    said = usage(capsys, *words)
    if written := re.search(r"write (--\S+ [^;\s]+)", said):
        right = [*words[:-2], *written[1].split()]
    else:
        meant = re.search(r'did you mean "([^"]+)"', said)
        wrong = re.search(r"(?:no flag|no command) ([^;\s]+)", said)
        assert meant and wrong, said
        right = [meant[1] if word == wrong[1] else word for word in words]
    assert right != list(words) and parsed(*right).run


def test_a_weight_stands_behind_its_model(tmp_path: Path) -> None:
    (tmp_path / "x=0.5").mkdir()
    assert weighted(["org/a", "org/b=0.5", "base+lora=-1e-1"], None) == (
        ["org/a", "org/b", "base+lora"],
        ["1", "0.5", "-1e-1"],
    )
    assert weighted(["org/a", str(tmp_path / "x=0.5")], None) == (["org/a", str(tmp_path / "x=0.5")], None)
    assert weighted(["a"], ["2"]) == (["a"], ["2"])
    for words, flags, says in (
        (["a", "0.5"], ["0.5"], "MODEL=0.5, or repeat the flag: --weight 0.5 --weight 0.5"),
        (["a=1", "b"], ["2", "3"], "in one place"),
    ):
        with pytest.raises(HfMergeError, match=says):
            weighted(words, flags)


def test_weights_behind_models_merge_as_weights_of_flags(root: Path, tmp_path: Path) -> None:
    given = ("--base", root / "base", "--method", "linear")
    tiny.done("merge", f"{root / 'm0'}=0.5", root / "m1", *given, "--output", tmp_path / "one")
    flags = ("--weight", "0.5", "--weight", "1")
    tiny.done("merge", *given, *flags, root / "m0", root / "m1", "--output", tmp_path / "other")
    assert tiny.files(tmp_path / "one") == tiny.files(tmp_path / "other")
    for name, words in (("one", (f"{root / 'm2'}=0.25",)), ("other", ("--weight", "0.25", root / "m2"))):
        tiny.done("add", tmp_path / name, *words)
    assert tiny.files(tmp_path / "one") == tiny.files(tmp_path / "other")
    assert (
        "repeat the flag: --weight 0.5 --weight 0.5."
        in tiny.cli(
            "merge", root / "m0", root / "m1", *given, "--weight", "0.5", "0.5", "--output", tmp_path / "none"
        ).err
    )


def test_every_command_is_in_a_group_and_has_an_example_that_parses() -> None:
    commands = commands_of(build_parser())
    assert [name for names in GROUPS.values() for name in names].sort() == list(commands).sort()
    assert {name for names in GROUPS.values() for name in names} == set(commands)
    shown = build_parser().format_help()
    assert all(f"\n  {title}:\n" in shown for title in GROUPS)
    for name in set(commands) - {"hub"}:
        words = EXAMPLES[name].partition(" > ")[0].split()
        assert parsed(name, *words).run
        assert f"\nexample: hfmerge {name} {EXAMPLES[name]}".rstrip() in commands[name].format_help()


def test_a_flag_has_the_same_spelling_everywhere() -> None:
    flags = {name: set(sub._option_string_actions) for name, sub in commands_of(build_parser()).items()}
    assert {name for name, known in flags.items() if "--remove" in known} == {"unmerge", "certify"}
    for old in ("--removed", "--push", "--save", "--alpha", "--variant"):
        assert not [name for name, known in flags.items() if old in known]
    changing = {"merge", "add", "unmerge", "replace", "reorder", "rebase", "restore", "push", "purge-history"}
    assert {name for name, known in flags.items() if "--dry-run" in known} == changing


def test_token_and_cache_count_for_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants, get_token

    from hfmerge.cli import reading

    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    before = constants.HF_HUB_CACHE
    seen: list[tuple[str | None, str, str]] = []

    def look(args: argparse.Namespace) -> int:
        seen.append((get_token(), constants.HF_HUB_CACHE, args.merged))
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(reading, "_history", look)
        build_parser.cache_clear()
        given = ("--token", "hf_other", "--cache-dir", str(tmp_path), "--revision", "v2")
        assert main(["history", "org/m", *given]) == 0 and main(["history", "org/m"]) == 0
    build_parser.cache_clear()
    assert seen == [("hf_other", str(tmp_path), "org/m@v2"), ("hf_mine", before, "org/m")]
    assert os.environ["HF_TOKEN"] == "hf_mine"
    assert "names its revision already" in tiny.cli("history", "org/m@v1", "--revision", "v2").err
    assert "is a folder" in tiny.cli("history", tmp_path, "--revision", "v2").err


def test_completion_is_printed_or_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    out, err = capsys.readouterr()
    if caught.value.code == 0:
        assert "unmerge" in out and "--dry-run" in out
    else:
        assert err == "hfmerge: completion needs shtab; install it with `pip install shtab`.\n"


@pytest.mark.slow
def test_help_loads_no_large_library() -> None:
    code = "import sys; from hfmerge.cli.program import build_parser as b; b().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "rich"} & set(loaded)


def test_a_colon_gives_a_weight_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weighted(["org/a:0.5", "org/b=2", "hf://org/c", "./d:1e-1"], None) == (
        ["org/a", "org/b", "hf://org/c", "./d"], ["0.5", "2", "1", "1e-1"]
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e:3").mkdir()
    assert weighted(["e:3"], None) == (["e:3"], None)


def test_every_option_with_a_value_says_its_default() -> None:
    silent = [
        (name, action.option_strings[0])
        for name, command in commands_of(build_parser()).items()
        for action in command._actions
        if action.option_strings and action.nargs != 0 and not action.required and "default" not in (action.help or "")
    ]
    without = {"--publish-private", "--check", "--certificate", "--public-key", "--allowed-signers", "--log", "--card",
               "--head", "--push-to", "--pin", "--sweep", "--plot"}  # fmt: skip
    assert {flag for _, flag in silent} <= without, "what these do is done only where they are given"


MARKUP = "[bold red]gone[/] :smile: \x1b[31mred"


def test_colours_are_for_terminals_and_change_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("ok   files", "base   org/base", MARKUP, "org/merged: verified", "x" * 300)
    terminal.display(*lines)
    plain = capsys.readouterr().out
    assert plain == "".join(quoting.plain(line) + "\n" for line in lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.display(*lines)
    seen = capsys.readouterr().out
    assert "\x1b[32mok\x1b[0m" in seen and "\x1b[36mbase\x1b[0m" in seen
    assert re.sub("\x1b\\[[0-9;]*m", "", seen) == plain, "markup and escapes of others stay text"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as inner:
            inner.setenv(name, value)
            terminal.display(*lines)
        assert capsys.readouterr().out == plain
