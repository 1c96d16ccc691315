"""Fisher information: gradients of single rows, their whole expectation, and nothing held of what is new."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import hfmerge
from hfmerge.engine.planner import make_plan
from hfmerge.evaluation.models import kind_of, open_subject
from hfmerge.hashing import sha256_file
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.learning.fisher import FISHER_ROWS, fisher, load_fisher, save_fisher
from hfmerge.learning.replay.dataset import Replay, load_replay
from hfmerge.learning.replay.generate import generate
from hfmerge.learning.space import Space
from hfmerge.learning.student import Student, references, students
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.recipe.replay import ReplaySettings
from hfmerge.recipe.weights import weight_at
from tests.fixtures import tiny
from tests.learning.test_replay import wordpieces


pytestmark = pytest.mark.slow
ROWS = ReplaySettings(rows=12, length=8, generator="unigram", held_out=0.25)
LEARN = {"replay": {**ROWS.to_dict()}, "steps": 6, "rate": 0.05, "batch": 9, "every": 3}


def classifiers(folder: Path, problem: str | None = None) -> dict[str, Path]:
    """A base and two classifiers with heads of three and of two outputs."""
    base = tiny.build("BertModel", tiny.config("bert"))
    found = {"base": wordpieces(tiny.save(base, folder / "base"))}
    for seed, (name, labels) in enumerate({"a": ["x", "y", "z"], "b": ["yes", "no"]}.items(), 1):
        model = tiny.with_head("BertForSequenceClassification", base, seed, labels)
        tiny.disturb(model.base_model, 10 + seed, 0.1)
        found[name] = wordpieces(tiny.save(model, folder / name))
        tiny.edit_config(folder / name, problem_type=problem)
    return found


def speakers(folder: Path, problem: str | None = None) -> dict[str, Path]:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    found = {"base": tiny.save(base, folder / "base")}
    for seed, name in enumerate("ab", 1):
        found[name] = tiny.save(tiny.fine_tune(base, seed, 0.1), folder / name)
    for place in found.values():
        tiny.tokenizer(place, ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))])
    return found


def prepared(models: dict[str, Path]) -> tuple[list[Student], dict[str, torch.Tensor]]:
    """The merge at weights of one half, and its students."""
    data = {"base": str(models["base"]), "models": [str(models["a"]), str(models["b"])], "method": "mdm_oc"}
    plan = make_plan(parse_recipe(data, "test"), origin="test")
    rows = []
    for ref in references(plan):
        subject = open_subject(ref, dtype="float32")
        rows.append([(generate(subject, kind_of(subject), ROWS), 1.0)])
    with Space(plan, groups="model") as space:
        merged = space.merged(torch.full((2, 1), 0.5, dtype=torch.float64))
        found = students(plan, [param.key for param in space.params], rows, checkpointing=False)
    for student in found:
        # of the kernel derivatives cannot be taken in batches
        student.model.set_attn_implementation("eager")
    return found, merged


def outputs(student: Student, replay: Replay, row: int) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """What the student says of one row as a function of the merged tensors: (answers, classes)."""
    inputs, targets = replay.batch([row])
    names = {id(parameter): name for name, parameter in student.model.named_parameters()}
    of = {names[id(m._parameters[n])]: key for key, places in student.places.items() for m, n in places}

    def found(values: dict[str, torch.Tensor]) -> torch.Tensor:
        held = {name: values[key] for name, key in of.items()}
        logits: torch.Tensor = functional_call(student.model, held, (), inputs).logits
        places = targets["positions"][0] if replay.scores == "tokens" else None
        return logits if places is None else logits[0, places[places >= 0].long()]

    return found


def one_draw(student: Student, merged: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Mean over rows of the squared gradient of one row's log-likelihood, answers drawn as `fisher` says."""
    replay = student.rows[0][0]
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(replay.learned), generator=random).tolist()
    total = {key: torch.zeros_like(value) for key, value in merged.items()}
    for row in order:
        values = {key: value.clone().requires_grad_() for key, value in merged.items()}
        logits = outputs(student, replay, row)(values)
        if replay.scores == "values":
            # a normal distribution of variance one around the outputs
            answers = logits.detach() + torch.randn(logits.shape, generator=random)
            likelihood = -(answers - logits).square().sum() / 2
        elif replay.scores == "labels":
            answers = torch.bernoulli(logits.detach().sigmoid(), generator=random)
            likelihood = -binary_cross_entropy_with_logits(logits, answers, reduction="sum")
        else:
            answers = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
            likelihood = -cross_entropy(logits, answers, reduction="sum")
        gradients = torch.autograd.grad(likelihood, list(values.values()), materialize_grads=True)
        for key, gradient in zip(values, gradients, strict=True):
            total[key] += gradient.square() / len(order)
    return total


