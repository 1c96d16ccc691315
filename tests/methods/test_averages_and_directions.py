"""Methods that merge lengths and directions, against transcriptions of their sources, and their bad inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfmerge.methods import registry
from hfmerge.methods.spheres import OfModels
from hfmerge.task_vector import Dense, LowRank, zero
from tests.fixtures import reference, tiny
from tests.methods.test_methods import SHAPES, apply, fine_tunes, gap, normal


EQUAL, UNEQUAL = (1.0, 1.0, 1.0), (0.5, 2.0, 1.0)


def made(name: str, **options: Any) -> Any:
    return registry()[name](**options)


def near(*shape: int) -> list[Tensor]:
    """Changes that agree in part, so that their mean cosine is well above 0."""
    return [normal(9, *shape) + 0.8 * normal(20 + i, *shape) for i in range(3)]


def test_model_stock_is_what_the_paper_says() -> None:
    taus = near(12, 7)
    result = apply(made("model_stock"), [Dense(tau) for tau in taus])
    assert gap(result, reference.model_stock(taus)) < 1e-6
    rows = apply(made("model_stock", filter_wise=True), [Dense(tau) for tau in taus])
    for row in range(12):
        assert gap(rows[row], reference.model_stock([tau[row] for tau in taus])) < 1e-5
    vector = [Dense(tau[0]) for tau in taus]
    whole = apply(made("model_stock"), vector, matrix=False)
    assert torch.equal(apply(made("model_stock", filter_wise=True), vector, matrix=False), whole)


def test_model_stock_keeps_the_base_where_changes_point_apart() -> None:
    tau = normal(1, 6, 5)
    for others in ([-tau], [-0.5 * tau, torch.zeros(6, 5)]):
        for by_filter in (False, True):
            taus = [Dense(tau), *map(Dense, others)]
            assert not apply(made("model_stock", filter_wise=by_filter), taus).any()


@pytest.mark.parametrize("t", [0.25, 0.5, 0.8])
def test_nuslerp_is_slerp_between_changes(t: float) -> None:
    first, second = normal(1, 9, 6), normal(2, 9, 6)
    for by, parts in (("tensor", [(slice(None), slice(None))]), ("row", [(i, slice(None)) for i in range(9)]),
                      ("column", [(slice(None), j) for j in range(6)])):  # fmt: skip
        result = apply(made("nuslerp", by=by), [Dense(first), Dense(second)], (1.0 - t, t))
        for part in parts:
            assert gap(result[part], reference.slerp(first[part], second[part], t)) < 1e-5


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL, (1.0, -0.4, 2.0)], ids=str)
def test_multislerp_is_what_its_tool_says(weights: tuple[float, ...]) -> None:
    taus = [(1.0 + i) * normal(20 + i, 12, 7) for i in range(3)]
    result = apply(made("multislerp"), [Dense(tau) for tau in taus], weights)
    assert gap(result, reference.multislerp(taus, weights)) < 1e-6


def test_multislerp_averages_where_directions_cancel() -> None:
    tau = normal(1, 6, 5)
    assert gap(apply(made("multislerp"), [Dense(tau), Dense(-3.0 * tau)]), -tau) < 1e-6


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=str)
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_karcher_is_the_mean_on_the_sphere(size: float, weights: tuple[float, ...]) -> None:
    base = normal(5, 12, 7)
    models = [base + size * normal(6 + i, 12, 7) for i in range(3)]
    change = apply(made("karcher"), [Dense(model - base) for model in models], weights, base)
    assert gap(change, reference.karcher(models, weights) - base.double()) < 1e-5


def test_karcher_of_two_is_their_middle_on_the_circle() -> None:
    base, (first, second) = fine_tunes(3, 2, 9, 6)
    second = second * (first.norm() / second.norm())
    middle = base + apply(made("karcher"), [Dense(first - base), Dense(second - base)], base=base)
    assert gap(middle, reference.slerp(first, second, 0.5)) < 1e-5


def test_karcher_averages_what_has_no_mean() -> None:
    base, first = torch.zeros(6, 5), normal(1, 6, 5)
    for second in (-first, -2.0 * first):
        result = apply(made("karcher"), [Dense(first), Dense(second)], base=base)
        assert gap(result + 1.0, (first + second) / 2 + 1.0) < 1e-6
    # a model that is zero takes no part in the direction, and counts in the length
    result = apply(made("karcher"), [Dense(first), Dense(torch.zeros(6, 5))], base=base)
    assert gap(result, first / 2) < 1e-6


def test_inner_products_of_models_do_not_depend_on_the_cut() -> None:
    base, taus = normal(1, 40, 6), [normal(2 + i, 40, 6) for i in range(3)]
    whole = OfModels(3)
    whole.add(taus, lambda: base)
    cut = OfModels(3)
    for at in range(0, 40, 16):
        cut.add([tau[at : at + 16] for tau in taus], lambda at=at: base[at : at + 16])  # type: ignore[misc]
    assert cut.settle() == pytest.approx(whole.settle(), rel=1e-12)
    models = [(base + tau).double().reshape(-1) for tau in taus]
    assert whole.settle() == pytest.approx([float(a @ b) for a in models for b in models], rel=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.3, 10.0])
def test_nearswap_is_the_interpolation_of_its_source(t: float) -> None:
    base, (model,) = fine_tunes(7, 1, 9, 6)
    change = apply(made("nearswap", t=t), [Dense(model - base)])
    assert float((base + change - reference.nearswap(base, model, t)).abs().max()) < 1e-6
    both = apply(made("nearswap", t=t), [Dense(model - base)] * 2, (1.0, -0.25))
    torch.testing.assert_close(both, 0.75 * change)


@pytest.mark.parametrize("size", [0.3, 1e-3])
def test_arcee_fusion_keeps_what_its_source_keeps(size: float) -> None:
    base = normal(1, 14, 11)
    model = base + size * normal(2, 14, 11)
    change = apply(made("arcee_fusion"), [Dense(model - base)], base=base)
    expected = reference.arcee_fusion(base, base + (model - base), 1.5) - base.double()
    assert 0 < int((expected != 0.0).sum()) < expected.numel() / 2
    assert float((change - expected).abs().max()) < 1e-6


def test_ema_is_the_moving_average_of_the_models() -> None:
    base, models = fine_tunes(4, 4, 9, 6)
    for decay in (0.0, 0.5, 0.9, 1.0):
        change = apply(made("ema", decay=decay), [Dense(model - base) for model in models])
        assert float((change - reference.ema(base, models, decay)).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_tsv_m_is_algorithm_1(shape: tuple[int, int]) -> None:
    taus = [normal(20 + i, *shape) for i in range(3)]
    result = apply(made("tsv_m", scale=0.7), [Dense(tau) for tau in taus])
    assert gap(result, 0.7 * reference.tsv_merge(taus)) < 1e-6
    mean = apply(made("tsv_m", scale=0.7), [Dense(tau) for tau in taus], matrix=False)
    assert gap(mean, 0.7 * sum(taus) / 3) < 1e-6


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_iso_cts_is_algorithm_2(shape: tuple[int, int], common: float) -> None:
    taus = [normal(20 + i, *shape) for i in range(3)]
    result = apply(made("iso_cts", common=common, scale=0.7), [Dense(tau) for tau in taus])
    assert gap(result, 0.7 * reference.iso_cts(taus, common)) < 1e-6
    if common == 1.0:
        assert gap(result, apply(made("iso_c", scale=0.7), [Dense(tau) for tau in taus])) < 1e-6


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_null_filter_is_its_formula(shape: tuple[int, int]) -> None:
    taus = [normal(20 + i, *shape) for i in range(4)]
    for share, count in ((0.34, 3), (0.0001, 1)):
        result = apply(made("null_filter", share=share), [Dense(tau) for tau in taus])
        assert gap(result, reference.null_filter(taus, count)) < 1e-6
    plain = apply(made("null_filter", share=0.0), [Dense(tau) for tau in taus])
    assert gap(plain, sum(tau.double() for tau in taus)) < 1e-6
    low = [LowRank(normal(i, shape[0], 2), normal(9 + i, 2, shape[1])) for i in range(3)]
    method = made("null_filter", share=0.34)
    carry = None
    for tau in low:
        carry = method.step(carry, tau, 1.0, matrix=True)
    assert isinstance(carry["S"], LowRank) and carry["S"].rank == 6
    assert gap(carry["S"].to_dense(), apply(method, [Dense(tau.to_dense()) for tau in low])) < 1e-6


NEW = (
    *("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "magmax"),
    *("consensus_ta", "model_stock", "nuslerp", "multislerp", "karcher", "nearswap", "arcee_fusion", "ema"),
    *("tsv_m", "iso_cts", "null_filter", "gram"),
)


@pytest.mark.parametrize("name", NEW)
def test_degenerate_inputs_give_a_finite_merge(name: str) -> None:
    """Singular Gram matrices, opposite and identical models, zero changes, matrices of one row, vectors of one."""
    method = registry()[name]()
    for shape in (*SHAPES, (1, 40), (40, 1)):
        tau, other = normal(1, *shape), normal(2, *shape)
        for taus in ([tau, -tau], [tau, tau.clone()], [tau, 1e-12 * other], [tau, 2.0 * tau], [zero(shape), tau]):
            given = [one if isinstance(one, LowRank) else Dense(one) for one in taus]
            for matrix in (True, False):
                result = apply(method, given, matrix=matrix)
                assert tuple(result.shape) == shape and bool(result.isfinite().all())
                assert float(result.norm()) <= 8.0 * float(tau.norm()) + 1e-6


def test_two_models_are_asked_for_where_one_makes_no_sense(tmp_path: Path) -> None:
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "a")
    for name, words in (("model_stock", "at least 2 models, 1 given"), ("nuslerp", "exactly 2 models, 1 given")):
        failed = tiny.cli("plan", tmp_path / "a", "--base", tmp_path / "base", "--method", name)
        assert failed.code == 1 and f"{name} takes {words}" in failed.err
    assert math.isfinite(float(apply(made("karcher"), [Dense(normal(1, 3, 3))]).norm()))
