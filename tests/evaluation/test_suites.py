"""Suites are read strictly, all problems at once; the ready ones are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hfmerge.errors import HfMergeError, RecipeError
from hfmerge.evaluation.metrics import METRICS, scored, wilson
from hfmerge.evaluation.results import Matrix, ModelInfo, Score, TaskInfo, load_results
from hfmerge.evaluation.suite import KINDS, load_suite, parse_suite, ready_suites
from hfmerge.experiments.continual.report import to_markdown


TASK = {"name": "a", "kind": "text-classification", "dataset": "org/data@abc", "text": "text", "label": "label"}


def test_ready_suites_are_whole() -> None:
    suites = {name: load_suite(name) for name in ready_suites()}
    assert set(suites) >= {"glue", "clip-8", "clip-14", "clip-20", "text-encoders", "quickstart"}
    assert [len(suites[f"clip-{count}"].tasks) for count in (8, 14, 20)] == [8, 14, 20]
    assert suites["clip-20"].tasks[:14] == suites["clip-14"].tasks
    for name, suite in suites.items():
        assert suite.name == name and suite.description
        first = ready_suites()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# hfmerge evaluate MODEL") and f"--suite {name}" in first
    assert all(len(task.classes or ()) == len(set(task.classes or ())) for task in suites["clip-20"].tasks)
    assert all("@" in task.dataset for task in suites["glue"].tasks)


def test_all_problems_come_at_once() -> None:
    tasks = [
        {**TASK, "lable": "x", "limit": 0},
        {**TASK, "kind": "text-clasification"},
        {**TASK, "name": "b", "metric": "acuracy", "text": ["a", "b", "c"]},
        {**TASK, "name": "c", "stream": True, "by_index": True, "labels": ["x", "y"]},
        {"name": "d", "kind": "multiple-choice", "dataset": "org/data"},
        {**TASK, "name": "e", "metric": "pearson", "labels": ["x", "y"]},
        {**TASK, "name": "f", "kind": "zero-shot-image-classification", "image": "image", "templates": ["a photo"]},
        "of another suite",
    ]
    with pytest.raises(RecipeError) as caught:
        parse_suite({"name": "s", "task": [], "tasks": tasks}, "suite.yaml")
    told = {problem.path: problem.text for problem in caught.value.problems}
    assert told["task"] == 'unknown key; did you mean "tasks"?'
    assert told["tasks[0].lable"] == 'unknown key of text-classification; did you mean "label"?'
    assert "at least 1" in told["tasks[0].limit"]
    assert 'did you mean "text-classification"' in told["tasks[1].kind"]
    assert 'did you mean "accuracy"' in told["tasks[2].metric"] and "pair" in told["tasks[2].text"]
    assert "limit" in told["tasks[3].stream"] and "by_index" in str(list(told))
    assert [f"tasks[4].{key}" in told for key in ("prompt", "choices", "label")] == [True] * 3
    assert "no label names" in told["tasks[5].metric"]
    assert "once" in told["tasks[6].templates"] and "unknown key" in told["tasks[6].text"]
    assert "is not a task" in told["tasks[7]"]
    with pytest.raises(RecipeError, match="is tasks\\[0\\] again"):
        parse_suite({"name": "s", "tasks": [TASK, TASK]}, "suite.yaml")


@pytest.mark.parametrize("data", [None, [], {"name": "s"}, {"name": "s", "tasks": []}, {"name": "s", "tasks": [3]}])
def test_what_is_no_suite(data: object) -> None:
    with pytest.raises(RecipeError):
        parse_suite(data, "suite.yaml")


def test_a_suite_by_name_by_file_and_by_another(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='did you mean "glue"'):
        load_suite("gleu")
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntasks:\n  - {name: t, kind: perplexity, dataset: org/d, text: text}\n")
    (tmp_path / "less.yaml").write_text("name: less\nextends: mine.yaml\ntasks: [t]\n")
    assert load_suite(tmp_path / "less.yaml").tasks == load_suite(path).tasks
    (tmp_path / "self.yaml").write_text("name: s\nextends: self.yaml\ntasks: [t]\n")
    with pytest.raises(RecipeError, match="itself"):
        load_suite(tmp_path / "self.yaml")
    with pytest.raises(HfMergeError, match='did you mean "sst2"'):
        load_suite("glue").select(["sst"])
    assert [task.name for task in load_suite("glue").select(["rte", "cola"]).tasks] == ["cola", "rte"]


def test_a_digest_is_of_what_is_asked_and_of_no_path(tmp_path: Path) -> None:
    one = parse_suite({"name": "s", "tasks": [TASK]}, "a.yaml", folder=tmp_path)
    assert one.digest == parse_suite({"name": "t", "tasks": [TASK]}, "b.yaml").digest
    assert one.digest != parse_suite({"name": "s", "tasks": [{**TASK, "limit": 5}]}, "a.yaml").digest
    assert all(set(kind.metrics) <= set(METRICS) or not kind.metrics or kind.metric == "main_score"
               for kind in KINDS.values())  # fmt: skip


@pytest.mark.slow
def test_metrics_against_scikit_learn_and_known_intervals() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    got, true = [0, 1, 1, 0, 1, 2, 1, 0], [0, 1, 0, 0, 1, 1, 1, 1]
    assert scored("accuracy", got, true, seed=0).value == 5 / 8
    binary = [min(g, 1) for g in got]
    assert scored("f1", binary, true, seed=0).value == f1_score(true, binary)
    # a prediction of no class of the data counts as wrong, and not as an error
    assert scored("f1", [-1 if g == 2 else g for g in got], true, seed=0).value == pytest.approx(6 / 9)
    assert scored("matthews", binary, true, seed=0).value == matthews_corrcoef(true, binary)
    numbers, targets = [0.1, 0.4, 0.3, 0.9, 0.5], [1.0, 2.0, 2.5, 5.0, 3.0]
    assert scored("pearson", numbers, targets, seed=0).value == pytest.approx(pearsonr(numbers, targets)[0])
    assert scored("spearman", numbers, targets, seed=0).value == pytest.approx(spearmanr(numbers, targets)[0])
    # Wilson's interval of 8 of 10, as tables give it
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 5)[1] == 1.0 and wilson(0.0, 5)[0] == 0.0
    one = scored("macro_f1", got, true, seed=3)
    assert one == scored("macro_f1", got, true, seed=3) and one.low <= one.value <= one.high
    # what the intervals are drawn with gives the same value for the rows themselves
    pairs, often = np.unique(np.stack([got, true]), axis=1, return_counts=True)
    for name in ("f1", "macro_f1", "matthews"):
        redrawn = METRICS[name].redrawn
        assert redrawn is not None
        assert redrawn(pairs[0], pairs[1], often[None])[0] == pytest.approx(scored(name, got, true, seed=0).value)
    constant = scored("matthews", [1, 1, 1], [1, 1, 1], seed=0)
    assert (constant.value, constant.low, constant.high) == (0.0, 0.0, 0.0)
    assert scored("perplexity", [2.0, 4.0], [1, 2], seed=0).value == pytest.approx(7.389056)
    with pytest.raises(HfMergeError, match="no rows"):
        scored("accuracy", [], [], seed=0)


def test_a_matrix_as_json_markdown_and_csv() -> None:
    models = (ModelInfo("org/a", "full", "c" * 40, "d1"), ModelInfo("m", "merge", None, "d2"))
    tasks = tuple(TaskInfo(n, "text-classification", "accuracy", "org/d", None, "test", "e" * 40, "x") for n in "pq")
    score = Score(0.5, 10, 0.2366, 0.7634, "accuracy", "wilson", seconds=1.0)
    bare = Score(0.25, 4, float("nan"), float("nan"), "accuracy", "none")
    matrix = Matrix("s", "digest", models, tasks, ((score, bare), (None, score)), {"seed": 0}, ("no head",))
    again = Matrix.from_dict(matrix.to_dict())
    assert again.models == models and again.tasks == tasks and again.score("org/a", "p") == score
    assert again.to_json() == matrix.to_json() and "NaN" not in matrix.to_json()
    assert matrix.mean("org/a") == 0.375 and matrix.mean("m") is None
    assert matrix.to_markdown().splitlines()[2] == "| org/a | 0.500 [0.237, 0.763] | 0.250 | 0.375 |"
    assert matrix.to_markdown(by_task=True, intervals=False).splitlines()[3] == "| q | 0.250 | 0.500 |"
    assert len(matrix.to_csv().splitlines()) == 5 and "0.5,0.2366" in matrix.to_csv()
    with pytest.raises(HfMergeError, match="schema 2"):
        Matrix.from_dict({**matrix.to_dict(), "schema": 2})
    with pytest.raises(HfMergeError, match="not in these results"):
        matrix.score("m", "r")


@pytest.mark.parametrize("name", ["text-encoders", "text-encoders-adapters", "quickstart"])
def test_the_tables_in_the_readme_are_those_that_were_measured(name: str) -> None:
    folder = Path(__file__).resolve().parents[2] / "evaluation"
    summary = (folder / "results" / f"{name}-summary.md").read_text(encoding="utf-8")
    assert summary in (folder / "README.md").read_text(encoding="utf-8")
    matrix = load_results(folder / "results" / f"{name}.json")
    assert (folder / "results" / f"{name}.md").read_text(encoding="utf-8") == matrix.to_markdown()
    summary_rows = {line.split(" | ")[0].strip("| "): line for line in summary.splitlines()}
    columns = [cell.strip() for cell in summary.splitlines()[0].strip("|").split("|")]
    for method in ("task-arithmetic", "gram", "iso_c", "opcm"):
        (merged,) = (m.label for m in matrix.models if re.fullmatch(rf".*/merged-{method}(-lora)?", m.label))
        for task in matrix.tasks:
            score = matrix.score(merged, task.name)
            assert score is not None
            cells = [cell.strip() for cell in summary_rows[f"{task.name} ({score.n} rows)"].strip("|").split("|")]
            assert cells[columns.index(method)] == f"{score.value:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("orders", (1, 5, 7, 9)),
        ("eight", (1, 3, 5)),
        ("alpha", (1,)),
        ("quickstart", (1,)),
        ("mdm_oc_subspace", (1, 3)),
        ("mdm_oc_iso", (1, 3)),
    ],
)
def test_the_continual_tables_in_the_readme_are_those_that_were_measured(name: str, parts: Sequence[int]) -> None:
    folder = Path(__file__).resolve().parents[2] / "evaluation"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    text = to_markdown(json.loads((folder / "results" / name / "continual.json").read_text(encoding="utf-8")))
    assert text == (folder / "results" / name / "continual.md").read_text(encoding="utf-8")
    assert all(text.rstrip().split("\n\n")[i] in readme for i in parts)
    for picture in re.findall(r"\]\((results/\S+\.png)\)", readme):
        assert (folder / picture).is_file() and (folder / picture).with_suffix(".svg").is_file()


def test_what_training_gives_is_in_the_readme_as_it_was_measured() -> None:
    folder = Path(__file__).resolve().parents[2] / "evaluation"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    summary = (folder / "results" / "text-encoders-summary.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in summary if line.startswith("| ag_news "))
    scores = []
    for name in ("baselines", "baselines-all"):
        assert (folder / "results" / name / "baselines.md").read_text(encoding="utf-8") in readme
        data = json.loads((folder / "results" / name / "baselines.json").read_text(encoding="utf-8"))
        scores += [*(run["final"]["0"] for run in data["sequential"][:1]), data["multi_task"]["0"]]
    assert row.endswith("".join(f" {score:.3f} |" for score in scores)) and len(scores) == 3