def expected(student: Student, merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with every answer counted by its probability instead of one drawn."""
    replay = student.rows[0][0]
    total = {key: torch.zeros_like(value) for key, value in merged.items()}
    for row in replay.learned:
        found = outputs(student, replay, row)
        logits = found(merged).detach()
        for key, slope in jacrev(found)(merged).items():
            flat = slope.detach().reshape(*logits.shape, -1)
            # the derivative of log p[c] is that of logit c less the mean one
            chances = logits.softmax(-1)[..., None]
            square = (chances * (flat - (chances * flat).sum(1, keepdim=True)).square()).sum((0, 1))
            total[key] += square.reshape(total[key].shape) / len(replay.learned)
    return total


def mean(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([part[key] for part in parts]).mean(0) for key in parts[0]}


MAKERS: dict[str, tuple[Callable[[Path, str | None], dict[str, Path]], str | None]] = {
    "classes": (classifiers, None), "labels": (classifiers, "multi_label_classification"),
    "values": (classifiers, "regression"), "tokens": (speakers, None),
}  # fmt: skip


@pytest.mark.parametrize("scores", list(MAKERS))
def test_it_is_the_mean_squared_gradient_of_single_rows(scores: str, tmp_path: Path) -> None:
    make, problem = MAKERS[scores]
    both, merged = prepared(make(tmp_path, problem))
    assert [student.rows[0][0].scores for student in both] == [scores] * 2
    assert len(both[0].rows[0][0].learned) <= FISHER_ROWS
    ticks: list[int] = []
    found = fisher(both, merged, seed=5, tick=ticks.append)
    wanted = mean([one_draw(student, merged, 5 + i) for i, student in enumerate(both)])
    assert sum(ticks) == sum(len(student.rows[0][0].learned) for student in both)
    for key, value in wanted.items():
        assert found[key].dtype == torch.float32 and bool((found[key] >= 0).all())
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6 * float(value.max()) + 1e-12)
    assert any(
        bool(value.ne(found[key]).any()) for key, value in fisher(both, merged, seed=6, tick=ticks.append).items()
    )


@pytest.mark.parametrize("scores", ["classes", "tokens"])
def test_over_many_draws_it_is_the_expectation(scores: str, tmp_path: Path) -> None:
    both, merged = prepared(MAKERS[scores][0](tmp_path, None))
    drawn = mean([fisher(both, merged, seed=seed, tick=lambda count: None) for seed in range(20, 36)])
    exact = mean([expected(student, merged) for student in both])
    ratio = sum(float(v.sum()) for v in drawn.values()) / sum(float(v.sum()) for v in exact.values())
    assert ratio == pytest.approx(1.0, abs=0.2)


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    values = {"b": torch.rand(3, 2).T, "a": torch.rand(4)}
    save_fisher(values, tmp_path / "deep" / "fisher")
    first = sha256_file(tmp_path / "deep" / "fisher")
    back = load_fisher(tmp_path / "deep" / "fisher")
    assert all(torch.equal(back[key], value) for key, value in values.items()) and back.keys() == values.keys()
    save_fisher(dict(reversed(values.items())), tmp_path / "other")
    assert sha256_file(tmp_path / "other") == first


def adapter(folder: Path, seed: int, layers: Sequence[int], base: str | None = None) -> Path:
    """An adapter of some layers, with a head of its own."""
    parts = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in layers for name in ("query", "value")]
    torch.manual_seed(seed)
    saved = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    settings: dict[str, Any] = {"target_modules": parts, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    settings |= {} if base is None else {"base_model_name_or_path": base}
    tiny.adapter(folder, dict.fromkeys(parts, (16, 16)), seed, saved=saved, **settings)
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = {"architectures": ["BertForSequenceClassification"], **labels}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return wordpieces(folder)


def test_what_is_new_in_the_merge_is_not_held(tmp_path: Path) -> None:
    """Two adapters change the first layer alone; a third one that changes both is held back in the first only."""
    base = wordpieces(tiny.save(tiny.build("BertModel", tiny.config("bert")), tmp_path / "base"))
    first, second = (str(adapter(tmp_path / f"a{i}", i, [0], str(base))) for i in (1, 2))
    third = str(adapter(tmp_path / "a3", 3, [0, 1], str(base)))
    data = {
        "base": str(base), "models": [first, second], "method": "mdm_oc", "learn": {**LEARN, "steps": 14, "ewc": 1e8},
    }  # fmt: skip
    before = hfmerge.merge(parse_recipe(data, "test"), output=tmp_path / "two").entry
    after = hfmerge.add(tmp_path / "two", [third], output=tmp_path / "three").entry
    assert before.learned is not None and after.learned is not None
    held, now = (
        load_fisher(folder / f"merge_state/{entry.learned.fisher}.safetensors")
        for folder, entry in ((tmp_path / "two", before), (tmp_path / "three", after))
    )
    new = [key for key in now if key.startswith("encoder.layer.1.")]
    assert new and not any(key.startswith("encoder.layer.1.") for key in held)
    assert all(float(now[key].max()) > 0 for key in new)
    # what is carried adds up, of what is new there is nothing to add
    assert all(bool((now[key] >= held[key]).all()) for key in held)
    weight = after.models[2].weight
    assert weight_at(weight, "encoder.layer.0.attention.self.query.weight") < 0.05
    assert weight_at(weight, new[0]) > 0.3


@pytest.fixture(scope="module")
def adapters(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters with heads on the Hub, and two bases that they fit."""
    root = tmp_path_factory.mktemp("rebase")
    for seed, name in enumerate(("base", "other")):
        wordpieces(tiny.save(tiny.build("BertModel", tiny.config("bert"), seed), root / name))
        import_folder(hub.endpoint, hub.token, root / name, f"fisher/{name}")
    for seed in (5, 6):
        import_folder(hub.endpoint, hub.token, adapter(root / f"a{seed}", seed, [0, 1]), f"fisher/a{seed}")
    return ["fisher/a5", "fisher/a6"]


def test_a_rebase_makes_rows_anew(adapters: list[str], tmp_path: Path) -> None:
    """The rows of an adapter are those of the base that it lies on, though its own commit stays what it is."""

    def recipe(base: str) -> Any:
        return parse_recipe(
            {"base": base, "models": adapters, "method": "mdm_oc", "learn": {**LEARN, "steps": 1}}, "test"
        )

    before = hfmerge.merge(recipe("fisher/base"), output=tmp_path / "first").entry.learned
    after = hfmerge.rebase(tmp_path / "first", "fisher/other", output=tmp_path / "moved").entry.learned
    never = hfmerge.merge(recipe("fisher/other"), output=tmp_path / "new").entry.learned
    assert before is not None and after is not None and never is not None
    for old, moved, new in zip(before.replay, after.replay, never.replay, strict=True):
        assert old["source"] == moved["source"] and old["sha256"] != moved["sha256"] == new["sha256"]
        load_replay(tmp_path / "moved" / f"merge_state/{moved['sha256']}.safetensors")
        assert not (tmp_path / "moved" / f"merge_state/{old['sha256']}.safetensors").exists()
    assert (
        tiny.files(tmp_path / "moved", states=False)["model.safetensors"]
        == (tiny.files(tmp_path / "new", states=False)["model.safetensors"])
    )
