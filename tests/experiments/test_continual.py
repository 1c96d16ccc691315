"""The continual protocol: formulas against examples worked by hand, and whole experiments on tiny models."""

import json
import random
from pathlib import Path

import pytest
import torch

import hfmerge
from hfmerge.errors import HfMergeError, RecipeError
from hfmerge.evaluation.evaluator import Evaluator
from hfmerge.evaluation.suite import Suite, Task, load_suite
from hfmerge.evaluation.weight_distance import distance
from hfmerge.experiments.continual import metrics
from hfmerge.experiments.continual.config import Variant, check_variants, orders, pair, sweep
from hfmerge.experiments.continual.measures import PeakMemory
from hfmerge.experiments.continual.report import to_markdown
from hfmerge.recipe.recipe import load_recipe
from tests.fixtures import launching, tiny


# after the first, second and third of three tasks; the next task is scored before it arrives
ROWS = [{0: 0.9, 1: 0.3}, {0: 0.8, 1: 0.7, 2: 0.2}, {0: 0.6, 1: 0.75, 2: 0.5}]
BASE, ALONE = {0: 0.1, 1: 0.2, 2: 0.4}, {0: 0.9, 1: 0.8, 2: 1.0}


def test_accuracy_is_the_mean_over_tasks_seen() -> None:
    assert metrics.accuracy(ROWS, 0) == 0.9
    assert metrics.accuracy(ROWS, 1) == pytest.approx((0.8 + 0.7) / 2)
    assert metrics.accuracy(ROWS, 2) == pytest.approx((0.6 + 0.75 + 0.5) / 3)


def test_backward_transfer_has_two_denominators() -> None:
    total = (0.6 - 0.9) + (0.75 - 0.7)
    assert metrics.backward_transfer(ROWS) == pytest.approx(total / 2)
    assert metrics.backward_transfer(ROWS, over_all=True) == pytest.approx(total / 3)
    assert metrics.backward_transfer(ROWS[:1]) is None


def test_forward_transfer_is_before_arrival_and_the_gap_at_arrival() -> None:
    assert metrics.forward_transfer(ROWS, BASE) == pytest.approx(((0.3 - 0.2) + (0.2 - 0.4)) / 2)
    assert metrics.learning_gap(ROWS, ALONE) == pytest.approx(((0.9 - 0.9) + (0.7 - 0.8) + (0.5 - 1.0)) / 3)
    assert metrics.forward_transfer(ROWS[:1], BASE) is None


def test_forgetting_is_from_the_best_since_arrival() -> None:
    assert metrics.forgetting(ROWS) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
    # a score before arrival, however high, is no knowledge to forget
    lucky = [ROWS[0] | {1: 1.0}, *ROWS[1:]]
    assert metrics.forgetting(lucky) == metrics.forgetting(ROWS)


def test_normalised_accuracy_is_a_mean_of_ratios() -> None:
    assert metrics.normalised_accuracy(ROWS, ALONE) == pytest.approx((0.6 / 0.9 + 0.75 / 0.8 + 0.5) / 3)
    assert metrics.normalised_accuracy(ROWS, ALONE | {1: 0.0}) is None


def test_fidelity_by_hand() -> None:
    found = metrics.fidelity(
        "m", 1, {0: 0.5, 1: 0.4, 2: 0.9}, {0: 0.6, 1: 0.1, 2: 0.7}, identical=False, distance=0.25, seconds=1.0
    )
    assert found.retained_gap == pytest.approx((0.1 + 0.2) / 2) and found.residual == pytest.approx(0.3)
    assert found.retained == pytest.approx(0.7) and found.removed_score == 0.4


def test_drops_are_taken_at_the_arrival_of_the_other() -> None:
    cosine = [[1.0, 0.3, 0.1], [0.3, 1.0, None], [0.1, None, 1.0]]
    by_recipe = [ROWS, [{2: 0.9, 0: 0.0}, {2: 0.5, 0: 0.6, 1: 0.1}, {2: 0.4, 0: 0.7, 1: 0.9}]]
    found = metrics.drops(cosine, [(0, 1, 2), (2, 0, 1)], by_recipe)
    assert [(d.old, d.new, d.cosine, d.orders) for d in found] == [(0, 1, 0.3, 2), (0, 2, 0.1, 1), (2, 0, 0.1, 1)]
    assert [d.drop for d in found] == pytest.approx([((0.9 - 0.8) + (0.6 - 0.7)) / 2, 0.8 - 0.6, 0.9 - 0.5])


