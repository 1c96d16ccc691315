"""Task heads: kept per source with their labels, never averaged, put back on the backbone by `load_with_head`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

import hfmerge
from hfmerge.errors import NotFoundError
from tests.fixtures import tiny


SENTIMENT = ["negative", "neutral", "positive"]
TOPIC = ["sport", "politics", "art", "science", "other"]
QUERY = {f"bert.encoder.layer.{i}.attention.self.query": (16, 16) for i in range(2)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, three fine-tunes with heads of their own, and the encoder with a head."""
    root = tmp_path_factory.mktemp("bert")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    sequence = "BertForSequenceClassification"
    tiny.save(tiny.with_head(sequence, base, 1, SENTIMENT), root / "sentiment")
    tiny.save(tiny.with_head(sequence, base, 2, TOPIC), root / "topic")
    tiny.save(tiny.with_head("BertForTokenClassification", base, 3, ["O", "NAME"]), root / "names")
    tiny.save(tiny.with_head("BertForQuestionAnswering", base, 4, ["start", "end"]), root / "answers")
    headed = tiny.with_head(sequence, base, 5, ["A", "B", "C"])
    tiny.save(headed, root / "headed")
    tiny.save(tiny.fine_tune(headed, 6), root / "same-labels")
    return root


def merge(root: Path, out: Path, *models: str, base: str = "base", method: str = "linear") -> Path:
    folders = [root / model for model in models]
    tiny.done("merge", *folders, "--base", root / base, "--method", method, "--output", out)
    return out


def entry(out: Path) -> dict[str, Any]:
    latest = sorted((out / "merge_history").glob("*.json"))[-1]
    data: dict[str, Any] = json.loads(latest.read_text())
    return data


def expected(title: str, backbone: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """The source's model with its backbone's values replaced by those of another."""
    model = getattr(transformers, title)(source.config)
    mine = model.base_model.state_dict()
    held = {name: value for name, value in backbone.base_model.state_dict().items() if name in mine}
    model.load_state_dict(source.state_dict())
    model.base_model.load_state_dict({**mine, **held})
    result: PreTrainedModel = model.eval()
    return result


def assert_same_output(mine: PreTrainedModel, theirs: PreTrainedModel, **inputs: torch.Tensor) -> None:
    with torch.no_grad():
        first, second = mine(**inputs), theirs(**inputs)
    names = [name for name, value in second.items() if isinstance(value, torch.Tensor)]
    assert names
    for name in names:
        assert torch.equal(first[name], second[name])


WORDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 7, 40, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "opcm"])
def test_every_source_keeps_its_own_head_on_the_merged_backbone(bert: Path, tmp_path: Path, method: str) -> None:
    out = merge(bert, tmp_path / "out", "sentiment", "topic", "names", "answers", method=method)
    backbone = transformers.BertModel.from_pretrained(out)
    titles = {
        "sentiment": "BertForSequenceClassification",
        "topic": "BertForSequenceClassification",
        "names": "BertForTokenClassification",
        "answers": "BertForQuestionAnswering",
    }
    assert sorted(path.name for path in (out / "heads").iterdir()) == sorted(titles)
    for name, title in titles.items():
        source = getattr(transformers, title).from_pretrained(bert / name)
        model = hfmerge.load_with_head(out, name)
        assert type(model).__name__ == title and not model.training
        assert model.config.id2label == source.config.id2label
        assert model.config.label2id == source.config.label2id
        assert_same_output(model, expected(title, backbone, source), input_ids=WORDS)
        assert not torch.equal(model(input_ids=WORDS)[0], source(input_ids=WORDS)[0])
    materials = {m["name"]: (m["head"], m["labels"]) for m in entry(out)["materials"]["models"]}
    assert materials["topic"] == ("heads/topic", TOPIC) and materials["sentiment"] == ("heads/sentiment", SENTIMENT)
    card = (out / "README.md").read_text()
    assert "| topic | sport, politics, art, science, other |" in card and "load_with_head" in card


def test_heads_hold_only_the_heads_tensors_with_the_sources_bytes(bert: Path, tmp_path: Path) -> None:
    out = merge(bert, tmp_path / "out", "topic", "sentiment")
    held, source = load_file(out / "heads" / "topic" / "model.safetensors"), tiny.tensors(bert / "topic")
    assert sorted(held) == ["classifier.bias", "classifier.weight"]
    assert all(torch.equal(value, source[name]) for name, value in held.items())
    assert "classifier.weight" not in tiny.tensors(out)


