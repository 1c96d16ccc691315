"""Scores equal those of a plain loop; heads, labels, limits, the cache, processes, and every refusal."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import hfmerge
from hfmerge.errors import HeadError, HfMergeError, NotFoundError, SourceError, UnsupportedError
from hfmerge.evaluation import loading, models
from hfmerge.evaluation.batches import length_batches
from hfmerge.evaluation.evaluator import Evaluator, Settings
from hfmerge.evaluation.suite import load_suite
from tests.fixtures import evaluating, launching, tiny


MOODS, TOPICS = ["bad", "so-so", "good"], ["art", "sport", "law", "food"]
FRESH = Settings(cache=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two classifiers tuned from it, an adapter with a head, a merge of all three, data sets, a suite."""
    root = tmp_path_factory.mktemp("evaluate")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 1, MOODS), root / "mood")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 2, TOPICS), root / "topic")
    saved = tiny.with_head("BertForSequenceClassification", base, 3, ["no", "yes"]).classifier.state_dict()
    targets = {f"bert.encoder.layer.{i}.attention.self.query": (16, 16) for i in range(2)}
    tiny.adapter(
        root / "spam", targets, 4, saved={f"classifier.{k}": v for k, v in saved.items()}, task_type="SEQ_CLS",
        modules_to_save=["classifier"], base_model_name_or_path=str(root / "base"),
    )  # fmt: skip
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (root / "spam" / "config.json").write_text(
        json.dumps({"architectures": ["BertForSequenceClassification"], **labels})
    )
    for name in ("base", "mood", "topic"):
        tiny.tokenizer(root / name, evaluating.TOKENS)
    models_ = [root / name for name in ("mood", "topic", "spam")]
    tiny.done("merge", *models_, "--base", root / "base", "--method", "linear", "--output", root / "merged")
    tasks = []
    for seed, (name, names) in enumerate({"mood": MOODS, "topic": TOPICS, "spam": ["no", "yes"]}.items()):
        evaluating.labelled(root / "data" / f"{name}.jsonl", names, 50, seed)
        tasks.append(
            {"name": name, "kind": "text-classification", "dataset": f"./data/{name}.jsonl", "text": "text",
             "label": "label", "head": str(root / name)}
        )  # fmt: skip
    evaluating.suite(root / "suite.yaml", *tasks)
    return root


def rows(world: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "data" / f"{task}.jsonl").read_text().splitlines()]


def alone(world: Path, name: str) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel
    if name == "spam":
        from peft import PeftModel

        config = transformers.AutoConfig.from_pretrained(world / "base", id2label={0: "no", 1: "yes"})
        bare = transformers.AutoModelForSequenceClassification.from_pretrained(world / "base", config=config)
        model = PeftModel.from_pretrained(bare, str(world / "spam"))
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(world / name)
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_score_is_that_of_a_plain_loop(world: Path) -> None:
    names = ["base", "mood", "topic", "spam", "merged"]
    matrix = hfmerge.evaluate([world / name for name in names], world / "suite.yaml", settings=FRESH)
    assert [model.label for model in matrix.models] == names
    assert [model.kind for model in matrix.models] == ["full", "full", "full", "adapter", "merge"]
    for task in ("mood", "topic", "spam"):
        own = evaluating.accuracy(alone(world, task), rows(world, task))
        assert matrix.score(task, task).value == pytest.approx(own)
        put = hfmerge.load_with_head(world / "merged", task)
        assert matrix.score("merged", task).value == pytest.approx(evaluating.accuracy(put, rows(world, task)))
    # another model's encoder under this head, and the base's
    for name in ("topic", "base"):
        model = alone(world, "mood")
        other = transformers.AutoModel.from_pretrained(world / name)
        model.bert.load_state_dict(other.state_dict())
        assert matrix.score(name, "mood").value == pytest.approx(evaluating.accuracy(model, rows(world, "mood")))
    one = matrix.score("mood", "mood")
    assert (one.n, one.metric, one.interval) == (50, "accuracy", "wilson") and one.low < one.value < one.high


