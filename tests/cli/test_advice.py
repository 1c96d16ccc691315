"""Advice succeeds when followed: messages that name a parameter or a call are produced, and what they say is run.

Every such message of the package is matched by a scenario here, or by a line that says where it is followed instead,
or why it is not. A new message without one fails.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import hfmerge
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import pages, tiny
from tests.fixtures.shell import upload


PACKAGE = Path(hfmerge.__file__).parent
Words = tuple[object, ...]


@dataclass(frozen=True)
class Scenario:
    """A command that fails, and commands that follow its advice.

    Attributes:
        fails: the words of the command.
        says: what the message shows of the advice.
        then: each is run and has to succeed.
    """

    fails: Words
    says: str
    then: tuple[Words, ...]


@cache
def messages() -> dict[str, str]:
    """The constant text of every message that names a parameter or a call, with {} for what varies -> its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            names = [one.func.id for one in ast.walk(node) if isinstance(one, ast.Call) and hasattr(one.func, "id")]
            if {"parameter", "call"} & {*names}:
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found[text] = path.relative_to(PACKAGE).as_posix()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    tiny.save(tiny.fine_tune(base, 9, 1.0), root / "other")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    shutil.copytree(root / "m0", root / "holed")
    tiny.edit(root / "holed", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    shutil.copytree(root / "m0", root / "pickled")
    torch.save(tiny.tensors(root / "m0"), root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / "model.safetensors").unlink()
    tiny.adapter(root / "adapter", tiny.attention(), 1, base_model_name_or_path="org/elsewhere")
    (root / "file").write_text("mine")
    (root / "full").mkdir()
    (root / "full" / "note").write_text("mine")
    for method in ("opcm", "linear"):
        tiny.done("merge", root / "m0", root / "m1", "--base", root / "base", "--method", method,
                  "--output", root / method)  # fmt: skip
    return root


def merge(root: Path, *words: object, model: str = "m0") -> Words:
    return ("merge", root / model, root / "m1", "--base", root / "base", "--method", "linear", *words)


def moved(root: Path, out: Path) -> Scenario:
    """A source that moved elsewhere after it was merged."""
    there = out.parent / "there"
    shutil.copytree(root / "m2", out.parent / "m2")
    tiny.done("add", root / "opcm", out.parent / "m2", "--output", out.parent / "merged")
    (out.parent / "m2").rename(there)
    change = ("reorder", out.parent / "merged", "m2", "m1", "m0", "--output", out)
    return Scenario(change, "say where it is now with --source m2=FOLDER", ((*change, "--source", f"m2={there}"),))


def altered(root: Path, out: Path) -> Scenario:
    """A source that was trained on after it was merged."""
    shutil.copytree(root / "m2", out.parent / "m2")
    tiny.done("add", root / "opcm", out.parent / "m2", "--output", out.parent / "merged")
    tiny.edit(out.parent / "m2", lambda tensors: tensors["model.norm.weight"].add_(1.0))
    change = ("reorder", out.parent / "merged", "m2", "m1", "m0", "--output", out)
    return Scenario(change, "or name a copy with --source m2=FOLDER", ((*change, "--source", f"m2={root / 'm2'}"),))


def foreign(root: Path, out: Path) -> Scenario:
    """A file of somebody's in a folder that hfmerge writes."""
    shutil.copytree(root / "opcm", out.parent / "merged")
    (out.parent / "merged" / "mine.py").write_text("x")
    change = ("add", out.parent / "merged", root / "m2")
    return Scenario(change, "or name another --output", ((*change, "--output", out),))


def approximate(root: Path, out: Path) -> Scenario:
    """A certificate that may rest on an approximate replay, without a replay."""
    tiny.done("unmerge", root / "opcm", "--remove", "m1", "--output", out)
    certify = ("certify", out, "--remove", "m1", "--accept-approximate")
    return Scenario(certify, "pass --replay too", ((*certify, "--replay"),))


SCENARIOS: dict[str, Callable[[Path, Path], Scenario]] = {
    "{}: the folder is not empty; empty it": lambda root, out: Scenario(
        merge(root, "--output", root / "full"), "choose another --output", (merge(root, "--output", out),)
    ),
    "{}: is a file; choose a folder": lambda root, out: Scenario(
        merge(root, "--output", root / "file"), "choose a folder for --output", (merge(root, "--output", out),)
    ),
    "{}: cannot write there: {}: {}": lambda root, out: Scenario(
        merge(root, "--output", root / "file" / "out"), "choose another --output", (merge(root, "--output", out),)
    ),
    "no interrupted run to resume": lambda root, out: Scenario(
        merge(root, "--output", out, "--resume"), "leave out --resume", (merge(root, "--output", out),)
    ),
    "; leave it out, or say cpu": lambda root, out: Scenario(
        merge(root, "--output", out, "--device", "cuda:9"),
        "leave it out, or say cpu",
        (merge(root, "--output", out), merge(root, "--output", out.parent / "cpu", "--device", "cpu")),
    ),
    "{}: only pickled weights": lambda root, out: Scenario(
        merge(root, "--output", out, model="pickled"),
        "pass --allow-pickle if you trust the author",
        (merge(root, "--output", out, "--allow-pickle", model="pickled"),),
    ),
    "NaN or Inf of {} values": lambda root, out: Scenario(
        merge(root, "--output", out, model="holed"),
        "or pass --allow-nonfinite",
        (
            merge(root, "--output", out, "--allow-nonfinite", model="holed"),
            merge(root, "--output", out.parent / "left-out", "--exclude", "model.norm.weight", model="holed"),
        ),
    ),
    "Use that base, or leave out": lambda root, out: Scenario(
        merge(root, "--output", out, "--strict-base", model="adapter"),
        "or leave out --strict-base",
        (merge(root, "--output", out, model="adapter"),),
    ),
    "no model of that name was merged from a folder": lambda root, out: Scenario(
        ("add", root / "opcm", root / "m2", "--output", out, "--source", f"mX={root / 'm0'}"),
        "--source mX: no model of that name",
        (("add", root / "opcm", root / "m2", "--output", out, "--source", f"m0={root / 'm0'}"),),
    ),
    "leave out {}": lambda root, out: Scenario(
        ("unmerge", root / "linear", "--remove", "m0", "--mode", "subtract", "--output", out),
        "leave out --mode",
        (("unmerge", root / "linear", "--remove", "m0", "--output", out),),
    ),
    "which is gone; say where it is now": moved,
    "name a copy with {}": altered,
    "which the ledger does not know and this change would lose": foreign,
    "only a replay can be approximate": approximate,
}
"""Part of a message -> the scenario that produces it, made from the folder of models and a new output."""
ON_THE_HUB = {
    "{}, or {}": "a merge on the Hub without a place",
    "the Hub cannot be reached, so nothing was begun": "a push while the Hub is away",
    "or pass {} to replace them.": "a push over files of others",
}
"""Part of a message -> the scenario in `test_advice_with_a_hub`."""
ELSEWHERE = {
    "keeps a state after each": "a remark; followed in cli/test_dry_run.py",
    "the merge was made with such code": "followed in attacks/test_consent.py",
    "modules.json names {}": "the flag is that of only pickled weights",
    "is the name of {} folders": "followed in lifecycle/test_addressing.py",
    "a merge is published as a whole repository": "not followed yet: needs a merge in a folder of a repository",
    "it is not in the folder of the recipe": "followed in engine/test_behaviour.py",
    "a pickle cannot be read in pieces": "not followed yet: needs a Hub with pickles",
    "only that code can load the result": "followed in attacks/test_consent.py",
    "without {} (the digests that the Hub lists": "part of a message about a Hub that fails while it serves",
    "the Hub does not serve it now": "needs a Hub that fails while it serves",
    "without {} (a download goes on": "needs a Hub that fails while it serves",
    "the disk is full": "needs a full disk",
    "belongs to another user": "needs another user",
    "cannot be written: {}; free some space": "needs a full disk",
    "cannot take a float64 matrix apart": "needs an accelerator without float64",
    "the interrupted run there was other work": "not followed yet: needs a killed run",
    "{} (now {})": "part of a message about memory",
    "lower {}{}": "needs a device without memory",
    ", or say {}": "part of a message about memory",
    "`head` in the suite": "not followed yet: needs a suite and several heads",
    "learning on the CPU": "needs an accelerator",
    "{} takes it out": "part of a card, for its reader",
    "delete it, and say where folders are": "a file of the user that is broken",
    "say whose signature counts": "followed in lifecycle/test_certificate.py",
    "not checked here; {} checks it": "a remark of verify on a certificate; --replay is run in many tests",
    "ask for one made with {}": "advice for another person",
    "certify where it was made": "needs another machine",
    "write a number of days": "a number out of range, with the range",
    "the certificate is unsigned: nobody": "followed in lifecycle/test_certificate.py",
    "unmerge: name the model with": "the command line requires the flag; for users of Python",
    "which reads no model": "not followed yet: needs a published merge whose source is gone",
    "which does not read it": "not followed yet: needs a merge whose source is gone",
    "names one place, and {}": "not followed yet: needs two inner merges",
    "which has to be merged again without it; say where": "followed in lifecycle/test_nested.py",
    "share no disk there": "needs several machines",
    "the Hub still answers for the old commit": "not followed yet: the flag is run in lifecycle/test_purge.py",
    "from which the result is made, is {}": "not followed yet: needs private models",
    "go on from it with {}": "part of a message on files of others",
    "its branch {}, where kept states go": "the flag is that of a push over files of others",
    "has no right to write there": "needs a second user",
    "brings code ({}), which would be copied": "followed in attacks/test_consent.py",
}
"""Part of a message -> where it is followed, or why it is not."""


def test_every_message_with_advice_has_a_scenario() -> None:
    known = [*SCENARIOS, *ON_THE_HUB, *ELSEWHERE]
    new = {text: file for text, file in messages().items() if not any(part in text for part in known)}
    assert not new, "write a scenario for it"
    gone = [part for part in known if not any(part in text for text in messages())]
    assert not gone, "no message says this now"


@pytest.mark.parametrize("part", SCENARIOS)
def test_advice_succeeds(part: str, models: Path, tmp_path: Path) -> None:
    scenario = SCENARIOS[part](models, tmp_path / "out")
    run = tiny.cli(*scenario.fails)
    assert run.code == 1 and scenario.says in run.err, run.err
    for words in scenario.then:
        tiny.done(*words)


@pytest.fixture
def published(hub: HubServer, models: Path, tmp_path: Path) -> Iterator[str]:
    pages.clear()
    upload(hub, tmp_path / "home", {f"org/{name}": models / name for name in ("base", "m0", "m1", "other")})
    tiny.done("merge", "org/m0", "--base", "org/base", "--method", "opcm", "--push-to", "org/merged")
    yield "org/merged"
    pages.clear()


@pytest.mark.slow
def test_advice_with_a_hub(published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.cli("add", published, "org/m1")
    assert run.code == 1 and f"--push-to {published}, or --output FOLDER" in run.err
    tiny.done("add", published, "org/m1", "--output", tmp_path / "added")
    tiny.done("add", published, "org/m1", "--push-to", published)

    given = ("merge", "org/m0", "org/m1", "--base", "org/base", "--method", "linear")
    with monkeypatch.context() as away:
        away.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        run = tiny.cli(*given, "--push-to", "org/later")
        assert "`hfmerge push FOLDER org/later`" in run.err
        tiny.done(*given, "--output", tmp_path / "later")
    tiny.done("push", tmp_path / "later", "org/later")

    run = tiny.cli(*given, "--push-to", "org/other")
    assert run.code == 1 and "or pass --overwrite to replace them" in run.err
    tiny.done(*given, "--push-to", "org/other", "--overwrite")
