"""`unmerge --check`: scores before and after, on the removed model's task and on the others."""

from __future__ import annotations

import json
from pathlib import Path

import evaluating
import pytest
import tiny


MOODS, TOPICS = ["bad", "so-so", "good"], ["art", "sport", "law", "food"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    tasks = []
    for seed, (name, labels) in enumerate({"mood": MOODS, "topic": TOPICS}.items(), 1):
        tiny.save(tiny.with_head("BertForSequenceClassification", base, seed, labels), root / name)
        evaluating.labelled(root / "data" / f"{name}.jsonl", labels, 40, seed)
        tasks.append(
            {"name": name, "kind": "text-classification", "dataset": f"./data/{name}.jsonl", "text": "text",
             "label": "label", "head": str(root / name)}
        )  # fmt: skip
    tiny.save(tiny.fine_tune(base, 7), root / "third")
    for name in ("base", "mood", "topic", "third"):
        tiny.tokenizer(root / name, evaluating.TOKENS)
    evaluating.suite(root / "suite.yaml", *tasks)
    return root


def merged(world: Path, out: Path, method: str) -> Path:
    models = [world / name for name in ("mood", "topic", "third")]
    tiny.done("merge", *models, "--base", world / "base", "--method", method, "--output", out)
    return out


@pytest.mark.parametrize("method", ["linear", "opcm"])
def test_after_an_exact_removal_nothing_is_left(world: Path, tmp_path: Path, method: str) -> None:
    out = merged(world, tmp_path / "out", method)
    run = tiny.done("unmerge", out, "--remove", "mood", "--check", world / "suite.yaml", "--json")
    told = json.loads(run.out)["check"]
    assert told["removed"] == ["mood"] and told["identical"] is True
    assert told["retained_gap"] == 0.0 and told["residual"] == {"mood": 0.0}
    labels = [model["label"] for model in told["matrix"]["models"]]
    assert labels == ["base", "before", "after", "never merged"]
    values = {label: [s["value"] for s in row] for label, row in zip(labels, told["matrix"]["scores"], strict=True)}
    assert values["after"] == values["never merged"] != values["before"]


def test_after_a_subtraction_the_gap_is_shown(world: Path, tmp_path: Path) -> None:
    out = merged(world, tmp_path / "out", "opcm")
    run = tiny.done("unmerge", out, "--remove", "mood", "--mode", "subtract", "--check", world / "suite.yaml")
    assert "NOT the same bytes as a merge that never saw it" in run.out
    assert "| never merged |" in run.out and "points against never merged" in run.out


def test_a_suite_without_the_models_task_is_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    out = merged(world, tmp_path / "out", "linear")
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "third", "--check", world / "suite.yaml")
    assert run.code == 1 and "says `head: third`" in run.err
    assert tiny.everything(out) == before