@pytest.mark.slow
def test_batches_limits_and_seeds(world: Path) -> None:
    suite = load_suite(world / "suite.yaml").select(["topic"])
    whole = [
        hfmerge.evaluate([world / "topic"], suite, settings=Settings(cache=False, batch_size=size)).scores
        for size in (1, 7, 64)
    ]
    assert whole[0] == whole[1] == whole[2]
    some = [
        hfmerge.evaluate([world / "topic"], suite, settings=Settings(cache=False, limit=9, seed=seed)).scores[0][0]
        for seed in (0, 0, 1, 2)
    ]
    assert some[0] == some[1] and some[0].n == 9 and len({score.value for score in some}) > 1
    batches = length_batches([3, 9, 9, 1, 5], 2)
    assert batches == [[1, 2], [4, 0], [3]]
    assert length_batches([8, 8, 8], 32, budget=16) == [[0, 1], [2]]
    assert length_batches([8], 32, budget=4) == [[0]]


@pytest.mark.slow
def test_scores_are_remembered_until_anything_changes(world: Path, tmp_path: Path) -> None:
    suite = evaluating.suite(
        tmp_path / "suite.yaml",
        {"name": "mood", "kind": "text-classification", "dataset": "./mood.jsonl", "text": "text", "label": "label"},
    )
    evaluating.labelled(tmp_path / "mood.jsonl", MOODS, 20, 7)
    first = hfmerge.evaluate([world / "mood"], suite).scores[0][0]
    again = hfmerge.evaluate([world / "mood"], suite).scores[0][0]
    assert not first.cached and again.cached and again == first
    assert not hfmerge.evaluate([world / "mood"], suite, settings=Settings(seed=1)).scores[0][0].cached
    assert not hfmerge.evaluate([world / "mood"], suite, settings=Settings(limit=5)).scores[0][0].cached
    assert not hfmerge.evaluate([world / "mood"], suite, settings=FRESH).scores[0][0].cached
    evaluating.labelled(tmp_path / "mood.jsonl", MOODS, 21, 7)
    assert not hfmerge.evaluate([world / "mood"], suite).scores[0][0].cached
    copy = tmp_path / "copy"
    tiny.save(tiny.fine_tune(alone(world, "mood"), 9), copy)
    tiny.tokenizer(copy, evaluating.TOKENS)
    assert not hfmerge.evaluate([copy], suite).scores[0][0].cached


