"""OPCM: each new task vector is projected off the singular directions of the sum so far, then added.

Source: "Merging Models on the Fly Without Retraining", arXiv 2501.09522, section 4, in telescoped form: with
`S_1 = tau_1`, `S_t = S_{t-1} + P_{t-1}(tau_t)` the published model is `theta_0 + S_t * mean ||tau|| / ||S_t||`, norms
over all parameters, so that no scalar travels between steps and every parameter is visited once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hfmerge.methods.base import Carry, FoldMethod
from hfmerge.methods.declare import method
from hfmerge.methods.spectral import OpcmVariant, cleared, cleared_by_sketch
from hfmerge.task_vector import Core, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

Spectral = Literal["exact", "randomized"]


@method(
    "opcm",
    source="tang2025opcm",
    needs="matrix",
    laws=("identity_for_one", "scale_equivariant"),
    default_norm="mean",
)
@dataclass(frozen=True)
class OPCM(FoldMethod):
    """Orthogonal projection-based continual merging.

    With the singular value decomposition `S = U diag(s) V^T`, numerically zero means `s_i <= s_1 * eps * max(m, n)`,
    eps of float32, and `r` is the first index (from 0) at which the cumulative share of the sum of the others exceeds
    `alpha`.

    Variants (what is kept of an incoming matrix):
        code: all but the r x r leading block and the diagonal over the numerical rank.
        code-no-diagonal: all but the r x r leading block.
        paper: what is orthogonal to the first r directions on both sides, without the diagonal.

    `spectral: randomized` (see `spectral.py`) finds the block's space by a seeded sketch, to about 1 % of a change,
    and does not clear the diagonal beyond it, which is about 1/sqrt(max(m, n)) of one without special directions. What
    it makes of a run is measured on a sample of the matrices (`deviation`). It pays for large matrices: those of fewer
    than 256 rows or columns, and whatever a sketch cannot resolve, are computed exactly.

    Departures from the reference implementation, each because of a fault there: `alpha = 1` takes r = numerical
    rank instead of a random choice between all and nothing; a zero accumulator leaves the incoming change alone;
    the diagonal is cleared only where singular vectors are determined; vectors, embeddings and other non-matrices
    are all summed; tied tensors count once; arithmetic and the carried accumulator are float64 whatever the
    checkpoint's dtype, because clearing the diagonal multiplies rounding errors about threefold with every model.
    """

    alpha: float = field(
        default=0.5,
        metadata={"minimum": 0.0, "maximum": 1.0, "help": "share of the singular values whose block is cleared"},
    )
    variant: OpcmVariant = field(default="code", metadata={"help": "which components of a new task vector are kept"})
    spectral: Spectral = field(
        default="exact",
        metadata={"help": "randomized: faster for matrices of a thousand rows, and approximate"},
    )

    @property
    def projection(self) -> tuple[float, OpcmVariant]:
        return self.alpha, self.variant

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """`S + P(weight * tau)`; the first model and non-matrices are added as they are."""
        tau = tau.scaled(weight)
        if carry is None:
            return {"S": tau}
        total = carry["S"]
        if tau.is_zero:
            return carry
        if total.is_zero:
            return {"S": tau}
        if not matrix:
            return {"S": total + tau}
        core = Core.of(total, tau)
        projected = self._projected(core, self.spectral)
        # memory of its own, which is reused
        return {"S": core.lift(projected.add_(core.first) if projected.is_contiguous() else core.first + projected)}

    def unstep(self, carry: Carry, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """`S - weight * tau`: what later models were projected off is not given back, hence approximate."""
        return {"S": carry["S"].plus(tau, -weight)}

    def gap_bound(self, norms: Sequence[float], subtracted: Sequence[int]) -> float:
        """The norms from the first subtracted model on, together.

        Model k came in as `P_k(tau_k)`, of which `tau_k` is subtracted: off by at most `||tau_k||`, as a projection
        leaves no more than there was. Each later model t was projected off other directions than it would have been,
        and two orthogonal projections of one vector differ by at most its norm, `||tau_t||`.
        """
        return math.fsum(norms[min(subtracted) :])

    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """The accumulator itself; `norm: mean` makes it the published model."""
        return carry["S"]

    def deviation(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> float | None:
        """`||P(tau) - P_exact(tau)|| / ||tau||`; an exact decomposition is computed for it."""
        if self.spectral == "exact" or not matrix or carry is None or carry["S"].is_zero or tau.is_zero:
            return None
        core = Core.of(carry["S"], tau.scaled(weight))
        size = float(core.second.norm())
        if size == 0.0:
            return None
        return float((self._projected(core, self.spectral) - self._projected(core, "exact")).norm()) / size

    def _projected(self, core: Core, spectral: Spectral) -> Tensor:
        return project(core.first, core.second, core.shape, self.alpha, self.variant, spectral)


def project(
    total: Tensor,
    tau: Tensor,
    shape: tuple[int, int],
    alpha: float,
    variant: OpcmVariant,
    spectral: Spectral = "exact",
) -> Tensor:
    """P(tau): the part of `tau` that OPCM adds to the accumulator `total`.

    Args:
        total: accumulator, (m, n) or its core coordinates, float64.
        tau: incoming task vector in the same coordinates, float64.
        shape: of the full matrix, which sets the numerical rank.
        alpha: share of the sum of singular values.
        variant, spectral: see `OPCM`.

    Returns:
        The projected task vector, float64, in the same coordinates, in memory of its own.

    Raises:
        HfMergeError: the singular values of `total` do not converge.
    """
    if total.shape[0] < total.shape[1]:
        return project(total.T, tau.T, (shape[1], shape[0]), alpha, variant, spectral).T
    sketched = cleared_by_sketch(total, tau, shape, alpha, variant) if spectral == "randomized" else None
    return cleared(total, tau, shape, alpha, variant) if sketched is None else sketched
