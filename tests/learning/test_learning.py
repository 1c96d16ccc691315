"""Learned weights: gradients are exact, losses fall, and what was learned can be kept, checked and taken out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfmerge import add, merge, unmerge, verify
from hfmerge.engine.plan import Plan
from hfmerge.engine.planner import make_plan
from hfmerge.engine.ranks import Ranks
from hfmerge.errors import RecipeError
from hfmerge.learning.optimise import Anchor, optimise
from hfmerge.learning.progress import NOTHING
from hfmerge.learning.replay.dataset import load_replay
from hfmerge.learning.space import Space, group_of
from hfmerge.learning.student import students
from hfmerge.ledger.entry import Entry
from hfmerge.methods.gram import Gram
from hfmerge.methods.isotropic import MdmOcIso
from hfmerge.methods.mdm_oc_subspace import MdmOcSubspace
from hfmerge.recipe.learning import Learning
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.recipe.replay import ReplaySettings
from hfmerge.recipe.weights import PatternWeights, weight_at
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero
from tests.fixtures import evaluating, tiny
from tests.fixtures.launching import crew, succeed
from tests.learning.test_replay import wordpieces


LABELS = {"a": ["red", "green"], "b": ["x", "y", "z"], "c": ["yes", "no"]}
FEW = {"rows": 12, "length": 10, "generator": "unigram", "held_out": 0.25}
QUICK: dict[str, Any] = {"replay": FEW, "steps": 12, "rate": 0.1, "batch": 6, "every": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder, three classifiers tuned from it, and an adapter with a head of its own."""
    folder = tmp_path_factory.mktemp("learning")
    base = tiny.build("BertModel", tiny.config("bert"))
    found = {"base": wordpieces(tiny.save(base, folder / "base"))}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        model = tiny.with_head("BertForSequenceClassification", base, seed, labels)
        tiny.disturb(model.base_model, 10 + seed, 0.1)
        found[name] = wordpieces(tiny.save(model, folder / name))
    return found


def recipe(models: dict[str, Path], names: str = "abc", learn: dict[str, Any] | None = None, **more: Any) -> Any:
    data = {
        "base": str(models["base"]), "models": [str(models[name]) for name in names],
        "method": {"name": "mdm_oc", **more}, "learn": QUICK if learn is None else learn,
    }  # fmt: skip
    return parse_recipe(data, "test")


def planned(models: dict[str, Path], **more: Any) -> Plan:
    return make_plan(recipe(models, **more), origin="test")


def record(folder: Path) -> Entry:
    last = sorted((folder / "merge_history").glob("*.json"))[-1]
    return Entry.from_bytes(last.read_bytes(), str(last))


