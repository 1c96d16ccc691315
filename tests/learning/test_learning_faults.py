"""What learning cannot use is told in one line: data that do not fit a head, other tokens, nothing to learn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hfmerge import merge
from hfmerge.errors import HeadError, HfMergeError, RecipeError, SourceError, UnsupportedError
from hfmerge.lifecycle.session import MergeResult
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.recipe.weights import weight_at
from tests.fixtures import evaluating, tiny
from tests.learning.test_replay import TOKENS, wordpieces


pytestmark = pytest.mark.slow
LABELS = {"a": ["red", "green"], "b": ["x", "y", "z"]}
LEARN: dict[str, Any] = {"replay": {"rows": 4, "length": 8, "generator": "unigram"}, "steps": 2, "every": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base whose file has a tensor of whole numbers as older ones have, and two classifiers tuned from it."""
    folder = tmp_path_factory.mktemp("faults")
    base = tiny.build("BertModel", tiny.config("bert"))
    found = {"base": wordpieces(tiny.save(base, folder / "base"))}
    tiny.edit(found["base"], lambda state: state.update({"embeddings.position_ids": torch.arange(16)[None]}))
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        found[name] = wordpieces(
            tiny.save(tiny.with_head("BertForSequenceClassification", base, seed, labels), folder / name)
        )
    return found


def learned(models: dict[str, Path], out: Path, learn: dict[str, Any] | None = None, **more: Any) -> MergeResult:
    data = {
        "base": str(models["base"]), "models": [str(models["a"]), str(models["b"])], "method": "mdm_oc",
        "learn": {**LEARN, **(learn or {})}, **more,
    }  # fmt: skip
    return merge(parse_recipe(data, "test"), output=out)


def suite(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    """A suite of the task of model `a`, and a faultless one of model `b`."""
    evaluating.write_rows(folder / "a.jsonl", rows)
    evaluating.labelled(folder / "b.jsonl", LABELS["b"], 8, 1)
    tasks = [
        {"name": name, "kind": "text-classification", "dataset": f"./{name}.jsonl", "text": "text", "label": "label",
         "head": name, **(changes if name == "a" else {})} for name in "ab"
    ]  # fmt: skip
    return str(evaluating.suite(folder / "suite.yaml", *tasks))


GOOD = [{"text": "w1 w2", "label": name} for name in LABELS["a"] * 3]


@pytest.mark.parametrize(
    ("rows", "changes", "error", "told"),
    [
        (GOOD, {"text": "texts"}, HfMergeError, r'a \(a.jsonl\): no column texts; did you mean "text"\?$'),
        (GOOD, {"label": "answer"}, HfMergeError, r"a \(a.jsonl\): no column answer; it has text, label"),
        (GOOD, {"text": ["text", "other"]}, HfMergeError, r"a \(a.jsonl\): no column other"),
        ([*GOOD, {"text": "w3", "label": "blue"}], {}, HeadError,
         r"no label 'blue' in the head of a, which has red, green; name them as the head does under `labels`"),
        ([{"text": "w1", "label": i} for i in (0, 2)], {"by_index": True}, HfMergeError,
         r"row \d has a label outside of the range \(label is 2; there are 2 labels\)"),
        ([{"text": "w1", "label": i} for i in (0, 1)], {}, HfMergeError, "label holds numbers without names"),
        ([{"text": "w1", "label": None}, *GOOD], {}, HfMergeError, r"row \d has no label"),
        ([{"text": 3, "label": "red"}], {}, HfMergeError, "row 0: text is 3, not text"),
        ([{"text": "w1", "label": 0.5}], {"metric": "pearson"}, UnsupportedError, "labelled rows need classes"),
        (GOOD, {"dataset": "./none.jsonl"}, HfMergeError, "none.jsonl: no such file or folder beside the suite"),
        (GOOD, {"head": "else"}, HfMergeError, "tiny has no task with the head of a; take loss mixed"),
    ],
)  # fmt: skip
def test_labelled_rows_that_do_not_fit(
    rows: list[dict[str, Any]], changes: dict[str, Any], error: type[HfMergeError], told: str,
    models: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    place = suite(tmp_path, rows, **changes)
    with pytest.raises(error, match=told) as caught:
        learned(models, tmp_path / "out", {"loss": "labels", "suite": place, "rows": 8})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_faultless_rows_are_taken(models: dict[str, Path], tmp_path: Path) -> None:
    entry = learned(models, tmp_path / "out", {"loss": "labels", "suite": suite(tmp_path, GOOD), "rows": 8}).entry
    assert entry.learned.steps == 2


def test_models_of_other_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """The rows of a model are token numbers, which mean something else to a merge with the base's tokens."""
    other = tmp_path / "a"
    shutil.copytree(models["a"], other)
    words = [*TOKENS[:6], *reversed(TOKENS[6:])]
    text = (other / "tokenizer.json").read_text()
    for number, token in enumerate(words):
        text = text.replace(f'"{token}": {TOKENS.index(token)},', f'"{token}": {number},')
    assert text != (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text)
    mixed = {**models, "a": other}
    with pytest.raises(RecipeError, match="as many tokens as the base's, but other ones; set `vocabulary: base`"):
        learned(mixed, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="learn: a has other tokens than the base") as caught:
        learned(mixed, tmp_path / "out", vocabulary="base")
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(models["a"], other, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SourceError, match="a: has no tokenizer; put tokenizer.json beside the weights"):
        learned(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [{"exclude": ["*"]}, {"include": ["embeddings.position_ids"]}])
def test_nothing_to_learn(kept: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="models: no model changes any parameter that is merged"):
        learned(models, tmp_path / "out", **kept)


def test_whole_numbers_and_what_is_left_out_have_no_weights(models: dict[str, Path], tmp_path: Path) -> None:
    entry = learned(models, tmp_path / "out", include=["embeddings.*", "encoder.layer.1.*"]).entry
    assert entry.learned.groups == ("embeddings", "encoder.layer.1")
    before, after = tiny.tensors(models["base"]), tiny.tensors(tmp_path / "out")
    assert torch.equal(before["embeddings.position_ids"], after["embeddings.position_ids"])
    same = [key for key in before if torch.equal(before[key], after[key])]
    assert all(key.startswith(("encoder.layer.0.", "pooler.")) or key.endswith("position_ids") for key in same)
    assert any(key.startswith("pooler.") for key in same)


def test_weights_that_no_loss_depends_on(models: dict[str, Path], tmp_path: Path) -> None:
    """A pooler of zeros lets nothing through, so that all below it has no part in what the heads say."""

    def cut(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith("pooler.dense.weight")]:
            state[key] = torch.zeros_like(state[key])

    deaf = {name: Path(shutil.copytree(place, tmp_path / name)) for name, place in models.items()}
    for place in deaf.values():
        tiny.edit(place, cut)
    result = learned(deaf, tmp_path / "out")
    told = "learn: no loss depends on embeddings, encoder.layer.0, encoder.layer.1; the weights there stay where"
    assert [warning for warning in result.warnings if told in warning]
    for model in result.entry.models:
        deep = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(2)]
        weights = {weight_at(model.weight, key) for key in ("embeddings.word_embeddings.weight", *deep)}
        assert weights == {0.7071} != {weight_at(model.weight, "pooler.dense.bias")}
    heard = learned(models, tmp_path / "heard")
    assert not [warning for warning in heard.warnings if "no loss depends" in warning]
