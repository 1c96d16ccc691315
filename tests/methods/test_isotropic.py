"""`mdm_oc_iso`: each model's share of the isotropic merge, which weights multiply without changing the directions."""

from __future__ import annotations

import pytest
import torch

from hfmerge.methods import AdditiveFold, Carry
from hfmerge.methods.isotropic import IsoC, MdmOcIso
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero


WEIGHTS = [0.7, -0.4, 0.0, 1.9]
SHAPES = [(12, 9), (9, 12), (3, 40)]


def changes(kinds: str, shape: tuple[int, int]) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(5)

    def change(kind: str) -> TaskVector:
        if kind == "z":
            return zero(shape)
        if kind == "d":
            return Dense(torch.randn(shape, generator=generator))
        return LowRank(torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator))

    return [change(kind) for kind in kinds]


def merged(method: AdditiveFold, taus: list[TaskVector], weights: list[float], *, matrix: bool = True) -> torch.Tensor:
    carry: Carry | None = None
    for tau, weight in zip(taus, weights, strict=True):
        carry = method.step(carry, tau, weight, matrix=matrix)
    assert carry is not None
    ranks = [tau.rank if isinstance(tau, LowRank) else None for tau in taus]
    form = method.carry_form(taus[0].shape, ranks, matrix=matrix)
    assert {name: value.shape for name, value in carry.items()} == {name: one.shape for name, one in form.items()}
    return method.emit(carry, weights, matrix=matrix).to_dense()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", ["dddd", "llll", "dlzd", "zlll", "lz", "d"])
def test_equal_weights_give_what_iso_c_gives(kinds: str, shape: tuple[int, int]) -> None:
    taus = changes(kinds, shape)
    found = merged(MdmOcIso(), taus, [1.0] * len(taus))
    torch.testing.assert_close(found, merged(IsoC(), taus, [1.0] * len(taus)), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", ["dddd", "llll", "ldld", "lzll"])
def test_weights_multiply_shares_of_the_isotropic_merge(kinds: str, shape: tuple[int, int]) -> None:
    taus = changes(kinds, shape)
    _, s, vt = torch.linalg.svd(sum(tau.to(torch.float64).to_dense() for tau in taus), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    root = (vt[:rank].T / s[:rank]) @ vt[:rank] * s[:rank].mean()
    expected = sum(w * tau.to(torch.float64).to_dense() @ root for w, tau in zip(WEIGHTS, taus, strict=True))
    torch.testing.assert_close(merged(MdmOcIso(), taus, WEIGHTS), expected, rtol=1e-5, atol=3e-6)


def test_what_is_no_matrix_is_a_weighted_mean() -> None:
    taus = changes("dddd", (12, 9))
    expected = sum(w * tau.to(torch.float64).to_dense() for w, tau in zip(WEIGHTS, taus, strict=True)) / 4.0
    torch.testing.assert_close(merged(MdmOcIso(), taus, WEIGHTS, matrix=False), expected, rtol=1e-5, atol=3e-6)


def test_a_matrix_that_nobody_changes_stays() -> None:
    assert not merged(MdmOcIso(), [zero((12, 9))] * 2, [1.0, 0.5]).any()
    nothing: list[TaskVector] = [Dense(torch.zeros(12, 9))] * 2
    assert not merged(MdmOcIso(), nothing, [1.0, 0.5]).any()
