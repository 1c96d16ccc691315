"""The base that an adapter names is compared with the merge's base, told where it may be another, and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfmerge.engine.named_base import name_of_base
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def root(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base is on the Hub as me/named-base, me/mirror and me/later (earlier: me/earlier); me/wider is wider."""
    root = tmp_path_factory.mktemp("named-base")
    tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), root / "base")
    wider = tiny.config("llama", intermediate_size=2 * tiny.config("llama").intermediate_size)
    tiny.save(tiny.build("LlamaForCausalLM", wider), root / "wider")
    tiny.adapter(root / "adapter", tiny.attention(), 4)
    api = HfApi()
    for name, folder in {"named-base": "base", "mirror": "base", "earlier": "base", "wider": "wider"}.items():
        api.create_repo(f"me/{name}", exist_ok=True)
        api.upload_folder(repo_id=f"me/{name}", folder_path=root / folder)
    api.move_repo("me/earlier", "me/later")
    return root


def adapter_of(root: Path, tmp_path: Path, **said: object) -> Path:
    """A copy of the adapter whose configuration says something else of its base."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in (root / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tiny.edit_config(folder, "adapter_config.json", **said)
    return folder


def merged(base: object, adapter: Path, tmp_path: Path, *more: object) -> tiny.Run:
    return tiny.cli(
        "merge", adapter, "--base", base, "--method", "task_arithmetic", "--output", tmp_path / "out", *more
    )


def said_of_base(run: tiny.Run) -> list[str]:
    assert run.code == 0, run.err
    return [line for line in (run.out + run.err).splitlines() if "as its base" in line]


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("me/named-base", "me/named-base"),
        ("me/named-base", "ME/Named-Base"),  # the Hub takes capitals for small letters
        ("me/named-base", "me/mirror"),  # the same weights by their digests
        ("me/later", "me/earlier"),  # the Hub leads from the old name to the new one
        ("me/named-base", ""),
        ("folder", "me/named-base"),  # the same files by their sizes
        ("folder", "its own path"),
    ],
)
def test_the_same_base_is_not_spoken_of(base: str, named: str, root: Path, tmp_path: Path) -> None:
    place = str(root / "base") if base == "folder" else base
    named = str(root / "base") if named == "its own path" else named
    mine = adapter_of(root, tmp_path, base_model_name_or_path=named)
    assert not said_of_base(merged(place, mine, tmp_path))


@pytest.mark.parametrize(
    ("base", "named", "words"),
    [
        ("me/named-base", "elsewhere/named-base-bnb-4bit", "a quantised copy of this model"),
        ("me/named-base", "elsewhere/named-base", "Their weights were not compared"),
        ("me/named-base", "me/wider", "Their configurations differ: intermediate_size"),
        ("me/named-base", "/home/somebody/models/x", "names x as its base"),
        ("me/named-base", r"C:\models\x", "names x as its base"),
        ("folder", "elsewhere/other", "Their weights were not compared"),
        ("folder", "me/wider", "Their configurations differ: intermediate_size"),
    ],
)
def test_another_base_is_a_warning_that_stands_in_ledger_and_card(
    base: str, named: str, words: str, root: Path, tmp_path: Path
) -> None:
    place = str(root / "base") if base == "folder" else base
    mine = adapter_of(root, tmp_path, base_model_name_or_path=named)
    (line,) = said_of_base(merged(place, mine, tmp_path))
    assert words in line
    entry = json.loads((tmp_path / "out" / "merge_history" / "0001.json").read_text(encoding="utf-8"))
    name = name_of_base({"base_model_name_or_path": named})
    assert entry["materials"]["models"][0]["trained_on"] == name and "/home" not in json.dumps(entry)
    assert "as its base" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert tiny.cli("verify", tmp_path / "out", "--replay").code == 0


def test_another_commit_of_the_same_base_is_told(root: Path, tmp_path: Path) -> None:
    api = HfApi()
    old = api.model_info("me/named-base").sha
    api.create_branch("me/named-base", branch="tuned")
    api.upload_file(repo_id="me/named-base", revision="tuned", path_in_repo="config.json",
                    path_or_fileobj=(root / "wider" / "config.json").read_bytes())  # fmt: skip
    api.upload_file(repo_id="me/named-base", revision="tuned", path_in_repo="model.safetensors",
                    path_or_fileobj=(root / "wider" / "model.safetensors").read_bytes())  # fmt: skip
    mine = adapter_of(root, tmp_path, base_model_name_or_path="me/named-base", revision="tuned")
    (line,) = said_of_base(merged(f"me/named-base@{old}", mine, tmp_path))
    assert "It was trained on commit" in line and str(old)[:8] in line


def test_a_strict_base_refuses_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    mine = adapter_of(root, tmp_path, base_model_name_or_path="elsewhere/other")
    run = merged("me/named-base", mine, tmp_path, "--strict-base")
    assert run.code == 1 and "names elsewhere/other as its base" in run.err and "--strict-base" in run.err
    assert not (tmp_path / "out").exists()
    right = tmp_path / "right"
    right.mkdir()
    mine = adapter_of(root, right, base_model_name_or_path="me/named-base")
    assert not said_of_base(merged("me/named-base", mine, tmp_path, "--strict-base"))
