"""`inspect` against brute force on dense tensors: similarity, signs, spectra, interference; adapters as factors."""

import json
from pathlib import Path

import pytest
import torch

import hfmerge
from hfmerge.errors import NonFiniteError, RecipeError
from hfmerge.evaluation.inspection import statistics
from hfmerge.evaluation.inspection.inspection import by_layer
from hfmerge.evaluation.inspection.statistics import Measured
from hfmerge.ledger.repository import open_merged
from hfmerge.methods.opcm import OPCM
from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe
from hfmerge.task_vector import Dense
from tests.fixtures import launching, tiny


def recipe(base: Path, models: list[Path], weights: tuple[float, ...] = (), **options: float | str) -> Recipe:
    choice = MethodChoice("opcm", {"alpha": 0.5, "variant": "code", **options}, "mean")
    given = weights or (1.0,) * len(models)
    return Recipe(str(base), tuple(ModelEntry(str(m), w) for m, w in zip(models, given, strict=True)), choice)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("full")
    model = tiny.build("BertModel", tiny.config("bert"))
    models = [tiny.save(tiny.fine_tune(model, seed, 0.02 * seed), folder / f"tune-{seed}") for seed in (1, 2, 3)]
    return tiny.save(model, folder / "base"), models


def changes(base: Path, models: list[Path]) -> list[dict[str, torch.Tensor]]:
    origin = tiny.tensors(base)
    return [{key: value - origin[key] for key, value in tiny.tensors(m).items()} for m in models]


def flat(change: dict[str, torch.Tensor], like: str = "") -> torch.Tensor:
    return torch.cat([value.reshape(-1) for key, value in sorted(change.items()) if key.startswith(like)]).double()


def is_matrix(key: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and "embeddings" not in key


def test_sums_are_those_of_the_whole_vectors(full: tuple[Path, list[Path]]) -> None:
    base, models = full
    found = hfmerge.inspect(recipe(base, models, (1.0, 2.0, -1.0)))
    taus = changes(base, models)
    for part in (found.whole, *found.layers):
        vectors = [flat(tau, "" if part is found.whole else f"{part.name}.") for tau in taus]
        assert part.elements == len(vectors[0])
        for i, a in enumerate(vectors):
            assert part.norms[i] == pytest.approx(float(a.norm()), rel=1e-6)
            for j, b in enumerate(vectors):
                assert part.cosine[i][j] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
                both = (a != 0) & (b != 0)
                assert part.sign_conflict[i][j] == int(((a * b) < 0).sum()) / int(both.sum())
        weighted = torch.stack(vectors) * torch.tensor([1.0, 2.0, -1.0])[:, None]
        lost = 1.0 - float(weighted.sum(0).abs().sum() / weighted.abs().sum())
        assert part.cancelled == pytest.approx(lost, abs=1e-6)
    assert [part.name for part in found.layers] == ["embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"]


@pytest.mark.parametrize("variant", ["code", "paper", "code-no-diagonal"])
def test_interference_is_what_opcm_itself_leaves_out(full: tuple[Path, list[Path]], variant: str) -> None:
    base, models = full
    found = hfmerge.inspect(recipe(base, models, alpha=0.6, variant=variant))
    method = OPCM(alpha=0.6, variant=variant)  # type: ignore[arg-type]
    taus = changes(base, models)
    cleared = [0.0, 0.0, 0.0]
    for key in (key for key, value in taus[0].items() if is_matrix(key, value)):
        carry = None
        for i, tau in enumerate(taus):
            before = carry["S"].to_dense().double() if carry else torch.zeros_like(tau[key]).double()
            carry = method.step(carry, Dense(tau[key]), 1.0, matrix=True)
            cleared[i] += float(tau[key].double().square().sum() - (carry["S"].to_dense() - before).square().sum())
    for i, tau in enumerate(taus):
        energy = sum(float(value.double().square().sum()) for key, value in tau.items() if is_matrix(key, value))
        assert found.whole.interference[i] == pytest.approx(cleared[i] / energy, abs=1e-6)
    assert found.whole.interference[0] == 0.0 and min(s for s in found.whole.interference[1:] if s) > 0.001
    assert found.layers[0].interference == (None, None, None)  # embeddings are no matrices


def test_spectra_are_the_singular_values(full: tuple[Path, list[Path]]) -> None:
    base, models = full
    found = hfmerge.inspect(recipe(base, models), matrices=["*layer.1*query*"])
    taus = changes(base, models)
    assert [(one.key, one.model) for one in found.spectra] == [
        ("encoder.layer.1.attention.self.query.weight", i) for i in range(3)
    ]
    for one in found.spectra:
        values = torch.linalg.svdvals(taus[one.model][one.key].double())
        shares = values.square().cumsum(0) / values.square().sum()
        assert one.values == pytest.approx(values.tolist(), rel=1e-6)
        assert one.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-6)
        assert one.energy[4] == pytest.approx(float(shares[3]), rel=1e-6)
        assert one.energy[64] == pytest.approx(1.0)
        assert one.rank90 == int((shares < 0.9).sum()) + 1