def test_correlation_of_values_and_of_ranks() -> None:
    pairs = [(1.0, 1.0), (2.0, 8.0), (3.0, 27.0), (4.0, 64.0)]
    assert metrics.correlation(metrics.ranked(pairs)) == pytest.approx(1.0)
    # by hand: means 2.5 and 25, sums of products 104, 5 and 2390
    assert metrics.correlation(pairs) == pytest.approx(104 / (5 * 2390) ** 0.5)
    assert metrics.ranked([(1.0, 5.0), (1.0, 3.0), (2.0, 4.0)]) == [(0.5, 2.0), (0.5, 0.0), (2.0, 1.0)]
    assert metrics.correlation([(1.0, 2.0)] * 3) is None and metrics.correlation(pairs[:2]) is None


def test_deviation_is_that_of_a_sample() -> None:
    assert metrics.mean_and_deviation([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}
    assert metrics.mean_and_deviation([1.0, None]) == {"mean": 1.0, "std": None, "n": 1}
    assert metrics.mean_and_deviation([None]) == {"mean": None, "std": None, "n": 0}


def test_orders_are_different_and_seeded() -> None:
    found = orders(4, 10, 42)
    assert len({*found}) == 10 and all(sorted(order) == [0, 1, 2, 3] for order in found)
    assert found == orders(4, 10, 42) and found != orders(4, 10, 43)
    assert sorted(orders(3, 50, 0)) == sorted(orders(3, 6, 7)) and len(orders(3, 50, 0)) == 6
    first = [0, 1, 2, 3]
    random.Random(42).shuffle(first)
    assert found[0] == tuple(first)


def suite(*names: str, **heads: str) -> Suite:
    tasks = [Task(n, "text-classification", "accuracy", "./d.jsonl", head=heads.get(n)) for n in names]
    return Suite("s", tuple(tasks))


def test_every_model_gets_its_task() -> None:
    names, refs = ["org--bert-sms-spam", "org--bert-mr"], ["org/bert-sms-spam@1", "org/bert-mr"]
    assert pair(suite("mr", "sms_spam", "other"), names, refs, {}) == ["sms_spam", "mr"]
    assert pair(suite("a", "b", a="org/bert-mr", b="org/bert-sms-spam@1"), names, refs, {}) == ["b", "a"]
    assert pair(suite("a", "mr"), names, refs, {"a": "org/bert-sms-spam@1"}) == ["a", "mr"]
    with pytest.raises(RecipeError, match="org--bert-sms-spam has no task"):
        pair(suite("mr"), names, refs, {})
    with pytest.raises(RecipeError, match="is none of the models"):
        pair(suite("mr", "sms_spam"), names, refs, {"mr": "org/else"})
    with pytest.raises(RecipeError, match="is not in s"):
        pair(suite("mr", "sms_spam"), names, refs, {"nli": "org/bert-mr"})
    # a text tower is nobody's own, and a name within other names is the one that is whole
    clip = ["mnist", "emnist_letters", "fashion_mnist", "kmnist", "stanford-cars"]
    tasks = [Task(n, "zero-shot-image-classification", "accuracy", "o/d", head="o/clip") for n in reversed(clip)]
    owners = [f"o/clip-vit-base-patch32_{name}" for name in clip]
    assert pair(Suite("s", tuple(tasks)), [ref.replace("/", "--") for ref in owners], owners, {}) == clip
    worse = Suite("s", (*suite("mr", "sms_spam").tasks, Task("p", "perplexity", "perplexity", "./d", text=("text",))))
    with pytest.raises(RecipeError, match="better when lower"):
        pair(worse, names, refs, {})


LABELS = {"mr": ["bad", "good"], "news": ["art", "sport", "war"], "spam": ["ham", "spam"]}
WORDS = ["[UNK]", *(f"w{i}" for i in range(tiny.WORDS - 1))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three classifiers, their data, a suite and recipes."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.tokenizer(tiny.save(base, folder / "base"), WORDS)
    chance = random.Random(0)
    for seed, (task, labels) in enumerate(LABELS.items(), 1):
        model = tiny.with_head("BertForSequenceClassification", base, seed, labels)
        tiny.tokenizer(tiny.save(model, folder / f"tiny-{task}"), WORDS)
        rows = [{"text": " ".join(chance.choices(WORDS[1:], k=6)), "label": chance.choice(labels)} for _ in range(40)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        f"  - {{name: {task}, kind: text-classification, dataset: ./{task}.jsonl, text: text, label: label}}\n"
        for task in LABELS
    ]
    (folder / "suite.yaml").write_text("name: tiny\ntasks:\n" + "".join(tasks))
    models = "".join(f"  - {folder}/tiny-{task}\n" for task in LABELS)
    for name, method in (("opcm", "{name: opcm, alpha: 0.5}"), ("ties", "{name: ties}")):
        (folder / f"{name}.yaml").write_text(f"base: {folder}/base\nmodels:\n{models}method: {method}\n")
    return folder


@pytest.mark.slow
def test_an_experiment_says_what_merging_by_hand_says(world: Path, tmp_path: Path) -> None:
    run = tiny.done(
        "continual", world / "opcm.yaml", "--suite", world / "suite.yaml", "--orders", 2, "--output", tmp_path / "out",
        "--json",
    )  # fmt: skip
    data = run.json
    assert data == json.loads((tmp_path / "out" / "continual.json").read_text())
    tasks = [model["task"] for model in data["models"]]
    assert tasks == list(LABELS)
    (variant,) = data["variants"]
    by_hand = Evaluator(load_suite(world / "suite.yaml"), heads={t: str(world / f"tiny-{t}") for t in LABELS})
    for order in variant["orders"]:
        recipe = load_recipe(world / "opcm.yaml")
        for t, step in enumerate(order["steps"]):
            place = tmp_path / f"by-hand-{order['order']}-{t}"
            models = tuple(recipe.models[i] for i in order["order"][: t + 1])
            merged = hfmerge.merge(hfmerge.Recipe(recipe.base, models, recipe.method), output=place)
            wanted = by_hand.score(str(place))
            scored = order["order"][: t + 2]
            assert {i: s["value"] for i, s in step["scores"].items()} == {
                str(i): wanted[tasks[i]].value
                for i in sorted(scored)  # type: ignore[union-attr]
            }
            assert step["accuracy"] == pytest.approx(
                sum(wanted[tasks[i]].value for i in order["order"][: t + 1]) / (t + 1)  # type: ignore[union-attr]
            )
            assert step["norm"] == pytest.approx(float(merged.entry.scalars.merged_norm))
            assert step["drift"] == pytest.approx(1.0)  # the norm that OPCM keeps
            assert ("continued from the kept state" in step["how"]) == (t > 0)
        assert order["metrics"]["accuracy"] == order["steps"][-1]["accuracy"]
    assert variant["summary"]["accuracy"]["n"] == 2
    first, second = variant["orders"]
    assert len(first["removals"]) == 3 and second["removals"] == []
    for removal in first["removals"]:
        assert removal["identical"]
        assert removal["distance"] == removal["retained_gap"] == removal["residual"] == 0.0
    assert variant["inspection"]["interference"][first["order"][0]] == 0.0
    assert not (tmp_path / "out" / "merge").exists()
    text = (tmp_path / "out" / "continual.md").read_text()
    assert "BWT, /(T-1)" in text and "| removed |" in text and str(world) not in text
    assert ", order 1 |" not in text, "models were taken out of one order only"
    second["removals"] = first["removals"]
    assert to_markdown(data).count(", order 2 |") == 3
    lines = (tmp_path / "out" / "continual.csv").read_text().splitlines()
    assert lines[0].startswith("variant,order,step") and any("removal residual" in line for line in lines)
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    wanted_figures = {"accuracy_matrix", "accuracy_over_steps", "norm_drift", "kept_energy", "similarity_against_drop"}
    assert figures == {f"{name}.{suffix}" for name in wanted_figures for suffix in ("png", "svg")}


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(world: Path, tmp_path: Path) -> None:
    def asked(*more: object) -> list[object]:
        flags = ["--suite", world / "suite.yaml", "--output", tmp_path / "out", "--removals", "none", "--no-plots"]
        return ["continual", world / "opcm.yaml", *flags, *more]

    def cells() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}

    child = launching.start("-m", "hfmerge", *map(str, asked("--orders", 2)), together=False)
    assert child.stderr is not None
    # killed in the middle: some cells are there, the rest is not
    for line in child.stderr:
        if "2 models" in line:
            break
    child.kill()
    child.communicate()
    before = cells()
    assert before and not (tmp_path / "out" / "continual.json").exists()
    run = tiny.done(*asked("--orders", 2, "--json"))
    after = cells()
    assert before.items() < after.items()
    fresh = tiny.done(*asked("--orders", 2, "--json"), "--output", tmp_path / "fresh")

    def without_times(data: object) -> object:
        if isinstance(data, dict):
            return {
                k: without_times(v) for k, v in data.items() if k not in ("seconds", "peak_bytes", "cached", "how")
            }
        return [without_times(item) for item in data] if isinstance(data, list) else data

    assert without_times(run.json) == without_times(fresh.json)
    # more orders take over what is there
    tiny.done(*asked("--orders", 3))
    assert after.items() < cells().items()
    assert tiny.done(*asked("--orders", 3)).err.count(" s\n") == 0


@pytest.mark.slow
def test_a_sweep_and_several_recipes_are_variants(world: Path, tmp_path: Path) -> None:
    flags = ["--suite", world / "suite.yaml", "--orders", 1, "--removals", "none", "--json"]
    alphas = "method.options.alpha=0.9,0.1,0.5"
    data = tiny.done("continual", world / "opcm.yaml", *flags, "--sweep", alphas, "--output", tmp_path / "a").json
    assert [(one["label"], one["method"]["alpha"]) for one in data["variants"]] == [
        ("alpha=0.9", 0.9), ("alpha=0.1", 0.1), ("alpha=0.5", 0.5),
    ]  # fmt: skip
    shares = [sum(one["inspection"]["interference"]) for one in data["variants"]]
    assert shares[0] > shares[2] > shares[1]
    assert {"sweep.svg", "sweep_interference.png"} < {path.name for path in (tmp_path / "a" / "figures").iterdir()}
    recipes = (world / "opcm.yaml", world / "ties.yaml")
    data = tiny.done("continual", *recipes, *flags, "--no-plots", "--output", tmp_path / "b").json
    assert [one["label"] for one in data["variants"]] == ["opcm", "ties"]
    assert data["variants"][1]["inspection"]["interference"] is None


def test_faults_are_named_before_any_work(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(world / "opcm.yaml")
    with pytest.raises(RecipeError, match="is not of the form"):
        sweep(recipe, "", ["alpha=0.1"])
    with pytest.raises(RecipeError, match="alpha"):
        sweep(recipe, "", ["method.options.alpha=2"])
    both = sweep(recipe, "x", ["method.name=opcm,ties", "method.norm=none,mean"])
    assert [v.label for v in both] == [f"x name={n}, norm={m}" for n in ("opcm", "ties") for m in ("none", "mean")]
    with pytest.raises(HfMergeError, match="two variants of this name"):
        check_variants([Variant("a", recipe, {}), Variant("a", recipe, {})])
    other = hfmerge.Recipe(recipe.base, recipe.models[:2], recipe.method)
    with pytest.raises(HfMergeError, match="other base or models"):
        check_variants([Variant("a", recipe, {}), Variant("b", other, {})])
    with pytest.raises(HfMergeError, match="cannot arrive one after another"):
        check_variants([Variant("a", hfmerge.Recipe(recipe.base, recipe.models[:2], slerp()), {})])
    run = tiny.cli(
        "continual", world / "opcm.yaml", "--suite", world / "suite.yaml", "--output", tmp_path / "x", "--orders", 0
    )
    assert run.code == 1 and "at least one order" in run.err and not (tmp_path / "x").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = tiny.cli("continual", world / "opcm.yaml", "--suite", world / "suite.yaml", "--output", tmp_path / "x")
    assert run.code == 1 and "works in one process" in run.err and not (tmp_path / "x").exists()


def slerp() -> hfmerge.MethodChoice:
    return hfmerge.MethodChoice("slerp", {"t": 0.5}, "none")


def test_distance_and_peak(tmp_path: Path) -> None:
    model = tiny.build("BertModel", tiny.config("bert"))
    tuned = tiny.fine_tune(model, 1)
    a, b = tiny.save(model, tmp_path / "a"), tiny.save(tuned, tmp_path / "b")
    ours, theirs = tiny.tensors(a), tiny.tensors(b)
    wanted = sum(float((ours[key] - theirs[key]).double().square().sum()) for key in ours)
    assert distance(a, b) == pytest.approx(wanted**0.5, rel=1e-6)
    peak = PeakMemory()
    block = torch.ones(20_000_000)
    found = peak.read()
    assert found is None or found > block.numel() * 4
