"""Digests of what every recipe and every verb gives on tiny models; a change of structure changes none of them.

The digests are those of one kind of arithmetic, which `tests/golden/products.json` names. Elsewhere the test is
skipped. After a change that is meant to change bytes: `UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from tests.fixtures import evaluating, tiny
from tests.learning.test_replay import wordpieces


ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "products.json"
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
LABELS = {"a": ["red", "green"], "b": ["x", "y", "z"], "c": ["yes", "no"], "d": ["in", "out"]}
FEW = {"rows": 12, "length": 10, "generator": "unigram", "held_out": 0.25}
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


def arithmetic() -> dict[str, str]:
    """What the last bits of the products depend on."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    parts = [
        matrix @ matrix.T,
        *torch.linalg.svd(matrix),
        *torch.linalg.eigh(matrix.T @ matrix),
        matrix.float() @ matrix.float().T,
    ]
    digest = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "products": digest}


@pytest.fixture(scope="module")
def golden() -> Any:
    """The recorded digests; with `UPDATE_GOLDEN` what was found is written at the end."""
    held: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {"arithmetic": None, "digests": {}}
    if UPDATE:
        found: dict[str, Any] = {"arithmetic": arithmetic(), "digests": {}}
        yield found["digests"]
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    if held["arithmetic"] != arithmetic():
        pytest.skip(f"the digests were recorded with other arithmetic: {held['arithmetic']}")
    yield held["digests"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, four classifiers tuned from it, an adapter, and another base, each with a tokenizer."""
    root = tmp_path_factory.mktemp("golden")
    base = tiny.build("BertModel", tiny.config("bert"))
    wordpieces(tiny.save(base, root / "base"))
    wordpieces(tiny.save(tiny.fine_tune(base, 99), root / "base2"))
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        model = tiny.with_head("BertForSequenceClassification", base, seed, labels)
        tiny.disturb(model.base_model, 10 + seed, 0.1)
        wordpieces(tiny.save(model, root / name))
    targets = {f"encoder.layer.{i}.attention.self.query": (16, 16) for i in range(2)}
    tiny.adapter(root / "lora", targets, 4, base_model_name_or_path=str(root / "base"))
    return root


def products(folder: Path) -> dict[str, str]:
    """What the ledger's last entry lists, and its numbers."""
    latest = sorted((folder / "merge_history").glob("*.json"))[-1]
    entry = json.loads(latest.read_text())
    scalars = hashlib.sha256(json.dumps(entry["byproducts"]["scalars"], sort_keys=True).encode()).hexdigest()
    states = [state["sha256"] for state in entry["byproducts"]["states"]]
    return {**entry["products"], "scalars": scalars, **{f"state {i}": digest for i, digest in enumerate(states)}}


def check(golden: dict[str, Any], name: str, found: Mapping[str, str]) -> None:
    if UPDATE:
        golden[name] = dict(found)
    assert golden[name] == dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_gives_the_bytes_that_it_gave(
    path: Path, models: Path, tmp_path: Path, golden: dict[str, Any]
) -> None:
    asked = yaml.safe_load(path.read_text())
    count = min(len(asked["models"]), len(LABELS))
    weights = [model.get("weight") if isinstance(model, dict) else None for model in asked["models"]]
    asked["models"] = [
        {"model": str(models / name), **({} if weight is None else {"weight": weight})}
        for name, weight in zip(list(LABELS)[:count], weights, strict=False)
    ]
    asked |= {"base": str(models / "base"), "output": str(tmp_path / "out")}
    asked.pop("push_to", None)
    if "learn" in asked:
        asked["learn"] |= {"replay": FEW, "steps": 6, "batch": 6, "every": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    tiny.done("merge", tmp_path / "recipe.yaml")
    check(golden, f"recipe {path.relative_to(ROOT / 'recipes').as_posix()}", products(tmp_path / "out"))


CHANGES: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "add": lambda out, models: ("add", out, models / "c"),
    "unmerge": lambda out, models: ("unmerge", out, "--remove", "a"),
    "replace": lambda out, models: ("replace", out, "b", models / "d"),
    "reorder": lambda out, models: ("reorder", out, "lora", "b", "a"),
    "rebase": lambda out, models: ("rebase", out, "--base", models / "base2"),
}


@pytest.mark.parametrize("verb", CHANGES)
@pytest.mark.parametrize("method", ["opcm", "gram", "mdm_oc", "ties"])
def test_a_verb_gives_the_bytes_that_it_gave(
    method: str, verb: str, models: Path, tmp_path: Path, golden: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    given = [models / name for name in ("a", "b", "lora")]
    tiny.done("merge", *given, "--base", models / "base", "--method", method, "--state", "all", "--output", out)
    tiny.done(*CHANGES[verb](out, models))
    check(golden, f"{verb} {method}", products(out))


@pytest.mark.slow
def test_scores_are_those_that_they_were(models: Path, tmp_path: Path, golden: dict[str, Any]) -> None:
    out = tmp_path / "out"
    given = [models / name for name in ("a", "b")]
    tiny.done("merge", *given, "--base", models / "base", "--method", "gram", "--output", out)
    tasks = []
    for seed, name in enumerate("ab"):
        evaluating.labelled(tmp_path / f"{name}.jsonl", LABELS[name], 40, seed)
        tasks.append(
            {"name": name, "kind": "text-classification", "dataset": f"./{name}.jsonl", "text": "text",
             "label": "label", "head": str(models / name)}
        )  # fmt: skip
    evaluating.suite(tmp_path / "suite.yaml", *tasks)
    found = tiny.done("evaluate", out, models / "a", "--suite", tmp_path / "suite.yaml", "--no-cache", "--json").json
    values = [[[score["metric"], score["value"], score["n"]] for score in row] for row in found["scores"]]
    scores = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    check(golden, "evaluate", {"scores": scores})