def test_factors_give_what_their_products_give(tmp_path: Path) -> None:
    model = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    base = tiny.save(model, tmp_path / "base")
    adapters = [tiny.adapter(tmp_path / f"a{seed}", tiny.attention(), seed) for seed in (1, 2, 3)]
    dense = []
    for i, folder in enumerate(adapters):
        held = tiny.tensors(folder)
        origin = tiny.tensors(base)
        for name in (name for name in held if "lora_A" in name):
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            origin[key] = origin[key] + 2.0 * held[name.replace("lora_A", "lora_B")] @ held[name]
        tiny.save(model, tmp_path / f"d{i}")
        tiny.edit(tmp_path / f"d{i}", lambda stored, wanted=origin: stored.update(wanted))
        dense.append(tmp_path / f"d{i}")
    low, full = hfmerge.inspect(recipe(base, adapters)), hfmerge.inspect(recipe(base, dense))
    for i in range(3):
        assert low.whole.norms[i] == pytest.approx(full.whole.norms[i], rel=1e-4)
        assert low.whole.cosine[i] == pytest.approx(full.whole.cosine[i], abs=1e-4)
        assert low.whole.interference[i] == pytest.approx(full.whole.interference[i], abs=1e-3)
        assert low.whole.sign_conflict[i] == pytest.approx(full.whole.sign_conflict[i], abs=0.01)
    assert max(one.rank90 for one in low.spectra) <= 2 and {len(one.values) for one in low.spectra} == {2}
    assert sum(part.elements for part in low.layers) == low.whole.elements == 4 * 16 * 16


@pytest.mark.slow
def test_reading_in_pieces_changes_nothing(full: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = full
    whole = hfmerge.inspect(recipe(base, models)).to_dict()
    monkeypatch.setattr(statistics, "HELD", 100)
    monkeypatch.setattr(statistics, "_TILE", 40)
    pieces = hfmerge.inspect(recipe(base, models)).to_dict()
    del whole["seconds"], pieces["seconds"]
    assert pieces == whole


@pytest.mark.slow
def test_two_processes_find_the_same(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = full
    saved = tmp_path / "found.json"
    command = ["-m", "hfmerge", "inspect", *map(str, models), "--base", str(base), "--output", str(saved)]
    output = launching.succeed(launching.crew(2, *command))
    assert output.count("cosine of task vectors") == 1
    alone = hfmerge.inspect(recipe(base, models)).to_dict()
    assert {**json.loads(saved.read_text()), "seconds": 0} == {**alone, "seconds": 0}


@pytest.mark.slow
def test_a_merge_is_inspected_by_its_ledger(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = full
    asked = recipe(base, models, alpha=0.3)
    hfmerge.merge(asked, output=tmp_path / "merged")
    found = tiny.done("inspect", tmp_path / "merged", "--json").json
    assert found["alpha"] == 0.3 and found["whole"] == hfmerge.inspect(asked).to_dict()["whole"]
    entry = hfmerge.inspect(asked).whole.norms
    ledger = open_merged(str(tmp_path / "merged")).last.models
    assert [(m.squared_norm or 0.0) ** 0.5 for m in ledger] == pytest.approx(entry, rel=1e-6)


def test_the_table_names_everything(full: tuple[Path, list[Path]]) -> None:
    base, models = full
    run = tiny.done("inspect", *models, "--base", base, "--no-spectra")
    assert "cosine of task vectors" in run.out and "encoder.layer.1" in run.out and "interference 0" not in run.out
    run = tiny.done("inspect", *models, "--base", base, "--option", "alpha=0.9")
    assert "OPCM alpha 0.9, code" in run.out and "spectra" in run.out
    assert "model  1 " in run.out  # the words that all names begin with are left out


def test_one_model_and_models_that_change_nothing(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = full
    alone = hfmerge.inspect(recipe(base, models[:1]))
    assert alone.whole.cosine == ((1.0,),) and alone.whole.interference == (0.0,) and alone.whole.cancelled == 0.0
    tiny.done("inspect", models[0], "--base", base)
    copy = tiny.save(tiny.build("BertModel", tiny.config("bert")), tmp_path / "copy")
    found = hfmerge.inspect(recipe(base, [models[0], copy]))
    assert found.whole.norms[1] == 0.0 and found.whole.cosine[0] == (1.0, None)
    assert found.whole.sign_conflict[0][1] is None and found.whole.interference[1] is None


def test_faults_are_named(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = full
    with pytest.raises(RecipeError, match=r"nothing\* match no matrix"):
        hfmerge.inspect(recipe(base, models), matrices=["nothing*"])
    broken = tiny.save(tiny.fine_tune(tiny.build("BertModel", tiny.config("bert")), 4), tmp_path / "broken")
    tiny.edit(broken, lambda stored: stored["pooler.dense.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match="pooler.dense.weight"):
        hfmerge.inspect(recipe(base, [models[0], broken]))
    assert "give its models and --base" in tiny.cli("inspect", base, "--option", "alpha=0.2").err


def test_layers_go_by_their_names() -> None:
    keys = ["model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.0.experts.3.b.weight"]
    keys += ["model.layers.10.a.weight", "model.norm.weight", "lm_head.weight", "bias"]
    found = by_layer([Measured(key, 1, (), (), (), (0.0, 0.0), (), ()) for key in keys])
    assert list(found) == ["model.embed_tokens", "model.layers.0", "model.layers.10", "model.norm", "lm_head", "bias"]
    assert len(found["model.layers.0"]) == 2
