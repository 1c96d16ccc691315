"""MDM-OC-style merging against Gram-Schmidt written out: by block and over whole models, dense and as factors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hfmerge
from hfmerge.methods.mdm_oc import MdmOc, ModelProducts, Products, coefficients, gram
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero
from tests.fixtures import tiny


quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(taus: Sequence[Tensor]) -> list[Tensor]:
    """Gram-Schmidt in its modified form, twice over, on flattened float64 vectors; dependent ones become zero."""
    found: list[Tensor] = []
    for tau in taus:
        rest = tau.double().reshape(-1)
        for _ in range(2):
            for earlier in found:
                square = float(torch.dot(earlier, earlier))
                if square > 0.0:
                    rest = rest - float(torch.dot(rest, earlier)) / square * earlier
        if float(rest.norm()) <= 2.0**-20 * float(tau.double().norm()):
            rest = torch.zeros_like(rest)
        found.append(rest)
    return found


def expected(taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    parts = [weight * part for weight, part in zip(weights, orthogonal(taus), strict=True)]
    return torch.stack(parts).sum(0).reshape(taus[0].shape)


def combined(taus: Sequence[TaskVector], weights: Sequence[float], found: Sequence[float] | None = None) -> TaskVector:
    return MdmOc().combine(taus, weights, lambda: torch.zeros(taus[0].shape), found)


def gap(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


# --- one block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 2, 5, 9])
def test_it_is_gram_schmidt(models: int) -> None:
    common = normal(99, 12, 20)
    taus = [normal(i, 12, 20) + 0.6 * common for i in range(models)]
    weights = [(-0.7) ** i + 0.5 for i in range(models)]
    result = combined([Dense(tau) for tau in taus], weights).to_dense()
    assert result.dtype == torch.float32 and gap(result, expected(taus, weights)) < 2e-7
    # what each model adds is orthogonal to all before it
    found = gram([Dense(tau) for tau in taus])
    units = [[float(i == t) for i in range(models)] for t in range(models)]
    parts = [sum(c * tau.double() for c, tau in zip(coefficients(found, unit), taus, strict=True)) for unit in units]
    for t, part in enumerate(parts):
        for tau in taus[:t]:
            assert abs(float((part * tau).sum())) < 1e-10 * float(part.norm() * tau.norm())


def test_the_order_of_arrival_counts() -> None:
    common = normal(9, 30)
    taus = [Dense(normal(i, 30) + common) for i in range(3)]
    first, second = (combined(order, [1.0] * 3).to_dense() for order in (taus, taus[::-1]))
    assert gap(first, second.double()) > 0.1
    # the first keeps its own change, and nearly parallel directions count once: the sum is larger by far
    assert float(first.norm()) < 0.8 * float(sum(tau.value for tau in taus).norm())  # type: ignore[union-attr]


@pytest.mark.slow
@quick
@given(
    kinds=st.lists(st.sampled_from(["new", "zero", "twice", "sum", "same", "tiny"]), min_size=1, max_size=7),
    seed=st.integers(0, 2**20),
    low=st.booleans(),
)
def test_degenerate_changes(kinds: list[str], seed: int, low: bool) -> None:
    """Zero changes, copies, multiples and sums of earlier ones add nothing; nothing divides by zero."""
    m, n = 16, 12
    up, down = normal(seed, m, 60), normal(seed + 1, 60, n)
    # whole numbers, so that sums and multiples are exact
    up, down = (4 * up).round(), (4 * down).round()
    cuts: list[TaskVector] = []
    dependent = []
    for i, kind in enumerate(kinds):
        before = [cut for cut in cuts if not cut.is_zero]
        new = LowRank(up[:, i : i + 1], down[i : i + 1])
        if kind == "zero" or (kind not in ("new", "tiny") and not before):
            cuts.append(zero((m, n)))
        elif kind in ("new", "tiny"):
            cuts.append(new.scaled(2.0**-60) if kind == "tiny" else new)
        else:
            dependent.append(i)
            cuts.append({"twice": before[-1].scaled(-2.0), "same": before[0], "sum": before[0] + before[-1]}[kind])
    weights = [1.0 + 0.5 * i for i in range(len(cuts))]
    taus = cuts if low else [Dense(cut.to_dense()) for cut in cuts]
    found = gram(taus)
    result = combined(taus, weights).to_dense()
    wanted = expected([cut.to_dense() for cut in cuts], weights)
    assert bool(result.isfinite().all()) and gap(result, wanted) < 1e-6
    told = MdmOc().dependent(found)
    assert [i for i in told if found[i * len(taus) + i] > 0.0] == dependent


def test_one_element_is_for_the_first_model() -> None:
    taus = [Dense(torch.tensor([value])) for value in (0.0, 3.0, -2.0, 1e-8)]
    assert combined(taus, [1.0, 2.0, 5.0, 5.0]).to_dense().item() == 6.0
    assert MdmOc().dependent(gram(taus)) == (0, 2, 3)


def test_nearly_dependent_changes_keep_their_place_in_float64() -> None:
    """Coefficients of 1e4 cancel: float32 would leave an error of the size of the result."""
    first = normal(1, 4000)
    taus = [first, first + 1e-4 * normal(2, 4000), normal(3, 4000)]
    result = combined([Dense(tau) for tau in taus], [0.0, 1.0, 1.0]).to_dense()
    assert gap(result, expected(taus, [0.0, 1.0, 1.0])) < 1e-6


def test_factors_stay_factors() -> None:
    taus: list[TaskVector] = [LowRank(normal(i, 20, 3), normal(10 + i, 3, 14)) for i in range(4)]
    taus[1] = zero((20, 14))
    weights = [1.0, 2.0, 0.5, -1.0]
    result = combined(taus, weights)
    assert isinstance(result, LowRank) and result.rank == 9
    assert gap(result.to_dense(), expected([tau.to_dense() for tau in taus], weights)) < 1e-6
    # a rank that fills the matrix, and a dense change among them, make it dense
    wide = [LowRank(normal(i, 20, 5), normal(10 + i, 5, 14)) for i in range(3)]
    assert isinstance(combined(wide, [1.0] * 3), Dense)
    mixed = [taus[0], Dense(normal(7, 20, 14)), *taus[2:]]
    for some in (wide, mixed):
        dense = [tau.to_dense() for tau in some]
        assert gap(combined(some, [1.0] * len(some)).to_dense(), expected(dense, [1.0] * len(some))) < 1e-6
    assert combined([zero((20, 14))] * 2, [1.0, 1.0]).is_zero


@pytest.mark.slow
@quick
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12), models=st.integers(1, 4))
def test_products_do_not_depend_on_the_order_of_pieces(cuts: list[int], models: int) -> None:
    pieces = [[normal(100 * i + k, size, 3) for k in range(models)] for i, size in enumerate(cuts)]
    survey, turned = Products(models), Products(models)
    one, other, everything = ModelProducts(models), ModelProducts(models), ModelProducts(models)
    for i, piece in enumerate(pieces):
        survey.add(piece, lambda: torch.zeros(0))
        turned.add(pieces[-1 - i], lambda: torch.zeros(0))
        for measure in (everything, one if i % 2 else other):
            for found in measure.find([Dense(tau) for tau in piece]):
                measure.add(found)
    other.join(one)
    assert survey.settle() == turned.settle() == everything.settle() == other.settle()
    whole = gram([Dense(torch.cat(column)) for column in zip(*pieces, strict=True)])
    assert survey.settle() == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_what_is_not_a_number_counts_as_zero_in_products() -> None:
    bad = torch.tensor([1.0, math.nan, 2.0, math.inf])
    assert gram([Dense(bad), Dense(torch.ones(4))]) == [5.0, 3.0, 3.0, 4.0]


def test_the_bound_is_zero_for_the_last_model() -> None:
    method = MdmOc()
    assert method.gap_bound([1.0, 2.0, 4.0], (2,)) == 0.0
    assert method.gap_bound([1.0, 2.0, 4.0], (0,)) == 6.0
    assert method.gap_bound([1.0, 2.0, 4.0], (0, 1)) == 4.0


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which three tensors are large enough to be read tile by tile, and fine-tunes that share a drift."""
    root = tmp_path_factory.mktemp("models")
    large = {"vocab_size": 9000, "num_hidden_layers": 1}
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", **large))
    tiny.save(base, root / "base", max_shard_size="300KB")
    drift = tiny.fine_tune(base, 50, 0.04)
    for i in range(3):
        tiny.save(tiny.fine_tune(drift, i + 1), root / f"m{i}")
    targets = {name: shape for name, shape in tiny.attention().items() if ".0." in name}
    for i in range(3):
        tiny.adapter(root / f"a{i}", targets, i)
    return root


