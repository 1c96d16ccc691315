"""Weights are learned for every kind of model, end to end: the merge comes nearer to its models, and known weights are
found again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hfmerge import merge
from hfmerge.errors import HeadError, UnsupportedError
from hfmerge.evaluation.models import open_subject
from hfmerge.evaluation.suite import load_suite
from hfmerge.learning.labelled import labelled_rows
from hfmerge.learning.replay.dataset import Replay
from hfmerge.learning.replay.generate import generate
from hfmerge.learning.replay.targets import divergence
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.recipe.replay import ReplaySettings
from hfmerge.recipe.weights import PatternWeights
from tests.fixtures import evaluating, tiny
from tests.learning.test_replay import PROCESSOR, TOKENS, wordpieces


pytestmark = pytest.mark.slow
LABELS = {"one": ["red", "green", "blue"], "two": ["x", "y", "z"], "twin": ["yes", "no"]}
ROWS = {"rows": 32, "length": 10, "steps": 4, "held_out": 0.25}
LEARN = {"replay": ROWS, "steps": 24, "rate": 0.05, "batch": 24, "every": 4, "groups": "model"}
EVEN = 0.5**0.5
"""Where weights of two models start."""


@dataclass(frozen=True)
class Kind:
    """Models of one kind.

    Attributes:
        base: class of the base, and of the models too where `tuned` is None.
        config: name of the tiny configuration.
        finish: adds tokenizer or image processor.
        tuned: class of models with heads of their own.
        changes: to the configuration.
    """

    base: str
    config: str
    finish: Callable[[Path], Path]
    tuned: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()


def processor(folder: Path) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def spoken(folder: Path) -> Path:
    return tiny.tokenizer(folder, ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))])


def words(folder: Path) -> Path:
    return tiny.tokenizer(folder, evaluating.TOKENS)


TIED = (("tie_word_embeddings", True),)
KINDS = {
    "images": Kind("ViTModel", "vit", processor, "ViTForImageClassification"),
    "clip": Kind("CLIPModel", "clip", processor, "CLIPForImageClassification"),
    "causal": Kind("LlamaForCausalLM", "llama", spoken),
    "causal tied": Kind("LlamaForCausalLM", "llama", spoken, changes=TIED),
    "gpt2": Kind("GPT2LMHeadModel", "gpt2", spoken),
    "masked": Kind("BertForMaskedLM", "bert", wordpieces),
    "decoder that classifies": Kind("LlamaModel", "llama", words, "LlamaForSequenceClassification"),
}


def build(kind: Kind, folder: Path) -> dict[str, Path]:
    """A base; `one` and `two`, fine-tunes of it; `twin`, of nearly the weights of `one` but with a head of its own."""
    base = tiny.build(kind.base, tiny.config(kind.config, **dict(kind.changes)))
    found = {"base": kind.finish(tiny.save(base, folder / "base"))}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        if kind.tuned is None:
            model = copy.deepcopy(base)
        else:
            model = tiny.with_head(kind.tuned, base, seed, labels)
            mine = model.base_model.state_dict()
            held = {key: value for key, value in base.state_dict().items() if key in mine}
            model.base_model.load_state_dict({**mine, **held})
        tiny.disturb(model.base_model, 2 if name == "two" else 1, 0.1)
        if name == "twin":
            tiny.disturb(model.base_model, 3, 0.001)
        found[name] = kind.finish(tiny.save(model, folder / name))
    return found


@pytest.fixture(scope="module", params=list(KINDS))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(KINDS[request.param], tmp_path_factory.mktemp("kind"))


def merged(models: dict[str, Path], second: str, out: Path, learn: dict[str, Any] | None = LEARN) -> Any:
    """`one` and a second model merged: with learned weights, or with those that learning starts from."""
    weight = {} if learn is not None else {"weight": EVEN}
    data = {
        "base": str(models["base"]), "models": [{"model": str(models[n]), **weight} for n in ("one", second)],
        "method": {"name": "mdm_oc"}, **({} if learn is None else {"learn": learn}),
    }  # fmt: skip
    return merge(parse_recipe(data, "test"), output=out).entry


def fresh(place: Path) -> Replay:
    """Rows of a model that no merge has learned from."""
    subject = open_subject(str(place), dtype="float32")
    head = subject.own_head()
    kind = "image-classification" if (place / "preprocessor_config.json").exists() else "text-classification"
    if head is None:
        kind = "masked" if "MaskedLM" in subject.config["architectures"][0] else "causal"
    return generate(subject, kind, ReplaySettings(**{**ROWS, "seed": 77}))


def apart(folder: Path, place: Path, rows: Replay) -> float:
    """Mean divergence of a merge, with a model's own head, from what that model says of rows."""
    subject = open_subject(str(folder), dtype="float32")
    if rows.scores == "tokens":
        model = subject.whole(rows.kind)
    else:
        model = subject.with_head(subject.head_of(place.name), rows.kind, open_subject(str(place), dtype="float32"))
    if rows.pad is not None:
        model.config.pad_token_id = rows.pad
    inputs, targets = rows.batch(range(len(rows)))
    with torch.inference_mode():
        return float(divergence(rows.scores, targets, model(**inputs).logits).mean())


