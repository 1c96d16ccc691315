"""`unmerge --check`: scores before and after, on the removed model's task and on the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fixtures import evaluating, tiny


pytestmark = pytest.mark.slow
ALL = ("mood", "topic", "third")
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


def merged(world: Path, out: Path, method: str, names: Sequence[str] = ALL, *more: object) -> Path:
    models = [world / name for name in names]
    tiny.done("merge", *models, "--base", world / "base", "--method", method, "--output", out, *more)
    return out


def learning(*more: str) -> list[str]:
    settings = ("replay.rows=12", "replay.generator=unigram", "replay.length=8", "steps=8", "rate=0.1", *more)
    return [word for setting in settings for word in ("--learn", setting)]


def apart(after: Path, never: Path, base: Path) -> float:
    """Distance of two merges, relative to that of the second from the base."""
    first, second, third = (tiny.tensors(folder) for folder in (after, never, base))
    sides = [sum(float((a[k].double() - b[k].double()).square().sum()) for k in third)
             for a, b in ((first, second), (second, third))]  # fmt: skip
    return float((sides[0] / sides[1]) ** 0.5)


@pytest.mark.parametrize("method", ["linear", "opcm"])
def test_after_an_exact_removal_nothing_is_left(world: Path, tmp_path: Path, method: str) -> None:
    out = merged(world, tmp_path / "out", method)
    run = tiny.done("unmerge", out, "--remove", "mood", "--check", world / "suite.yaml", "--json")
    told = json.loads(run.out)["check"]
    assert told["removed"] == ["mood"] and told["identical"] is True
    assert told["retained_gap"] == told["distance"] == 0.0 and told["residual"] == {"mood": 0.0}
    labels = [model["label"] for model in told["matrix"]["models"]]
    assert labels == ["base", "before", "after", "never merged"]
    values = {label: [s["value"] for s in row] for label, row in zip(labels, told["matrix"]["scores"], strict=True)}
    assert values["after"] == values["never merged"] != values["before"]


def test_after_a_subtraction_the_gap_is_shown(world: Path, tmp_path: Path) -> None:
    out = merged(world, tmp_path / "out", "opcm")
    run = tiny.done("unmerge", out, "--remove", "mood", "--mode", "subtract", "--check", world / "suite.yaml")
    assert "does NOT have the same bytes as a merge that never held the model" in run.out
    assert "| never merged |" in run.out and "points compared with a merge that never held the model" in run.out


def test_the_distance_is_that_of_the_weights(world: Path, tmp_path: Path) -> None:
    out = merged(world, tmp_path / "out", "mdm_oc")
    run = tiny.done(
        "unmerge", out, "--remove", "mood", "--mode", "subtract", "--check", world / "suite.yaml", "--json"
    )
    told = run.json["check"]
    never = merged(world, tmp_path / "never", "mdm_oc", ["topic", "third"])
    assert told["identical"] is False and told["distance"] > 1e-3
    assert told["distance"] == pytest.approx(apart(out, never, world / "base"), rel=1e-5)


@pytest.mark.parametrize("relearn", [True, False])
def test_never_merged_learns_its_own_weights(world: Path, tmp_path: Path, relearn: bool) -> None:
    """Weights that were found beside the model that left are no removal of what it had a part in."""
    names, flags = ["mood", "topic"], learning(f"relearn={str(relearn).lower()}")
    out = merged(world, tmp_path / "out", "mdm_oc", names, *flags)
    never = merged(world, tmp_path / "never", "mdm_oc", names[1:], *flags)
    run = tiny.done("unmerge", out, "--remove", "mood", "--check", world / "suite.yaml", "--json")
    told = run.json["check"]
    assert told["identical"] is relearn
    assert told["distance"] == (0.0 if relearn else pytest.approx(apart(out, never, world / "base"), rel=1e-5))
    assert relearn or told["distance"] > 1e-2


@pytest.mark.parametrize("mode", ["exact", "subtract"])
def test_continual_experiments_take_learned_models_out(world: Path, tmp_path: Path, mode: str) -> None:
    recipe = {
        "base": str(world / "base"), "models": [str(world / "mood"), str(world / "topic")], "method": "mdm_oc",
        "learn": {"replay": {"rows": 8, "generator": "unigram", "length": 8}, "steps": 4, "rate": 0.1, "every": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run = tiny.done(
        "continual", tmp_path / "recipe.yaml", "--suite", world / "suite.yaml", "--orders", 1, "--mode", mode,
        "--output", tmp_path / "out", "--no-plots", "--json",
    )  # fmt: skip
    (order,) = run.json["variants"][0]["orders"]
    assert run.json["settings"]["mode"] == mode and len(order["removals"]) == 2
    for removal in order["removals"]:
        assert (removal["identical"], removal["distance"] == 0.0) == (
            (True, True) if mode == "exact" else (False, False)
        )
    text = (tmp_path / "out" / "continual.md").read_text()
    assert ("subtracted, which is approximate" in text) == (mode == "subtract")


def test_a_suite_without_the_models_task_is_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    out = merged(world, tmp_path / "out", "linear")
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "third", "--check", world / "suite.yaml")
    assert run.code == 1 and "says `head: third`" in run.err
    assert tiny.everything(out) == before