METHODS: list[dict[str, Any]] = [
    {}, {"scope": "model"}, {"name": "task_arithmetic", "scale": 0.5}, {"name": "gram"},
    {"name": "gram", "side": "left", "beta": 5.0},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("more", METHODS)
def test_merged_values_are_those_of_a_merge_with_these_weights(
    more: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    plan = planned(models, **more)
    values = torch.rand(3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    with Space(plan, groups="model") as space:
        merged = space.merged(values)
        weights = [space.weights_of(values, i, 15) for i in range(3)]
    data = {
        "base": str(models["base"]), "method": {"name": "mdm_oc", **more},
        "models": [{"model": str(models[n]), "weight": w} for n, w in zip("abc", weights, strict=True)],
    }  # fmt: skip
    merge(parse_recipe(data, "test"), output=tmp_path / "out")
    stored = tiny.tensors(tmp_path / "out")
    assert merged
    for key, value in merged.items():
        torch.testing.assert_close(value, stored[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mdm_oc", "mdm_oc_iso", "mdm_oc_subspace", "gram"])
@pytest.mark.parametrize(("budget", "groups"), [(0, "layer"), (1 << 30, "layer"), (1 << 30, "parameter")])
def test_gradients_in_the_weights_are_those_of_autograd(
    budget: int, groups: Any, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    with Space(planned(models, name=method), groups=groups, budget=budget, scratch=tmp_path) as space:
        assert (len(space.groups) == len(space.params)) == (groups == "parameter")
        start = torch.rand(3, len(space.groups), generator=generator, dtype=torch.float64)
        slopes = {key: torch.randn(value.shape, generator=generator) for key, value in space.merged(start).items()}

        def loss(weights: torch.Tensor) -> float:
            return sum(float((slopes[key].double() * value).sum()) for key, value in space.merged(weights).items())

        found = space.pulled_back(slopes)
        for model in range(3):
            for group in range(len(space.groups)):
                nudge = torch.zeros_like(start)
                nudge[model, group] = 0.5
                # the loss is linear in the weights
                expected = loss(start + nudge) - loss(start - nudge)
                assert float(found[model, group]) == pytest.approx(expected, rel=1e-3, abs=2e-3)
        spilled = method != "mdm_oc" and not budget
        assert len(list(tmp_path.rglob("*.safetensors"))) == (len(space.params) if spilled else 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kinds", ["ddd", "lll", "dld", "dlz", "zlz", "ldl"])
@pytest.mark.parametrize(
    "method",
    [
        *(Gram(side="left", beta=0.2), Gram(side="right", beta=0.2)),
        *(MdmOcSubspace(), MdmOcSubspace(variant="paper"), MdmOcIso(grid=44)),
    ],
)
def test_parts_are_what_the_weights_multiply(kinds: str, method: Any) -> None:
    generator = torch.Generator().manual_seed(1)

    def change(kind: str) -> TaskVector:
        up, down = torch.randn(7, 2, generator=generator), torch.randn(2, 5, generator=generator)
        return {"d": Dense(torch.randn(7, 5, generator=generator)), "l": LowRank(up, down), "z": zero((7, 5))}[kind]

    taus, weights = [change(kind) for kind in kinds], [0.3, 1.4, 0.8]
    carry = None
    for tau, weight in zip(taus, weights, strict=True):
        carry = method.step(carry, tau, weight, matrix=True)
    assert carry is not None
    expected = method.emit(carry, weights, matrix=True).to_dense()
    parts = method.parts(taus, matrix=True)
    ranks = [tau.rank if isinstance(tau, LowRank) else None for tau in taus]
    assert [part.rank if isinstance(part, LowRank) else None for part in parts] == method.part_ranks((7, 5), ranks)
    found = sum(weight * part.to_dense() for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_plan_says_what_learning_takes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for the changes, or for what `gram` computes of them room on the disk."""
    weights = 4 * sum(value.numel() for value in tiny.tensors(models["base"]).values())
    assert planned(models).learning_bytes == (6 * weights, 0) == planned(models, name="gram").learning_bytes
    held = planned(models, learn={**QUICK, "ewc": 1.0})
    assert held.learning_bytes == (8 * weights, 0) and held.estimate.memory > 8 * weights
    monkeypatch.setattr("hfmerge.engine.plan.HELD_BYTES", 0)
    plan = planned(models, name="gram")
    assert plan.learning_bytes == (3 * weights, 3 * weights) and plan.estimate.disk >= 3 * weights
    with Space(plan, groups="layer", budget=0, scratch=tmp_path) as space:
        space.merged(space.start([0.5] * 3))
        taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 3 * weights <= taken <= 3 * weights + 500 * len(plan.params)


@pytest.mark.slow
def test_learning_brings_the_merge_nearer_to_its_models(models: dict[str, Path], tmp_path: Path) -> None:
    result = merge(recipe(models, learn={**QUICK, "steps": 40}), output=tmp_path / "out")
    learned = result.entry.learned
    assert learned is not None
    held = [point[2] for point in learned.curve]
    assert min(held) < 0.9 * held[0]
    weights = [material.weight for material in result.entry.models]
    assert all(isinstance(weight, PatternWeights) for weight in weights)
    assert learned.groups == tuple(dict.fromkeys(group_of(key, "layer") for key in tiny.tensors(tmp_path / "out")))
    assert verify(tmp_path / "out", replay=True).ok
    assert merge(recipe(models, learn={**QUICK, "steps": 40}), output=tmp_path / "again").entry.models == (
        result.entry.models
    )


@pytest.mark.slow
def test_one_weight_a_model_within_bounds(models: dict[str, Path], tmp_path: Path) -> None:
    learn = {**QUICK, "groups": "model", "low": 0.55, "high": 0.6, "start": 0.58, "rate": 0.5}
    result = merge(recipe(models, learn=learn), output=tmp_path / "out")
    weights = [material.weight for material in result.entry.models]
    assert all(isinstance(weight, float) and 0.55 <= weight <= 0.6 for weight in weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mdm_oc", "mdm_oc_iso", "mdm_oc_subspace", "gram"])
def test_a_model_leaves_with_its_rows_and_the_others_learn_anew(
    method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    merge(recipe(models, name=method), output=tmp_path / "abc")
    rows = record(tmp_path / "abc").learned
    assert rows is not None
    sources = [
        load_replay(tmp_path / "abc" / f"merge_state/{row['sha256']}.safetensors").source for row in rows.replay
    ]
    assert [source.partition("@")[0] for source in sources] == ["a", "b", "c"]
    result = unmerge(tmp_path / "abc", "b", output=tmp_path / "ac")
    merge(recipe(models, "ac", name=method), output=tmp_path / "never")
    assert (
        tiny.files(tmp_path / "ac", states=False)["model.safetensors"]
        == (tiny.files(tmp_path / "never", states=False)["model.safetensors"])
    )
    kept = {path.name for path in (tmp_path / "ac" / "merge_state").glob("*.safetensors")}
    assert kept == {f"{rows.replay[i]['sha256']}.safetensors" for i in (0, 2)}
    assert result.entry.learned is not None and result.entry.learned.replay == (rows.replay[0], rows.replay[2])
    assert verify(tmp_path / "ac", replay=True).ok


@pytest.mark.slow
def test_weights_stay_where_they_shall_not_be_learned_again(models: dict[str, Path], tmp_path: Path) -> None:
    before = merge(recipe(models, learn={**QUICK, "relearn": False}), output=tmp_path / "abc").entry
    after = unmerge(tmp_path / "abc", "a", output=tmp_path / "bc").entry
    assert [m.weight for m in after.models] == [m.weight for m in before.models[1:]]
    assert after.learned is not None and "kept" in after.learned.how
    assert before.learned is not None and after.learned.replay == before.learned.replay[1:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mdm_oc", "mdm_oc_subspace", "task_arithmetic"])
def test_a_new_model_goes_on_from_the_weights_of_the_others(
    method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    learn = {**QUICK, "steps": 1, "rate": 1e-6, "every": 1}
    before = merge(recipe(models, "ab", learn=learn, name=method), output=tmp_path / "ab").entry
    assert not before.states
    after = add(tmp_path / "ab", [str(models["c"])], output=tmp_path / "abc").entry
    for old, new in zip(before.models, after.models, strict=False):
        for key in tiny.tensors(models["base"]):
            assert weight_at(new.weight, key) == pytest.approx(weight_at(old.weight, key), abs=1e-3)
    assert before.learned is not None and after.learned is not None
    assert after.learned.replay[:2] == before.learned.replay and "first 2 models" in after.learned.how
    assert verify(tmp_path / "abc", replay=True).ok


@pytest.mark.slow
def test_consolidation_holds_on_to_the_merge_before(models: dict[str, Path], tmp_path: Path) -> None:
    drifts = []
    for ewc in (1e-6, 1e7):
        folder = tmp_path / str(ewc)
        learn = {**QUICK, "ewc": ewc, "steps": 30}
        merge(recipe(models, "ab", learn=learn), output=folder / "ab")
        entry = add(folder / "ab", [str(models["c"])], output=folder / "abc").entry
        assert entry.learned is not None and entry.learned.fisher is not None
        before, after = tiny.tensors(folder / "ab"), tiny.tensors(folder / "abc")
        drifts.append(sum(float((after[key] - before[key]).square().sum()) for key in before))
        assert verify(folder / "abc").ok
    assert drifts[1] < 0.5 * drifts[0]


@pytest.mark.slow
def test_the_penalty_and_its_gradient_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    merged, before, weights = (torch.randn(4, 5, generator=generator) for _ in range(3))
    anchor = Anchor({"x": before}, {"x": weights.abs()}, 3.0)
    leaf = merged.clone().requires_grad_()
    loss = 1.5 * (weights.abs() * (leaf - before).square()).sum()
    loss.backward()
    assert anchor.penalty({"x": merged}) == pytest.approx(float(loss.detach()), rel=1e-5)
    pulled = {"x": torch.zeros(4, 5)}
    anchor.pull(pulled, {"x": merged})
    torch.testing.assert_close(pulled["x"], leaf.grad)


@pytest.mark.slow
def test_a_few_labelled_rows(models: dict[str, Path], tmp_path: Path) -> None:
    tasks = []
    for seed, (name, labels) in enumerate(LABELS.items()):
        evaluating.labelled(tmp_path / f"{name}.jsonl", labels, 20, seed)
        tasks.append(
            {"name": name, "kind": "text-classification", "dataset": f"./{name}.jsonl", "text": "text",
             "label": "label", "head": name, "split": "train"}
        )  # fmt: skip
    suite = evaluating.suite(tmp_path / "suite.yaml", *tasks)
    learn = {**QUICK, "loss": "labels", "suite": str(suite), "rows": 6}
    entry = merge(recipe(models, learn=learn), output=tmp_path / "labels").entry
    assert entry.learned is not None and entry.learned.replay == (None, None, None)
    mixed = merge(recipe(models, learn={**learn, "loss": "mixed"}), output=tmp_path / "mixed").entry
    assert mixed.learned is not None and all(mixed.learned.replay)
    assert mixed.models != entry.models


@pytest.mark.slow
def test_recomputed_activations_and_shared_rows_change_nothing(models: dict[str, Path]) -> None:
    plan = planned(models)
    asked = Learning(**{**QUICK, "replay": ReplaySettings(**FEW), "steps": 3})
    from hfmerge.learning.learn import _rows

    _, rows = _rows(plan, asked, {}, NOTHING, Ranks(), None, "cpu")
    found = []
    with Space(plan, groups="layer") as space:
        start = space.start([0.5, 0.5, 0.5])
        for checkpointing in (False, True):
            merged = students(plan, [param.key for param in space.params], rows, checkpointing=checkpointing)
            found.append(optimise(space, merged, start, asked, Ranks()).weights)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_adapters_learn_with_their_own_heads(models: dict[str, Path], tmp_path: Path) -> None:
    targets = {f"bert.encoder.layer.{i}.attention.self.query": (16, 16) for i in range(2)}
    places = [str(models["a"])]
    for seed in (5, 6):
        torch.manual_seed(seed)
        saved = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
        folder = tiny.adapter(
            tmp_path / f"adapter-{seed}", targets, seed, saved=saved, task_type="SEQ_CLS",
            modules_to_save=["classifier"], base_model_name_or_path=str(models["base"]),
        )  # fmt: skip
        labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
        settings = {"architectures": ["BertForSequenceClassification"], **labels}
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        places.append(str(wordpieces(folder)))
    data = {"base": str(models["base"]), "models": places, "method": {"name": "mdm_oc"}, "learn": QUICK}
    result = merge(parse_recipe(data, "test"), output=tmp_path / "out")
    assert result.entry.learned is not None and all(result.entry.learned.replay)
    assert verify(tmp_path / "out", replay=True).ok


@pytest.mark.slow
def test_two_processes_find_the_same_weights(models: dict[str, Path], tmp_path: Path) -> None:
    words = ["--base", models["base"], "--method", "mdm_oc", "--learn", "steps=6", "--learn", "replay.rows=12"]
    words += ["--learn", "replay.generator=unigram", "--learn", "every=3", "--quiet"]
    names = [models[name] for name in "abc"]
    tiny.done("merge", *words, "--output", tmp_path / "one", *names)
    text = [str(word) for word in ("merge", *words, "--output", tmp_path / "two", *names)]
    succeed(crew(2, "-m", "hfmerge", *text))
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    for first, second in zip(one.models, two.models, strict=True):
        for key in tiny.tensors(models["base"]):
            assert weight_at(first.weight, key) == pytest.approx(weight_at(second.weight, key), abs=2e-4)
    assert one.learned is not None and two.learned is not None
    assert one.learned.replay == two.learned.replay and one.learned.steps == two.learned.steps


@pytest.mark.slow
def test_what_was_learned_from_is_guarded(models: dict[str, Path], tmp_path: Path) -> None:
    entry = merge(recipe(models, "ab"), output=tmp_path / "out").entry
    assert entry.learned is not None
    path = tmp_path / "out" / f"merge_state/{entry.learned.replay[1]['sha256']}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = verify(tmp_path / "out")
    assert not report.ok and path.name in " ".join(report.culprits)


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(values)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (change(method="opcm"), "is for task_arithmetic, gram, mdm_oc, mdm_oc_iso, mdm_oc_subspace"),
        (change(learn={"steps": 0}), "learn.steps"),
        (change(learn={"loss": "labels"}), "learn.suite: is missing"),
        (change(learn={"suite": "glue"}), "learn.suite: has no effect"),
        (change(learn={"low": 1.0, "high": 0.5}), "learn.low: must be below high"),
        (change(learn={"start": 3.0}), "learn.start: must lie between"),
        (change(learn={"stepz": 1}), "learn.stepz: unknown key"),
        (change(learn={"replay": {"rows": 1}}), "learn.replay.rows"),
        (change(learn={"replay": 3}), "learn.replay: must be a mapping"),
        (change(learn="yes"), "learn: must be a mapping"),
    ],
)
def test_faults_are_named(edit: Callable[[dict[str, Any]], None], text: str) -> None:
    data: dict[str, Any] = {"base": "x/base", "models": ["x/a", "x/b"], "method": "mdm_oc", "learn": {}}
    edit(data)
    with pytest.raises(RecipeError) as error:
        parse_recipe(data, "test")
    assert text in str(error.value)
