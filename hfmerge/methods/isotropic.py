"""Isotropic merging: the sum of all changes with its directions made equally strong, by given or by learned weights.

Both methods keep sums over models only, so a model joins at the cost of one and leaves exactly (see `exact_sum`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hfmerge.methods.declare import method
from hfmerge.methods.exact_sum import AdditiveFold
from hfmerge.methods.spectral import directions, polar
from hfmerge.task_vector import Dense, LowRank, TaskVector


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "iso_c",
    source="marczak2025no",
    needs="matrix",
    laws=("order_free", "scale_equivariant"),
    normalises_weights=True,
)
@dataclass(frozen=True)
class IsoC(AdditiveFold):
    """The sum of task vectors with all its singular values replaced by their mean.

    `scale * mean(s) * U V^T` of `sum w_t tau_t = U diag(s) V^T` for a matrix, over the numerical rank
    (`s_i > s_1 * eps * max(m, n)`, eps of float32), as directions beyond it are nobody's; else
    `scale * sum w_t tau_t / T`. Weights are scaled to a mean of 1.

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", arXiv 2502.04959.
    Departure: directions and mean are those of the numerical rank, so that adapters can be merged; there the rank is
    full.
    """

    scale: float = field(default=1.0, metadata={"help": "factor of the merged task vector"})

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """See the class."""
        total = sums["S"] * (len(weights) / math.fsum(weights))
        if not matrix:
            return total * (self.scale / len(weights))
        isotropic, singular = polar(total)
        return isotropic * (self.scale * _mean(singular))


@method(
    "mdm_oc_iso",
    source=("mdmoc2025", "marczak2025no"),
    needs="matrix",
    laws=("order_free", "scale_equivariant", "linear_in_weights"),
)
@dataclass(frozen=True)
class MdmOcIso(AdditiveFold):
    """MDM-OC-style: `sum_t a_t d_t` with `d_t = mean(s) tau_t (S^T S)^(-1/2)`, each model's share of `iso_c`.

    For a matrix (out, in), `S = sum tau_t = U diag(s) V^T` is the sum of all changes, without weights, and its inverse
    root is taken over the numerical rank (see `IsoC`): `d_t = mean(s) tau_t V diag(1/s) V^T`. What is no matrix adds
    `d_t = tau_t / T`. The weights `a_t`, given or learned, do not change the directions, so the merged change is
    linear in them; all equal to 1 it is that of `iso_c`.

    Source: the weighted sum of orthogonalised changes of arXiv 2507.20997 with the isotropic directions of
    arXiv 2502.04959 in the place of Gram-Schmidt; putting them together is ours.

    The state of a matrix is one sum with twice its rows: weighted changes above changes without weights. So are the
    factors of an adapter kept.
    """

    learnable: ClassVar[bool] = True
    in_parts: ClassVar[bool] = True

    def taken(self, tau: TaskVector, weight: float, *, matrix: bool) -> TaskVector:
        """The weighted change above the change itself: (2 out, in) for a matrix."""
        import torch

        weighted = tau.scaled(weight)
        if not matrix:
            return weighted
        if isinstance(tau, LowRank) and isinstance(weighted, LowRank):
            return LowRank(torch.cat([weighted.up, tau.up]), tau.down)
        return Dense(torch.cat([weighted.to_dense(), tau.to_dense()]))

    def sum_shapes(self, shape: tuple[int, ...], *, matrix: bool) -> dict[str, tuple[int, ...]]:
        return {"S": (2 * shape[0], shape[1]) if matrix else shape}

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """See the class."""
        if not matrix:
            return sums["S"] / len(weights)
        weighted, plain = sums["S"].chunk(2)
        return self._turned(weighted, *directions(plain))

    def parts(self, taus: Sequence[TaskVector], *, matrix: bool) -> list[TaskVector]:
        """See `MergeMethod.parts`; float32."""
        import torch

        if not matrix:
            return [tau.scaled(1.0 / len(taus)) for tau in taus]
        total = torch.zeros(taus[0].shape, dtype=torch.float64)
        for tau in taus:
            total += tau.to(torch.float64).to_dense()
        found = directions(total)
        return [
            LowRank(tau.up, self._turned(tau.down.double(), *found).float())
            if isinstance(tau, LowRank)
            else Dense(self._turned(tau.to_dense().double(), *found).float())
            for tau in taus
        ]

    def usual_weight(self, models: int) -> float:
        """With which it is `iso_c`."""
        return 1.0

    def _turned(self, rows: Tensor, v: Tensor, singular: Tensor) -> Tensor:
        """`mean(s) rows V diag(1/s) V^T`: any rows (k, in), float64."""
        return ((rows @ v) * (_mean(singular) / singular)) @ v.T


def _mean(singular: Tensor) -> float:
    """Mean singular value, 0 where none counts."""
    return float(singular.mean()) if len(singular) else 0.0
