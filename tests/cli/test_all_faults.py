"""All faults of a job are told in one message, before any work and at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfmerge.hubserver.serve import HubServer
from tests.attacks.test_consent import lying
from tests.fixtures import pages, tiny
from tests.fixtures.hub import USERS


SECONDS = 2.0
"""A list of faults takes no longer, in a process that has imported what it needs."""
FULL = "the folder is not empty; empty it, or choose another --output."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    tiny.save(base, root / "broken")
    tiny.edit_config(root / "broken", hidden_size=17)
    tiny.save(base, root / "own")
    tiny.edit_config(root / "own", auto_map={"AutoModel": "modeling_own.Model"})
    (root / "full").mkdir()
    (root / "full" / "note.txt").write_text("mine")
    given = ("--base", root / "base", "--method", "opcm", "--output", root / "merged")
    tiny.done("merge", root / "m0", root / "m1", *given)
    tiny.done("merge", root / "own", root / "m1", *given[:-1], root / "coded")
    lying(root / "coded", trust_remote_code=True)
    return root


def told(root: Path, *command: object) -> list[str]:
    """The lines of an error that leaves every file as it is, and comes in time."""
    before = tiny.everything(root)
    start = time.process_time()
    run = tiny.cli(*command)
    spent = time.process_time() - start
    assert run.code == 1 and tiny.everything(root) == before
    assert spent < SECONDS, run.err
    head, *lines = run.err.splitlines()
    assert f": {len(lines)} problem" in head and head.endswith("nothing downloaded"), run.err
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_every_fault_of_a_merge(root: Path, monkeypatch: pytest.MonkeyPatch, dry: tuple[str, ...]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = [root / name for name in ("m0", "gone", "m0", "broken")]
    lines = told(
        root, "merge", *models, "--method", "opmc", "--norm", "many", "--output", root / "full",
        "--push-to", "org/merged", "--device", "nonsense", *dry,
    )  # fmt: skip
    starts = [
        "base is missing",
        "method.norm must be",
        'method.name "opmc" is not a method; did you mean "opcm"?',
        f'models[2] "{root / "m0"}" is models[0] again',
        f"output {root / 'full'}: {FULL}",
        "device --device nonsense: ",
        "push_to org/merged: the Hub cannot be reached",
        f"models[1] {root / 'gone'}: no such folder",
        f"models[3] {root / 'broken'}: ",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_a_plan_asks_for_no_place(root: Path) -> None:
    lines = told(root, "plan", root / "m0", root / "gone", "--method", "opmc")
    assert [line.split()[0] for line in lines] == ["base", "method.name", "models[1]"]


def test_one_fault_is_told_as_it_is(root: Path) -> None:
    given = ("--base", root / "base", "--method", "opcm")
    run = tiny.cli("merge", root / "m0", root / "m1", *given, "--output", root / "full")
    assert run.err == f"hfmerge: {root / 'full'}: {FULL}\n"


def test_every_fault_of_a_change(root: Path) -> None:
    places = ("--output", root / "full", "--device", "nonsense")
    for dry in ((), ("--dry-run",)):
        lines = told(root, "add", root / "merged", root / "gone", root / "m0", *places, *dry)
        assert [line.split()[0] for line in lines] == ["output", "device", "models[2]", "models[3]"]
        lines = told(root, "unmerge", root / "merged", "--remove", "m7", *places, *dry)
        assert [line.split()[0] for line in lines] == ["output", "device", "unmerge"]
        lines = told(root, "replace", root / "merged", "m0", root / "gone", *places, *dry)
        assert [line.split()[0] for line in lines] == ["output", "device", "models[0]"]
        lines = told(root, "add", root / "coded", root / "gone", *places, *dry)
        assert [line.split()[0] for line in lines] == ["output", "device", "models[2]", "models[0]"]
        assert "pass --trust-remote-code if you trust the author" in lines[3]
        lines = told(root, "add", root / "m0", root / "m1", *places, *dry)
        assert [line.split()[0] for line in lines] == ["merged", "output", "device"]


def test_a_folder_that_cannot_be_made(root: Path) -> None:
    given = ("--base", root / "base", "--method", "opcm", "--output", root / "full" / "note.txt" / "out")
    assert "note.txt: not a folder; choose another --output." in tiny.cli("merge", root / "m0", *given).err


@pytest.fixture
def read_only(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A token of the same user that may only read."""
    from huggingface_hub import HfApi

    told = HfApi(token=USERS["me"]).whoami()
    told["auth"] = {"accessToken": {"role": "read"}}
    monkeypatch.setattr(HfApi, "whoami", lambda self, *given, **named: told)
    pages.clear()
    yield
    pages.clear()


@pytest.mark.usefixtures("read_only")
def test_every_fault_with_a_hub(root: Path) -> None:
    out = ("--output", root / "full", "--device", "nonsense")
    lines = told(
        root, "merge", root / "m0", root / "broken", "--base", "org/nowhere", "--method", "opmc", *out,
        "--push-to", "strangers/merged",
    )  # fmt: skip
    assert [line.split()[0] for line in lines] == ["method.name", "output", "device", "push_to", "base", "models[1]"]
    assert "may only read" in lines[3] and "has no right to write under strangers" in lines[3]
    assert "org/nowhere: no such repository" in lines[4]
    lines = told(root, "add", root / "merged", "org/none", *out, "--push-to", "strangers/merged")
    assert [line.split()[0] for line in lines] == ["output", "device", "push_to", "add", "models[0]"]
    assert "base: was merged from a folder; say where it is now with --source" in lines[3]  # by another user
    assert "org/none: no such repository" in lines[4]


def test_a_push_alone_creates_nothing_for_a_job_with_faults(hub: HubServer, root: Path) -> None:
    from huggingface_hub import HfApi

    told(root, "merge", root / "gone", "--method", "opcm", "--push-to", "org/early")
    assert not HfApi().repo_exists("org/early")