def recipe(root: Path, names: Sequence[str], weights: Sequence[Any] | None = None, **method: Any) -> Any:
    weights = [1.0] * len(names) if weights is None else weights
    models = [{"model": str(root / name), "weight": weight} for name, weight in zip(names, weights, strict=True)]
    data = {"base": str(root / "base"), "models": models, "method": {"name": "mdm_oc", **method}}
    return parse_recipe(data, "test")


def changes(root: Path, folder: Path) -> dict[str, Tensor]:
    base, model = tiny.tensors(root / "base"), tiny.tensors(folder)
    return {name: model[name] - base[name] for name in base}


def distance(a: Path, b: Path) -> float:
    first, second = tiny.tensors(a), tiny.tensors(b)
    return math.sqrt(sum(float((first[name].double() - second[name].double()).square().sum()) for name in first))


def entry(folder: Path, step: int = 2) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_history" / f"{step:04d}.json").read_bytes())
    return found


FULL = ("m0", "m1", "m2")
WEIGHTS = (0.8, -0.5, 1.2)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", 3.0])
def test_scopes_on_whole_models(root: Path, tmp_path: Path, norm: Any) -> None:
    """Tile by tile (no norm) or not: every matrix by itself, or all of them as one vector."""
    taus = [changes(root, root / name) for name in FULL]
    for scope in ("layer", "model"):
        out = tmp_path / scope
        result = hfmerge.merge(recipe(root, FULL, WEIGHTS, scope=scope, norm=norm), output=out)
        assert not [warning for warning in result.warnings if "combination" in warning]
        if scope == "layer":
            wanted = {name: expected([tau[name] for tau in taus], WEIGHTS) for name in taus[0]}
        else:
            flat = expected([torch.cat([value.reshape(-1) for value in tau.values()]) for tau in taus], WEIGHTS)
            pieces = flat.split([value.numel() for value in taus[0].values()])
            wanted = {name: p.reshape(taus[0][name].shape) for name, p in zip(taus[0], pieces, strict=True)}
        total = math.sqrt(sum(float(value.square().sum()) for value in wanted.values()))
        factor = 1.0 if norm == "none" else norm / total
        for name, found in changes(root, out).items():
            torch.testing.assert_close(found.double(), factor * wanted[name], rtol=1e-5, atol=1e-6)
        assert hfmerge.verify(out, replay=True).ok
    assert distance(tmp_path / "layer", tmp_path / "model") > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("names", [("a0", "a1", "a2"), ("m0", "a1", "m2"), ("a0", "m1", "a2")], ids=" ".join)
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_adapters_and_mixtures(root: Path, tmp_path: Path, names: tuple[str, ...], scope: str) -> None:
    """As full checkpoints of the same models would be merged."""
    base = tiny.tensors(root / "base")
    taus = []
    for name in names:
        if name.startswith("m"):
            taus.append(changes(root, root / name))
            continue
        hfmerge.merge(recipe(root, [name]), output=tmp_path / name)
        # of one model the merge is that model, to the output's rounding
        taus.append(changes(root, tmp_path / name))
    out = tmp_path / "out"
    hfmerge.merge(recipe(root, names, WEIGHTS, scope=scope), output=out)
    flat = [torch.cat([value.reshape(-1) for value in tau.values()]) for tau in taus]
    pieces = expected(flat, WEIGHTS).split([value.numel() for value in base.values()])
    for (name, found), piece in zip(changes(root, out).items(), pieces, strict=True):
        wanted = expected([tau[name] for tau in taus], WEIGHTS) if scope == "layer" else piece.reshape(found.shape)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("names", [FULL, ("m0", "a1", "m2")], ids=" ".join)