@pytest.mark.slow
def test_heads_come_and_go_with_their_models(bert: Path, tmp_path: Path) -> None:
    out = merge(bert, tmp_path / "out", "sentiment")
    tiny.done("add", out, bert / "topic", bert / "names")
    assert sorted(path.name for path in (out / "heads").iterdir()) == ["names", "sentiment", "topic"]
    tiny.done("unmerge", out, "--remove", "topic")
    assert sorted(path.name for path in (out / "heads").iterdir()) == ["names", "sentiment"]
    assert tiny.files(out) == tiny.files(merge(bert, tmp_path / "never", "sentiment", "names"))
    assert "topic" not in hfmerge.load_with_head(out, "sentiment").config.id2label.values()


def test_an_unknown_source_is_refused_with_the_names_there_are(bert: Path, tmp_path: Path) -> None:
    out = merge(bert, tmp_path / "out", "sentiment", "topic")
    with pytest.raises(NotFoundError, match=r"no head of sentimant; it keeps heads of: sentiment, topic\.$"):
        hfmerge.load_with_head(out, "sentimant")
    plain = merge(bert, tmp_path / "plain", "same-labels", base="headed")
    with pytest.raises(NotFoundError, match=r"no head of same-labels; it keeps heads of: none\.$"):
        hfmerge.load_with_head(plain, "same-labels")


def test_options_of_from_pretrained_are_passed_on(bert: Path, tmp_path: Path) -> None:
    out = merge(bert, tmp_path / "out", "sentiment", "topic")
    assert hfmerge.load_with_head(out, "topic", dtype=torch.bfloat16).classifier.weight.dtype == torch.bfloat16


def test_heads_of_equal_shape_but_other_labels_are_not_averaged(bert: Path, tmp_path: Path) -> None:
    """The base has a head with three labels, `sentiment` one with three others."""
    out = merge(bert, tmp_path / "out", "sentiment", "same-labels", base="headed")
    merged, base = tiny.tensors(out), tiny.tensors(bert / "headed")
    again = tiny.tensors(bert / "same-labels")
    name = "classifier.weight"
    # only the model with the base's own labels takes part, with its share of one half
    assert torch.allclose(merged[name], base[name] + (again[name] - base[name]) / 2, atol=1e-6)
    assert not (out / "heads" / "same-labels").exists()
    model = hfmerge.load_with_head(out, "sentiment")
    assert model.config.id2label == dict(enumerate(SENTIMENT))
    source = transformers.BertForSequenceClassification.from_pretrained(bert / "sentiment")
    backbone = transformers.BertForSequenceClassification.from_pretrained(out)
    assert_same_output(model, expected("BertForSequenceClassification", backbone, source), input_ids=WORDS)


def test_a_base_with_a_head_keeps_it_beside_heads_of_other_sizes(bert: Path, tmp_path: Path) -> None:
    out = merge(bert, tmp_path / "out", "topic", "names", base="headed")
    merged, base = tiny.tensors(out), tiny.tensors(bert / "headed")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(merged[name], base[name])
    assert hfmerge.load_with_head(out, "topic").num_labels == 5


SAVED: dict[str, Callable[[int], torch.Tensor]] = {
    "classifier.weight": lambda rows: torch.arange(rows * 16.0).reshape(rows, 16) / 50,
    "classifier.bias": lambda rows: torch.arange(float(rows)),
}


def adapter(folder: Path, seed: int, rows: int, **settings: Any) -> Path:
    saved = {name: make(rows) for name, make in SAVED.items()}
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], **settings}
    return tiny.adapter(folder, QUERY, seed, saved=saved, **settings)


def by_hand(bert: Path, folder: Path, rows: int) -> PreTrainedModel:
    """The base with one adapter merged into its query weights and the adapter's head."""
    settings = tiny.config("bert", num_labels=rows)
    model = transformers.BertForSequenceClassification(settings)
    state = tiny.tensors(bert / "base")
    held = load_file(folder / "adapter_model.safetensors")
    for path in QUERY:
        name = f"{path.removeprefix('bert.')}.weight"
        up, down = (held[f"base_model.model.{path}.lora_{part}.weight"] for part in "BA")
        state[name] = state[name] + (up * 2.0) @ down
    head = {name: held[f"base_model.model.{name}"] for name in SAVED}
    model.load_state_dict({**{f"bert.{name}": value for name, value in state.items()}, **head})
    return model.eval()


