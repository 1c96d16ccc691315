"""Null-space filter: a new change keeps what does not answer to the inputs that the merge so far speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfmerge.methods.base import Carry, FoldMethod
from hfmerge.methods.declare import method
from hfmerge.methods.spectral import directions
from hfmerge.task_vector import Dense, LowRank, TaskVector


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "null_filter",
    source="qiu2025nufilt",
    needs="matrix",
    laws=("identity_for_one", "scale_equivariant"),
)
@dataclass(frozen=True)
class NullFilter(FoldMethod):
    """A sum of changes, each without what answers to the inputs that the sum so far answers to most.

    `S_1 = w_1 tau_1`, `S_t = S_{t-1} + w_t tau_t (I - V V^T)`; the merged change is `S_T`. The columns of V are the
    first right singular vectors of `S_{t-1}`, a `share` of the smaller side's number of them, at most as many as its
    numerical rank. Right singular vectors span the inputs that a change answers to; so the merge keeps its answers to
    the strongest of them. What is no matrix is summed.

    Source: the null-space filter of NUFILT, arXiv 2509.21413, alone: without the adapter that the paper trains
    afterwards. Departures: the paper keeps 128 directions of every matrix, which is the default's share of 768; the
    weights, which it does not have. The state is float64, and stays factors while all models are adapters.
    """

    share: float = field(
        default=0.1667,
        metadata={
            "minimum": 0.0,
            "maximum": 1.0,
            "help": "share of a matrix's directions, the strongest so far, that a new change leaves alone",
        },
    )

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """The sum with what is left of one more change."""
        import torch

        own = tau.to(torch.float64).scaled(weight)
        if carry is None:
            return {"S": own}
        total = carry["S"]
        if not matrix or total.is_zero or own.is_zero:
            return {"S": total + own}
        kept = _rows_of(total)[:, : max(1, round(self.share * min(total.shape)))] if self.share > 0.0 else None
        if kept is None or not kept.shape[1]:
            return {"S": total + own}
        if isinstance(own, LowRank):
            return {"S": total + LowRank(own.up, own.down - (own.down @ kept) @ kept.T)}
        dense = own.to_dense()
        return {"S": total + Dense(dense - (dense @ kept) @ kept.T)}

    def unstep(self, carry: Carry, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """`S - weight * tau`: what was filtered out of it and of later changes is not given back."""
        return {"S": carry["S"].plus(tau, -weight)}

    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """The sum itself."""
        return carry["S"]


def _rows_of(total: TaskVector) -> Tensor:
    """Right singular vectors (n, rank) of a change, strongest first; float64."""
    import torch

    if not isinstance(total, LowRank):
        return directions(total.to_dense().double())[0]
    upper = torch.linalg.qr(total.up.double(), mode="r")[1]
    return directions(upper @ total.down.double())[0]