def test_taking_a_model_out_gives_the_bytes_without_it(
    root: Path, tmp_path: Path, names: tuple[str, ...], scope: str
) -> None:
    out = tmp_path / "out"
    hfmerge.merge(recipe(root, names, WEIGHTS, scope=scope), output=out)
    hfmerge.unmerge(out, names[1])
    hfmerge.merge(recipe(root, names[::2], WEIGHTS[::2], scope=scope), output=tmp_path / "never")
    assert tiny.files(out) == tiny.files(tmp_path / "never")
    assert "needs all models at once" in entry(out)["action"]["how"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_subtracting_is_the_sum_without_that_model(root: Path, tmp_path: Path, scope: str) -> None:
    """`theta - a_k d_k`; the gap to never merged is measured, bounded, and none for the last model."""
    every = tmp_path / "every"
    hfmerge.merge(recipe(root, FULL, WEIGHTS, scope=scope), output=every)
    gaps = {}
    for k, name in enumerate(FULL):
        out, never = tmp_path / f"out-{name}", tmp_path / f"never-{name}"
        run = tiny.done("unmerge", every, "--remove", name, "--mode", "subtract", "--measure", "--output", out)
        assert "NOT a removal" in run.out and "a part of each stays in the weights" in run.out
        left = [weight if i != k else 0.0 for i, weight in enumerate(WEIGHTS)]
        hfmerge.merge(recipe(root, FULL, left, scope=scope), output=tmp_path / f"zero-{name}")
        assert tiny.files(out) == tiny.files(tmp_path / f"zero-{name}")
        told = entry(out)
        materials = {model["name"]: model for model in told["materials"]["models"]}
        assert list(materials) == list(FULL) and [n for n, one in materials.items() if "subtracted" in one] == [name]
        assert materials[name]["weight"] == WEIGHTS[k]
        assert hfmerge.verify(out, replay=True).ok
        rest = [(other, weight) for other, weight in zip(FULL, WEIGHTS, strict=True) if other != name]
        hfmerge.merge(recipe(root, *zip(*rest, strict=True), scope=scope), output=never)  # type: ignore[arg-type]
        true = distance(out, never) / distance(root / "base", never)
        gaps[name] = told["byproducts"]["scalars"]
        assert gaps[name]["gap"] == pytest.approx(true, rel=1e-3, abs=1e-9)
        # what was subtracted can still be taken out
        hfmerge.unmerge(out, name)
        assert tiny.files(out) == tiny.files(never)
    assert gaps["m2"]["gap"] == gaps["m2"]["gap_bound"] == 0.0
    for name in ("m0", "m1"):
        assert 0.01 < gaps[name]["gap"] < gaps[name]["gap_bound"]


def test_the_gap_of_the_first_of_two_is_the_cosine(root: Path, tmp_path: Path) -> None:
    """Over the whole model: `d_2` misses the part of `tau_2` along `tau_1`, `|cos|` of its norm."""
    out = tmp_path / "out"
    hfmerge.merge(recipe(root, ("m0", "m1"), scope="model"), output=out)
    tiny.done("unmerge", out, "--remove", "m0", "--mode", "subtract", "--measure")
    first, second = (
        torch.cat([value.double().reshape(-1) for value in changes(root, root / name).values()])
        for name in ("m0", "m1")
    )
    cosine = float(torch.dot(first, second) / first.norm() / second.norm())
    assert entry(out)["byproducts"]["scalars"]["gap"] == pytest.approx(abs(cosine), rel=1e-3)


@pytest.mark.slow
def test_models_can_be_added_after_a_subtraction(root: Path, tmp_path: Path) -> None:
    """What comes later is made orthogonal to the subtracted model as well; a certificate is refused."""
    out = tmp_path / "out"
    hfmerge.merge(recipe(root, FULL[:2], WEIGHTS[:2]), output=out)
    tiny.done("unmerge", out, "--remove", "m0", "--mode", "subtract")
    tiny.done("add", out, root / "m2", "--weight", WEIGHTS[2])
    hfmerge.merge(recipe(root, FULL, (0.0, *WEIGHTS[1:])), output=tmp_path / "zero")
    assert tiny.files(out) == tiny.files(tmp_path / "zero")
    refused = tiny.cli("certify", out, "--remove", "m0", "--output", tmp_path / "certificate.json")
    assert refused.code == 1 and "still in" in refused.err


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_dependent_model_is_left_out_with_one_warning(root: Path, tmp_path: Path, scope: str) -> None:
    import shutil

    shutil.copytree(root / "m0", tmp_path / "copy")
    names = ("m0", "m1", str(tmp_path / "copy"))
    result = hfmerge.merge(recipe(root, names, scope=scope), output=tmp_path / "out")
    hfmerge.merge(recipe(root, names[:2], scope=scope), output=tmp_path / "without")
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "without")
    count = len(tiny.tensors(root / "base"))
    said = [warning for warning in result.warnings if "combination" in warning]
    assert len(said) == 1 and "copy" in said[0] and f"in {count} parameters" in said[0]


def test_learned_weights_by_pattern_are_coefficients_of_each_part(root: Path, tmp_path: Path) -> None:
    weights = [{"*.self_attn.*": 0.3, "*": 1.0}, 1.0, {"*.mlp.*": -1.0, "*": 0.5}]
    hfmerge.merge(recipe(root, FULL, weights), output=tmp_path / "out")
    taus = [changes(root, root / name) for name in FULL]
    for name, found in changes(root, tmp_path / "out").items():
        given = (0.3 if ".self_attn." in name else 1.0, 1.0, -1.0 if ".mlp." in name else 0.5)
        wanted = expected([tau[name] for tau in taus], given)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_models_that_do_not_touch_a_parameter_say_nothing(root: Path, tmp_path: Path) -> None:
    result = hfmerge.merge(recipe(root, ("a0", "a1", "a2")), output=tmp_path / "out")
    assert not [warning for warning in result.warnings if "combination" in warning]
    planned = hfmerge.plan(recipe(root, ("a0", "a1", "a2")))
    assert isinstance(planned.method, MdmOc) and dataclasses.asdict(planned.method) == {"scope": "layer"}