def test_the_weight_that_is_best_is_found(models: dict[str, Path], tmp_path: Path) -> None:
    """Both models are the base with the same change, so that the merge is both where it has that change once."""
    entry = merged(models, "twin", tmp_path / "learned")
    assert entry.models[0].weight == pytest.approx(1.0, abs=0.05)
    held = [point[2] for point in entry.learned.curve]
    assert min(held) < 0.1 * held[0] and held[0] > 1e-3
    merged(models, "twin", tmp_path / "even", None)
    for name in ("one", "twin"):
        rows = fresh(models[name])
        assert apart(tmp_path / "learned", models[name], rows) < 0.1 * apart(tmp_path / "even", models[name], rows)


@pytest.mark.parametrize("models", ["images", "causal", "gpt2", "masked"], indirect=True)
def test_the_merge_comes_nearer_to_models_that_differ(models: dict[str, Path], tmp_path: Path) -> None:
    entry = merged(models, "two", tmp_path / "learned")
    held = [point[2] for point in entry.learned.curve]
    assert min(held) < 0.95 * held[0]
    merged(models, "two", tmp_path / "even", None)
    both = [(models[name], fresh(models[name])) for name in ("one", "two")]
    learned, even = (sum(apart(tmp_path / out, *of) for of in both) for out in ("learned", "even"))
    assert learned < 0.97 * even


def test_models_of_several_kinds_share_what_they_have(tmp_path: Path) -> None:
    """A classifier has no part of the language model's head, which that model's weight alone is learned for."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    models = {"base": spoken(tiny.save(base, tmp_path / "base"))}
    models["two"] = spoken(tiny.save(tiny.fine_tune(base, 2, 0.1), tmp_path / "two"))
    classifier = tiny.with_head("LlamaForSequenceClassification", base.base_model, 1, LABELS["one"])
    models["one"] = spoken(tiny.save(classifier, tmp_path / "one"))
    entry = merged(models, "two", tmp_path / "out", {**LEARN, "groups": "layer", "steps": 12})
    held = [point[2] for point in entry.learned.curve]
    assert min(held) < held[0]
    first, second = (model.weight for model in entry.models)
    assert isinstance(first, PatternWeights) and isinstance(second, PatternWeights)
    # nothing that the first model does depends on the last layer of the second
    assert dict(first.pairs)["lm_head.*"] == pytest.approx(EVEN, abs=1e-4) != dict(second.pairs)["lm_head.*"]


def paired(folder: Path) -> Path:
    """A tokenizer as BERT's, of pairs of texts too: [CLS] text [SEP] text [SEP]."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(wordpieces(folder), model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(folder)
    return folder


PAIRS = Kind("BertModel", "bert", paired, "BertForSequenceClassification", (("max_position_embeddings", 32),))


