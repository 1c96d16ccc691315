"""`norm: fit` and `fit-matrix`: the scale against its definition, its exactness, and `flat_gram`, which has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfmerge.methods import AdditiveFold, registry
from hfmerge.methods.fit import fit_products, fit_scale
from hfmerge.task_vector import Dense, LowRank, zero
from tests.fixtures import reference, tiny
from tests.methods.test_methods import gap, normal


def scale_of(changes: list[Tensor], taus: list[list[Tensor]], weights: list[float]) -> float:
    """The definition: over matrices and models, with `C_t` written out."""
    top = bottom = 0.0
    for change, own in zip(changes, taus, strict=True):
        for tau, weight in zip(own, weights, strict=True):
            c = tau.double().T @ tau.double() / tau.double().square().sum()
            top += weight * float(torch.trace(change.double() @ c @ tau.double().T))
            bottom += float(torch.trace(change.double() @ c @ change.double().T))
    return top / bottom


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 7), (7, 1)], ids=str)
def test_the_scale_is_its_definition_of_dense_changes_and_of_factors(shape: tuple[int, int]) -> None:
    m, n = shape
    weights = [1.0, 0.5, 2.0]
    factors = [LowRank(normal(i, m, k), normal(10 + i, k, n)) for i, k in enumerate((1, 2, 3))]
    dense = [Dense(normal(20 + i, m, n)) for i in range(3)]
    change = Dense(normal(30, m, n))
    for taus in (factors, dense, [Dense(tau.to_dense()) for tau in factors], [factors[0], dense[1], factors[2]]):
        found = fit_scale([fit_products(change, taus, weights)])
        expected = scale_of([change.value], [[tau.to_dense() for tau in taus]], weights)
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_scale_minimises_the_distance_to_all_models() -> None:
    taus, change = [normal(i, 7, 5).double() for i in range(3)], normal(9, 7, 5).double()

    def distance(c: float) -> float:
        return sum(float(((c * change - tau) @ tau.T).square().sum() / tau.square().sum()) for tau in taus)

    best = fit_scale([fit_products(Dense(change), [Dense(tau) for tau in taus], [1.0] * 3)])
    assert all(distance(best) < distance(best + step) for step in (-1e-2, -1e-4, 1e-4, 1e-2))


def test_what_answers_to_nothing_keeps_its_scale() -> None:
    assert fit_scale([]) == fit_scale([(0.0, 0.0)]) == 1.0
    tau, other = torch.zeros(4, 6), torch.zeros(4, 6)
    tau[:, :3], other[:, 3:] = normal(1, 4, 3), normal(2, 4, 3)
    assert fit_scale([fit_products(Dense(tau), [Dense(other)], [1.0])]) == 1.0
    assert fit_products(zero((4, 6)), [Dense(tau)], [1.0]) == (0.0, 0.0)
    absent = fit_products(Dense(tau), [Dense(tau), zero((4, 6)), Dense(torch.zeros(4, 6)), Dense(other)], [1, 1, 1, 0])
    assert absent == fit_products(Dense(tau), [Dense(tau)], [1.0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_flat_gram_is_its_formula(power: float, side: str) -> None:
    taus = [normal(i, 7, 5) for i in range(3)]
    method = registry()["flat_gram"](beta=0.3, side=side, power=power)  # type: ignore[call-arg]
    plain = registry()["gram"](beta=0.3, side=side)  # type: ignore[call-arg]
    assert isinstance(method, AdditiveFold) and isinstance(plain, AdditiveFold)
    carry = other = None
    for tau in taus:
        carry = method.step(carry, Dense(tau), 1.0, matrix=True)
        other = plain.step(other, Dense(tau), 1.0, matrix=True)
    assert carry is not None and other is not None
    u, s, vt = torch.linalg.svd(plain.emit(other, [1.0] * 3, matrix=True).to_dense(), full_matrices=False)
    change = method.emit(carry, [1.0] * 3, matrix=True)
    assert gap(change.to_dense(), u @ torch.diag(s**power) @ vt) < 1e-9
    # the scale minimises gram's own objective, of which gram is the minimum
    top, bottom = method.fit(carry, change, [1.0] * 3)  # type: ignore[misc]
    turned = [tau.double().T if side == "left" else tau.double() for tau in taus]
    dense = change.to_dense().T if side == "left" else change.to_dense()
    size = turned[0].shape[1]
    inputs = [tau.T @ tau / tau.square().sum() + 0.3 / size * torch.eye(size) for tau in turned]
    assert top == pytest.approx(
        sum(float(torch.trace(dense @ c @ tau.T)) for c, tau in zip(inputs, turned, strict=True)), rel=1e-6
    )
    assert bottom == pytest.approx(sum(float(torch.trace(dense @ c @ dense.T)) for c in inputs), rel=1e-6)
    if power == 1.0:
        assert top / bottom == pytest.approx(1.0, rel=1e-9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in (1, 2, 3):
        tiny.save(tiny.fine_tune(base, i, 0.01 * i), root / f"m{i}")
    tiny.adapter(root / "a0", tiny.attention(), 1, rank=2)
    return root


def merged(root: Path, out: Path, name: str, norm: str, *models: str) -> dict[str, Tensor]:
    sources = [root / model for model in models]
    tiny.done("merge", *sources, "--base", root / "base", "--method", name, "--norm", norm, "--output", out, "--quiet")
    return tiny.tensors(out)


def entry(folder: Path) -> Any:
    return json.loads(sorted((folder / "merge_history").glob("*.json"))[-1].read_text())


@pytest.mark.parametrize("name", ["linear", "opcm", "ties", "iso_c"])
def test_a_whole_merge_has_the_one_scale_of_all_its_matrices(name: str, root: Path, tmp_path: Path) -> None:
    models = ("m1", "m2", "a0")
    free = merged(root, tmp_path / "free", name, "none", *models)
    fitted = merged(root, tmp_path / "fit", name, "fit", *models)
    each = merged(root, tmp_path / "each", name, "fit-matrix", *models)
    base = tiny.tensors(root / "base")
    sources = [tiny.tensors(root / "m1"), tiny.tensors(root / "m2")]
    lora = merged(root, tmp_path / "lora", "linear", "none", "a0")
    matrices = [key for key in base if "_proj" in key or key == "lm_head.weight"]
    change = {key: (free[key] - base[key]).double() for key in base}
    taus = {key: [(one[key] - base[key]).double() for one in (*sources, lora)] for key in matrices}
    taus = {key: [tau for tau in own if float(tau.abs().max()) > 1e-6] for key, own in taus.items()}
    parts = {key: (change[key], own) for key, own in taus.items()}
    tops = {
        k: sum(float(torch.trace(d @ t.T @ t @ t.T) / t.square().sum()) for t in own) for k, (d, own) in parts.items()
    }
    bottoms = {
        k: sum(float((d @ t.T).square().sum() / t.square().sum()) for t in own) for k, (d, own) in parts.items()
    }
    scale = sum(tops.values()) / sum(bottoms.values())
    scalars = entry(tmp_path / "fit")["byproducts"]["scalars"]
    assert scalars["scale"] == pytest.approx(scale, rel=1e-4)
    for key in base:
        one = scale if key in matrices else 1.0
        torch.testing.assert_close((fitted[key] - base[key]).double(), one * change[key], rtol=1e-3, atol=2e-7)
        one = tops[key] / bottoms[key] if key in matrices else 1.0
        torch.testing.assert_close((each[key] - base[key]).double(), one * change[key], rtol=1e-3, atol=2e-7)
    norm = reference.model_norm(reference.difference(fitted, base))
    assert scalars["merged_norm"] == pytest.approx(norm, rel=1e-4)
    assert entry(tmp_path / "each")["byproducts"]["scalars"]["scale"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["fit", "fit-matrix"])
@pytest.mark.parametrize("name", ["flat_gram", "gram", "linear", "opcm", "dare_linear"])
def test_models_come_and_go_without_a_trace_in_the_scale(name: str, norm: str, root: Path, tmp_path: Path) -> None:
    merged(root, tmp_path / "way", name, norm, "m1", "m2", "a0")
    tiny.done("add", tmp_path / "way", root / "m3", "--quiet")
    tiny.done("unmerge", tmp_path / "way", "--remove", "m2", "--quiet")
    merged(root, tmp_path / "never", name, norm, "m1", "a0", "m3")
    assert tiny.files(tmp_path / "way", states=False) == tiny.files(tmp_path / "never", states=False)
    ours, theirs = (entry(tmp_path / one)["byproducts"]["scalars"] for one in ("way", "never"))
    assert ours == theirs
    assert "same bytes" in tiny.done("verify", tmp_path / "way", "--replay").out