@pytest.mark.slow
def test_an_adapter_brings_its_head(bert: Path, tmp_path: Path) -> None:
    """`modules_to_save` on a base without a head; labels from a config.json beside the adapter, or LABEL_i."""
    adapter(tmp_path / "named", 1, 4)
    labels = {str(i): label for i, label in enumerate("wxyz")}
    (tmp_path / "named" / "config.json").write_text(
        json.dumps({"architectures": ["BertForSequenceClassification"], "id2label": labels})
    )
    adapter(tmp_path / "nameless", 2, 2)
    out = tmp_path / "out"
    tiny.done(
        "merge", tmp_path / "named", tmp_path / "nameless", "--base", bert / "base", "--method", "task_arithmetic",
        "--output", out,
    )  # fmt: skip
    assert hfmerge.load_with_head(out, "named").config.id2label == dict(enumerate("wxyz"))
    nameless = hfmerge.load_with_head(out, "nameless")
    assert nameless.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert [m["labels"] for m in entry(out)["materials"]["models"]] == [list("wxyz"), ["LABEL_0", "LABEL_1"]]
    tiny.done("unmerge", out, "--remove", "named")
    with torch.no_grad():
        got = hfmerge.load_with_head(out, "nameless")(input_ids=WORDS).logits
        wanted = by_hand(bert, tmp_path / "nameless", 2)(input_ids=WORDS).logits
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 5])
def test_the_head_of_an_adapter_does_not_touch_the_head_of_the_base(bert: Path, tmp_path: Path, rows: int) -> None:
    """The base has a head with three rows; the adapter's labels are others, or not known."""
    adapter(tmp_path / "tuned", 1, rows)
    out = tmp_path / "out"
    tiny.done("merge", tmp_path / "tuned", "--base", bert / "headed", "--method", "linear", "--output", out)
    merged, base = tiny.tensors(out), tiny.tensors(bert / "headed")
    for name, make in SAVED.items():
        assert torch.equal(merged[name], base[name])
        assert torch.equal(load_file(out / "heads" / "tuned" / "model.safetensors")[name], make(rows))
    assert hfmerge.load_with_head(out, "tuned").num_labels == rows


def test_an_adapter_that_names_the_labels_of_the_base_changes_its_head(bert: Path, tmp_path: Path) -> None:
    tuned = adapter(tmp_path / "tuned", 1, 3)
    (tuned / "config.json").write_text(json.dumps({"id2label": {"0": "A", "1": "B", "2": "C"}}))
    out = merge(bert, tmp_path / "out", "same-labels", str(tuned), base="headed")
    merged, base, other = tiny.tensors(out), tiny.tensors(bert / "headed"), tiny.tensors(bert / "same-labels")
    for name, make in SAVED.items():
        wanted = base[name] + (make(3) - base[name] + other[name] - base[name]) / 2
        assert torch.allclose(merged[name], wanted, atol=1e-6)
    assert not (out / "heads").exists()


TASKS = {
    "BertForSequenceClassification": "SEQ_CLS",
    "BertForTokenClassification": "TOKEN_CLS",
    "BertForQuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("told", [True, False], ids=["task type", "no task type"])
@pytest.mark.parametrize("title", TASKS)
def test_an_adapter_of_peft_brings_the_head_of_any_task(bert: Path, tmp_path: Path, title: str, told: bool) -> None:
    """With a task type, and without one, where PEFT names the class; it computes what PEFT computes."""
    torch.manual_seed(1)
    labels = {} if title.endswith("Answering") else {"num_labels": 4}
    model = getattr(transformers, title).from_pretrained(bert / "base", **labels)
    head = "qa_outputs" if title.endswith("Answering") else "classifier"
    settings = {"task_type": TASKS[title]} if told else {"modules_to_save": [head]}
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], **settings))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path / "tuned")
    assert (json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())["task_type"] is None) != told
    out = merge(bert, tmp_path / "out", str(tmp_path / "tuned"), method="task_arithmetic")
    loaded = hfmerge.load_with_head(out, "tuned")
    assert type(loaded).__name__ == title
    with torch.no_grad():
        mine, theirs = loaded(input_ids=WORDS), wrapped.eval()(input_ids=WORDS)
    for name in theirs:
        assert torch.allclose(mine[name], theirs[name], atol=1e-5)