@pytest.mark.slow
def test_a_merge_is_read_once_for_all_tasks(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    stored = loading.stored_tensors

    def counted(source: Any) -> Any:
        reads.append(source.snapshot.name)
        return stored(source)

    monkeypatch.setattr(loading, "stored_tensors", counted)
    evaluator = Evaluator(load_suite(world / "suite.yaml"), FRESH)
    scores = evaluator.score(world / "merged")
    assert list(scores) == ["mood", "topic", "spam"] and reads == ["merged"]
    subject = evaluator.open(world / "merged")
    one, two = (subject.with_head(subject.head_of(name), "text-classification") for name in ("mood", "topic"))
    place = "encoder.layer.0.output.dense.weight"
    assert one.bert.get_parameter(place).data_ptr() == two.bert.get_parameter(place).data_ptr()


@pytest.mark.slow
def test_chosen_tasks_and_heads_and_a_model_in_memory(world: Path) -> None:
    evaluator = Evaluator(load_suite(world / "suite.yaml"), FRESH)
    some = evaluator.score(world / "merged", tasks=["spam", "mood"], heads={"mood": str(world / "mood")})
    assert list(some) == ["mood", "spam"]
    model = hfmerge.load_with_head(world / "merged", "mood")
    subject = models.subject_in_memory(model, "loaded", evaluator.open(world / "mood"))
    assert evaluator.score(subject, tasks=["mood"])["mood"] == some["mood"]


@pytest.mark.slow
def test_heads_are_found_by_their_labels(world: Path, tmp_path: Path) -> None:
    def suite(**changes: Any) -> Path:
        task = {"name": "t", "kind": "text-classification", "dataset": str(world / "data" / "topic.jsonl"),
                "text": "text", "label": "label", **changes}  # fmt: skip
        return evaluating.suite(tmp_path / "suite.yaml", task)

    put = hfmerge.load_with_head(world / "merged", "topic")
    found = hfmerge.evaluate([world / "merged"], suite(), settings=FRESH).scores[0][0]
    assert found.value == pytest.approx(evaluating.accuracy(put, rows(world, "topic")))
    with pytest.raises(HeadError, match="base has no head; name a model"):
        hfmerge.evaluate([world / "base"], suite(), settings=FRESH)
    skip = Settings(cache=False, skip_missing=True)
    matrix = hfmerge.evaluate([world / "topic", world / "merged"], suite(), settings=skip)
    assert matrix.notes == ()
    with pytest.raises(HeadError, match="has a head for no task"):
        hfmerge.evaluate([world / "topic", world / "base"], suite(), settings=skip)
    with pytest.raises(HeadError, match="no label 'art' in the head of mood"):
        hfmerge.evaluate([world / "mood"], suite(), settings=FRESH)
    with pytest.raises(HeadError, match="has no classification head; name a model that has one"):
        hfmerge.evaluate([world / "mood"], suite(head=str(world / "base")), settings=FRESH)
    two = evaluating.suite(
        tmp_path / "two.yaml",
        *({"name": name, "kind": "text-classification", "dataset": str(world / "data" / f"{name}.jsonl"),
           "text": "text", "label": "label"} for name in ("mood", "topic")),
    )  # fmt: skip
    matrix = hfmerge.evaluate([world / "mood", world / "merged"], two, settings=skip)
    assert matrix.score("mood", "topic") is None and matrix.score("merged", "topic") is not None
    assert len(matrix.notes) == 1 and "| - |" in matrix.to_markdown()


@pytest.mark.slow
def test_labels_meet_by_name_whatever_their_order(world: Path, tmp_path: Path) -> None:
    names = ["Food", "LAW", "sport", "art"]
    numbers = [{"text": row["text"], "label": [n.lower() for n in names].index(row["label"])}
               for row in rows(world, "topic")]  # fmt: skip
    evaluating.write_rows(tmp_path / "numbers.jsonl", numbers)
    task = {"name": "t", "kind": "text-classification", "dataset": "./numbers.jsonl", "text": "text", "label": "label"}
    wanted = evaluating.accuracy(alone(world, "topic"), rows(world, "topic"))
    named = evaluating.suite(tmp_path / "named.yaml", {**task, "labels": names})
    assert hfmerge.evaluate([world / "topic"], named, settings=FRESH).scores[0][0].value == pytest.approx(wanted)
    swapped = {str(i): name for i, name in reversed(list(enumerate(names)))}
    named = evaluating.suite(tmp_path / "named.yaml", {**task, "labels": swapped})
    assert hfmerge.evaluate([world / "topic"], named, settings=FRESH).scores[0][0].value == pytest.approx(wanted)
    # by number, the head's order counts
    by_index = evaluating.suite(tmp_path / "index.yaml", {**task, "by_index": True})
    model = alone(world, "topic")
    texts = [{"text": row["text"], "label": model.config.id2label[row["label"]]} for row in numbers]
    found = hfmerge.evaluate([world / "topic"], by_index, settings=FRESH).scores[0][0]
    assert found.value == pytest.approx(evaluating.accuracy(model, texts))
    with pytest.raises(HfMergeError, match="numbers without names"):
        hfmerge.evaluate([world / "topic"], evaluating.suite(tmp_path / "bare.yaml", task), settings=FRESH)
    short = evaluating.suite(tmp_path / "short.yaml", {**task, "labels": names[:3]})
    with pytest.raises(HfMergeError, match="which `labels` does not list"):
        hfmerge.evaluate([world / "topic"], short, settings=FRESH)
    model.config.id2label, model.config.label2id = {}, {}
    tiny.save(model, tmp_path / "unnamed")
    tiny.edit_config(tmp_path / "unnamed", id2label={str(i): f"LABEL_{i}" for i in range(4)})
    tiny.tokenizer(tmp_path / "unnamed", evaluating.TOKENS)
    with pytest.raises(HeadError, match="by_index: true"):
        hfmerge.evaluate([tmp_path / "unnamed"], named, settings=FRESH)


BAD: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None, type[HfMergeError], str]] = {
    "column": ({"text": "txet"}, None, HfMergeError, 'no column txet; did you mean "text"'),
    "label column": ({"label": "answer"}, None, HfMergeError, "no column answer; it has text, label"),
    "no label": ({}, [{"text": "w1", "label": None}], HfMergeError, "row 0 has no label"),
    "hidden": ({"labels": ["a", "b"]}, [{"text": "w1", "label": -1}], HfMergeError, "use a split with answers"),
    "out of range": ({"by_index": True}, [{"text": "w1", "label": 3}], HfMergeError, "outside of the range"),
    "no text": ({}, [{"text": None, "label": "bad"}], HfMergeError, "row 0: text is None"),
    "empty": ({}, [], HfMergeError, "no rows|not loaded"),
    "missing file": ({"dataset": "./none.jsonl"}, None, NotFoundError, "no such file or folder"),
    "file kind": ({"dataset": "./rows.xyz"}, None, UnsupportedError, "or a folder"),
    "numbers": ({"metric": "pearson"}, None, HfMergeError, "one number|needs numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str, world: Path, tmp_path: Path) -> None:
    changes, given, kind, text = BAD[case]
    data = [{"text": "w1 w2", "label": "bad"}, {"text": "w3", "label": "good"}] if given is None else given
    evaluating.write_rows(tmp_path / "rows.jsonl", data)
    (tmp_path / "rows.xyz").write_text("x")
    task = {"name": "t", "kind": "text-classification", "dataset": "./rows.jsonl", "text": "text", "label": "label"}
    suite = evaluating.suite(tmp_path / "suite.yaml", {**task, **changes})
    with pytest.raises(kind, match=text) as caught:
        hfmerge.evaluate([world / "mood"], suite, settings=FRESH)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_scored(world: Path, tmp_path: Path) -> None:
    suite = world / "suite.yaml"
    with pytest.raises(HfMergeError, match="no model"):
        hfmerge.evaluate([], suite)
    with pytest.raises(HfMergeError, match="given twice"):
        hfmerge.evaluate([world / "mood", world / "mood"], suite, settings=FRESH)
    tiny.save(alone(world, "mood"), tmp_path / "mute")
    with pytest.raises(SourceError, match="no tokenizer"):
        hfmerge.evaluate([tmp_path / "mute"], suite, tasks=["mood"], heads={"mood": str(tmp_path / "mute")})
    tiny.save(tiny.build("BertForSequenceClassification", tiny.config("bert", hidden_size=32)), tmp_path / "wide")
    tiny.tokenizer(tmp_path / "wide", evaluating.TOKENS)
    with pytest.raises(SourceError, match="does not fit"):
        hfmerge.evaluate([tmp_path / "wide"], suite, tasks=["mood"], settings=FRESH)
    with pytest.raises(HfMergeError, match="no task moood"):
        hfmerge.evaluate([world / "mood"], suite, heads={"moood": str(world / "mood")})


@pytest.mark.slow
def test_the_command_line(world: Path, tmp_path: Path) -> None:
    run = tiny.done(
        "evaluate", world / "mood", world / "merged", "--suite", world / "suite.yaml", "--task", "mood", "--limit", 10,
        "--output", tmp_path / "out" / "scores", "--quiet",
    )  # fmt: skip
    assert "| mood |" in run.out and "| merged |" in run.out and "row" not in run.err
    saved = hfmerge.evaluation.results.load_results(tmp_path / "out" / "scores.json")
    assert saved.scores[0][0].n == 10 and (tmp_path / "out" / "scores.csv").is_file()
    data = tiny.done("evaluate", world / "mood", "--suite", world / "suite.yaml", "--task", "mood", "--json").json
    assert data["schema"] == 1 and data["scores"][0][0]["n"] == 50
    head = f"mood={world / 'mood'}"
    tiny.done("evaluate", world / "base", "--suite", world / "suite.yaml", "--task", "mood", "--head", head, "-q")
    for wrong in (["--head", "mood"], ["--limit", 0], ["--create-pr"], ["--batch-size", 0], ["--dtype", "int3"],
                  ["--device", "abacus"]):  # fmt: skip
        assert tiny.cli("evaluate", world / "mood", "--suite", world / "suite.yaml", *wrong).code == 1
    assert "quickstart" in tiny.done("suites").out and "glue" in tiny.done("suites", "--json").json


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(world: Path, tmp_path: Path) -> None:
    arguments = [
        "-m",
        "hfmerge",
        "evaluate",
        str(world / "merged"),
        "--suite",
        str(world / "suite.yaml"),
        "--no-cache",
    ]
    arguments += ["--batch-size", "4", "--output"]
    output = launching.succeed(launching.crew(2, *arguments, str(tmp_path / "two")))
    assert output.count("| merged |") == 1
    settings = Settings(cache=False, batch_size=4)
    here = hfmerge.evaluate([world / "merged"], world / "suite.yaml", settings=settings)
    there = hfmerge.evaluation.results.load_results(tmp_path / "two.json")
    assert there.scores == here.scores and there.models == here.models


def test_the_quickstart_suite_fits_its_adapters() -> None:
    suite = load_suite("quickstart")
    for task, own in itertools.product(suite.tasks, [Path("recipes/quickstart/adapters")]):
        config = json.loads((Path(__file__).parents[2] / own / task.name / "config.json").read_text())
        data = (suite.folder / task.dataset).resolve().read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["label"] for line in data} <= set(config["id2label"].values())
