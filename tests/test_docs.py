"""How-to pages and concepts are run, and what is printed is what they show (see `pages`); formats name every key."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfmerge.hubserver.serve import HubServer
from tests.fixtures import evaluating, pages, tiny
from tests.fixtures.shell import upload


HOW_TO = sorted(path for folder in ("how-to", "concepts") for path in (pages.ROOT / "docs" / folder).glob("*.md"))
NAMES = ("base", "a", "b", "c", "adapter")
"""Of the models that the pages start with."""


@pytest.fixture(scope="module")
def models(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the pages call org/base, org/a, org/b, org/c and org/adapter, on the Hub; the folder of their data sets."""
    root = tmp_path_factory.mktemp("docs")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    labels = {"a": ["bad", "good"], "b": ["art", "law", "sport"], "c": ["no", "yes"]}
    for seed, (name, names) in enumerate(labels.items(), 1):
        tiny.save(tiny.with_head("BertForSequenceClassification", base, seed, names), root / name)
        evaluating.labelled(root / "data" / f"{name}.jsonl", names, 60, seed)
    targets = {f"encoder.layer.{i}.attention.self.{part}": (16, 16) for i in range(2) for part in ("query", "value")}
    tiny.adapter(root / "adapter", targets, 4, base_model_name_or_path="org/base")
    for name in ("base", *labels):
        tiny.tokenizer(root / name, evaluating.TOKENS)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    (root / "adapter" / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    pages.clear()
    upload(hub, root / "home", {f"org/{name}": root / name for name in NAMES})
    yield root
    pages.clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_how_to(path: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models / "data", tmp_path / "data")
    pages.run(path, tmp_path, monkeypatch, [f"org/{name}" for name in NAMES])


def keys(value: Any) -> Iterator[str]:
    """All keys of a JSON value but paths and digests."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if re.fullmatch("[a-z_]+", key):
                yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def test_the_pages_of_formats_name_every_key(models: Path, tmp_path: Path) -> None:
    sources = [models / "a", models / "b"]
    tiny.done("merge", *sources, "--base", models / "base", "--method", "gram", "--output", tmp_path / "out",
              "--keep-sources")  # fmt: skip
    entry = json.loads((tmp_path / "out" / "merge_history" / "0001.json").read_text(encoding="utf-8"))
    options = {*entry["method"].pop("options"), *entry["settings"]["card"]}
    page = (pages.ROOT / "docs" / "formats" / "ledger.md").read_text(encoding="utf-8")
    assert not {key for key in keys(entry) if f"`{key}`" not in page} - options
    with zipfile.ZipFile(next((tmp_path / "out" / "merge_state" / "sources").glob("*.zip"))) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    page = (pages.ROOT / "docs" / "formats" / "archive.md").read_text(encoding="utf-8")
    assert not {key for key in [*manifest, "size", "sha256"] if f"`{key}`" not in page}