def test_the_class_of_a_head_is_no_free_choice_of_an_adapter(bert: Path, tmp_path: Path) -> None:
    """A class of another model type, a backbone, and no class of transformers say nothing."""
    for at, named in enumerate(("RobertaForTokenClassification", "BertModel", "os.system", ["x"], None)):
        tuned = adapter(tmp_path / f"tuned-{at}", 1, 2, task_type=None, auto_mapping={"base_model_class": named})
        run = tiny.cli("plan", tuned, "--base", bert / "base", "--method", "linear")
        assert run.code == 1 and "Traceback" not in run.err
        assert "names no bert class" in run.err or "auto_mapping" in run.err
    tuned = adapter(tmp_path / "headed", 1, 5, task_type=None)
    out = merge(bert, tmp_path / "out", str(tuned), base="headed")
    assert type(hfmerge.load_with_head(out, "headed")).__name__ == "BertForSequenceClassification"


def test_an_adapter_without_a_task_cannot_bring_a_head(bert: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "tuned", 1, 2, task_type=None)
    run = tiny.cli(
        "merge", tmp_path / "tuned", "--base", bert / "base", "--method", "linear", "--output", tmp_path / "out"
    )
    assert run.code == 1 and "names no bert class" in run.err and "config.json" in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_heads_of_image_and_language_models(tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    words = {"input_ids": WORDS}
    cases = {
        "vit": ("ViTModel", "ViTForImageClassification", {"pixel_values": pixels}),
        "dinov2": ("Dinov2Model", "Dinov2ForImageClassification", {"pixel_values": pixels}),
        "llama": ("LlamaModel", "LlamaForSequenceClassification", words),
    }
    for kind, (base_title, title, inputs) in cases.items():
        root = tmp_path / kind
        base = tiny.build(base_title, tiny.config(kind, **({"pad_token_id": 0} if kind == "llama" else {})))
        tiny.save(base, root / "base")
        for seed, labels in ((1, ["a", "b"]), (2, ["x", "y", "z"])):
            tiny.save(tiny.with_head(title, base, seed, labels), root / f"tuned-{seed}")
        out = merge(root, root / "out", "tuned-1", "tuned-2")
        source = getattr(transformers, title).from_pretrained(root / "tuned-2")
        model = hfmerge.load_with_head(out, "tuned-2")
        backbone = getattr(transformers, base_title).from_pretrained(out)
        assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
        assert_same_output(model, expected(title, backbone, source), **inputs)


@pytest.mark.slow
def test_a_head_on_one_tower_of_the_base(tmp_path: Path) -> None:
    """CLIPForImageClassification uses the vision tower of a CLIPModel only."""
    base = tiny.build("CLIPModel", tiny.config("clip"))
    tiny.save(base, tmp_path / "base")
    for seed, labels in ((1, ["a", "b"]), (2, ["x", "y", "z"])):
        settings = tiny.config("clip", id2label=dict(enumerate(labels)))
        tuned = tiny.build("CLIPForImageClassification", settings, seed)
        state = tuned.state_dict()
        tuned.load_state_dict({**state, **{k: v for k, v in base.state_dict().items() if k in state}})
        tiny.disturb(tuned, seed, 0.05)
        tiny.save(tuned, tmp_path / f"tuned-{seed}")
    out = merge(tmp_path, tmp_path / "out", "tuned-1", "tuned-2")
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    model = hfmerge.load_with_head(out, "tuned-2")
    source = transformers.CLIPForImageClassification.from_pretrained(tmp_path / "tuned-2")
    tower = transformers.CLIPModel.from_pretrained(out).state_dict()
    wanted = transformers.CLIPForImageClassification(source.config).eval()
    state = source.state_dict()
    wanted.load_state_dict({**state, **{name: value for name, value in tower.items() if name in state}})
    assert_same_output(model, wanted, pixel_values=pixels)
    assert torch.equal(
        tiny.tensors(out)["text_projection.weight"], tiny.tensors(tmp_path / "base")["text_projection.weight"]
    )
