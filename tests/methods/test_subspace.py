"""`mdm_oc_subspace`: OPCM's projections, with weights that multiply what is left and change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfmerge.methods.mdm_oc_subspace import MdmOcSubspace
from hfmerge.methods.opcm import OPCM, project
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero


WEIGHTS = [0.7, -0.4, 0.0, 1.9]


def changes(kinds: str) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(5)

    def change(kind: str) -> TaskVector:
        up, down = torch.randn(12, 2, generator=generator), torch.randn(2, 9, generator=generator)
        return {"d": Dense(torch.randn(12, 9, generator=generator)), "l": LowRank(up, down), "z": zero((12, 9))}[kind]

    return [change(kind) for kind in kinds]


def merged(method: OPCM, taus: list[TaskVector], weights: list[float], *, matrix: bool = True) -> torch.Tensor:
    carry = None
    for tau, weight in zip(taus, weights, strict=True):
        carry = method.step(carry, tau, weight, matrix=matrix)
    assert carry is not None
    assert carry.keys() == method.carry_form((12, 9), [None] * len(taus), matrix=matrix).keys()
    return method.emit(carry, weights, matrix=matrix).to_dense()


OPTIONS: list[dict[str, Any]] = [{"variant": variant} for variant in ("code", "code-no-diagonal", "paper")]
OPTIONS += [{"alpha": 0.2}, {"alpha": 1.0}]


@pytest.mark.parametrize("kinds", ["dddd", "llll", "dlzd", "zlll"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equal_weights_give_what_opcm_gives(kinds: str, options: dict[str, Any]) -> None:
    taus = changes(kinds)
    found = merged(MdmOcSubspace(**options), taus, [1.0] * 4)
    wide = [tau.to(torch.float64) for tau in taus]
    torch.testing.assert_close(found, merged(OPCM(**options), wide, [1.0] * 4), rtol=1e-9, atol=1e-9)
    assert not torch.equal(merged(OPCM(**options), taus, WEIGHTS), merged(MdmOcSubspace(**options), taus, WEIGHTS))


@pytest.mark.parametrize("kinds", ["dddd", "llll", "ldld"])
def test_weights_multiply_what_the_projections_leave(kinds: str) -> None:
    taus = changes(kinds)
    total = taus[0].to(torch.float64).to_dense()
    expected = WEIGHTS[0] * total
    for tau, weight in zip(taus[1:], WEIGHTS[1:], strict=True):
        left = project(total, tau.to(torch.float64).to_dense(), (12, 9), 0.5, "code")
        total, expected = total + left, expected + weight * left
    torch.testing.assert_close(merged(MdmOcSubspace(), taus, WEIGHTS), expected, rtol=1e-6, atol=1e-7)


def test_what_is_no_matrix_is_a_weighted_sum() -> None:
    taus = changes("dddd")
    expected = sum(weight * tau.to(torch.float64).to_dense() for tau, weight in zip(taus, WEIGHTS, strict=True))
    torch.testing.assert_close(merged(MdmOcSubspace(), taus, WEIGHTS, matrix=False), expected)


def test_subtracting_is_off_by_no_more_than_is_said() -> None:
    taus, method = changes("dddd"), MdmOcSubspace()
    norms = [abs(weight) * tau.squared_norm() ** 0.5 for tau, weight in zip(taus, WEIGHTS, strict=True)]
    for model in range(4):
        carry = None
        for tau, weight in zip(taus, WEIGHTS, strict=True):
            carry = method.step(carry, tau, weight, matrix=True)
        assert carry is not None
        left = method.unstep(carry, taus[model], WEIGHTS[model], matrix=True)["W"].to_dense()
        others = [i for i in range(4) if i != model]
        never = merged(method, [taus[i] for i in others], [WEIGHTS[i] for i in others])
        assert float((left - never).norm()) <= method.gap_bound(norms, [model]) + 1e-9