def answered(place: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of texts with the labels that a model gives them."""
    texts = evaluating.sentences(2 * count, seed)
    subject = open_subject(str(place), dtype="float32")
    head = subject.own_head()
    assert head is not None
    model = subject.with_head(head, "text-classification")
    rows = []
    for one, other in zip(texts[::2], texts[1::2], strict=True):
        ids, types = numbers(one, other)
        with torch.inference_mode():
            row = int(model(input_ids=ids, token_type_ids=types).logits.argmax())
        rows.append({"premise": one, "hypothesis": other, "label": head.labels[row]})
    return rows


def numbers(one: str, other: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a pair and which text each is of, without any tokenizer."""
    first, second = ([TOKENS.index(word) if word in TOKENS else 0 for word in text.split()] for text in (one, other))
    return torch.tensor([[2, *first, 3, *second, 3]]), torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of pairs whose answers depend on the texts, and a suite of a few answers of each."""
    folder = tmp_path_factory.mktemp("pairs")
    models = build(PAIRS, folder)
    tasks = []
    for seed, name in enumerate(LABELS):
        tiny.edit(models[name], lambda state: state["classifier.weight"].mul_(12))
        evaluating.write_rows(folder / f"{name}.jsonl", answered(models[name], 32, seed))
        tasks.append(
            {"name": name, "kind": "text-classification", "dataset": f"./{name}.jsonl",
             "text": ["premise", "hypothesis"], "label": "label", "head": name}
        )  # fmt: skip
    return {**models, "suite": evaluating.suite(folder / "suite.yaml", *tasks)}


def cross_entropy(folder: Path, place: Path, rows: list[dict[str, str]]) -> float:
    """Of a merge with a model's own head, row by row."""
    subject = open_subject(str(folder), dtype="float32")
    head = subject.head_of(place.name)
    model = subject.with_head(head, "text-classification", open_subject(str(place), dtype="float32"))
    total = 0.0
    for row in rows:
        ids, types = numbers(row["premise"], row["hypothesis"])
        with torch.inference_mode():
            scores = model(input_ids=ids, token_type_ids=types).logits.log_softmax(-1)
        total -= float(scores[0, head.labels.index(row["label"])])
    return total / len(rows)


def test_labelled_pairs_say_which_text_a_token_is_of(pairs: dict[str, Path]) -> None:
    suite, subject = load_suite(pairs["suite"]), open_subject(str(pairs["one"]), dtype="float32")
    rows = labelled_rows(suite.tasks[0], suite, subject, split="train", rows=32, seed=0)
    head = subject.own_head()
    assert head is not None and len(rows) == 32 and rows.held_out == 0
    model = subject.with_head(head, "text-classification")
    known = {tuple(numbers(row["premise"], row["hypothesis"])[0][0].tolist()): row
             for row in answered(pairs["one"], 32, 0)}  # fmt: skip
    inputs, targets = rows.batch(range(32))
    logits = model(**inputs).logits
    for i in range(32):
        length = int(inputs["attention_mask"][i].sum())
        row = known[tuple(inputs["input_ids"][i, :length].tolist())]
        assert (
            inputs["token_type_ids"][i, :length].tolist() == numbers(row["premise"], row["hypothesis"])[1][0].tolist()
        )
        wanted = -logits.log_softmax(-1)[i, head.labels.index(row["label"])]
        torch.testing.assert_close(divergence("classes", targets, logits)[i], wanted)
    blind = model(**{name: value for name, value in inputs.items() if name != "token_type_ids"}).logits
    assert (blind - logits).abs().max() > 0.1


def test_a_few_labelled_pairs_bring_the_merge_nearer(pairs: dict[str, Path], tmp_path: Path) -> None:
    learn = {**LEARN, "loss": "labels", "suite": str(pairs["suite"]), "rows": 32, "batch": 32}
    entry = merged(pairs, "two", tmp_path / "learned", learn)
    losses = [point[1] for point in entry.learned.curve[1:]]
    assert min(losses) < 0.95 * losses[0]
    merged(pairs, "two", tmp_path / "even", None)
    both = [(pairs[name], answered(pairs[name], 40, 50)) for name in ("one", "two")]
    learned, even = (sum(cross_entropy(tmp_path / out, *of) for of in both) for out in ("learned", "even"))
    assert learned < 0.97 * even


def test_replay_of_a_model_of_pairs_is_single_texts(pairs: dict[str, Path], tmp_path: Path) -> None:
    learn = {**LEARN, "loss": "mixed", "suite": str(pairs["suite"]), "rows": 8, "steps": 4}
    entry = merged(pairs, "twin", tmp_path / "out", learn)
    assert all(entry.learned.replay)
    rows = fresh(pairs["one"])
    ids = rows.inputs["input_ids"]
    assert "token_type_ids" not in rows.inputs and ((ids == TOKENS.index("[SEP]")).sum(1) == 1).all()


def test_models_without_a_head_and_experts_are_refused_in_one_line(tmp_path: Path) -> None:
    bare = Kind("CLIPVisionModel", "clip_vision", processor)
    with pytest.raises(HeadError, match="one: CLIPVisionModel has no head.*saved with its head"):
        merged(build(bare, tmp_path / "bare"), "two", tmp_path / "out")
    experts = build(Kind("MixtralForCausalLM", "mixtral", spoken), tmp_path / "experts")
    with pytest.raises(UnsupportedError, match="learn: MixtralForCausalLM stores .*experts.* `exclude`"):
        merged(experts, "two", tmp_path / "out", {**LEARN, "steps": 1})
    assert not (tmp_path / "out").exists()
