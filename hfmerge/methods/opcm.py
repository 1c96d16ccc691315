"""OPCM: each new task vector is projected off the singular directions of the sum so far, then added.

Source: "Merging Models on the Fly Without Retraining", arXiv 2501.09522, section 4, in telescoped form: with
`S_1 = tau_1`, `S_t = S_{t-1} + P_{t-1}(tau_t)` the published model is `theta_0 + S_t * mean ||tau|| / ||S_t||`, norms
over all parameters, so that no scalar travels between steps and every parameter is visited once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from hfmerge.methods.base import Carry, Citation, FoldMethod
from hfmerge.taskvector import Core, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

EPS = 2.0**-23
"""Machine epsilon of float32, the greatest precision a direction of a checkpoint can be trusted to."""

Variant = Literal["code", "code-no-diagonal", "paper"]


@dataclass(frozen=True)
class OPCM(FoldMethod):
    """Orthogonal projection-based continual merging.

    With the singular value decomposition `S = U diag(s) V^T`, `r` is the first index (from 0) whose cumulative
    share of `sum(s)` exceeds `alpha`, and numerically zero means `s_i <= s_1 * eps * max(m, n)`, eps of float32.

    Variants (what is kept of an incoming matrix):
        code: all but the r x r leading block and the diagonal over the numerical rank.
        code-no-diagonal: all but the r x r leading block.
        paper: what is orthogonal to the first r directions on both sides, without the diagonal.

    Departures from the reference implementation, each because of a fault there: `alpha = 1` takes r = numerical
    rank instead of a random choice between all and nothing; a zero accumulator leaves the incoming change alone;
    the diagonal is cleared only where singular vectors are determined; vectors, embeddings and other non-matrices
    are all summed; tied tensors count once; arithmetic and the carried accumulator are float64 whatever the
    checkpoint's dtype, because clearing the diagonal multiplies rounding errors about threefold with every model.
    """

    name: ClassVar[str] = "opcm"
    default_norm: ClassVar[str] = "mean"
    matrixwise: ClassVar[bool] = True
    carry_dtype: ClassVar[str] = "F64"
    citations: ClassVar[tuple[Citation, ...]] = (
        Citation(
            "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
            "https://arxiv.org/abs/2501.09522",
            "@article{tang2025opcm,\n"
            "  title   = {Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual "
            "Model Merging},\n"
            "  author  = {Anke Tang and Enneng Yang and Li Shen and Yong Luo and Han Hu and Bo Du and Dacheng Tao},\n"
            "  journal = {arXiv preprint arXiv:2501.09522},\n  year    = {2025}\n}",
        ),
    )

    alpha: float = field(
        default=0.5,
        metadata={"minimum": 0.0, "maximum": 1.0, "help": "share of the singular values whose block is cleared"},
    )
    variant: Variant = field(default="code", metadata={"help": "which components of a new task vector are kept"})

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
        return {"S": core.lift(core.first + project(core.first, core.second, core.shape, self.alpha, self.variant))}

    def emit(self, carry: Carry, weights: Sequence[float]) -> TaskVector:
        """The accumulator itself; `norm: mean` makes it the published model."""
        return carry["S"]


def project(total: Tensor, tau: Tensor, shape: tuple[int, int], alpha: float, variant: Variant) -> Tensor:
    """P(tau): the part of `tau` that OPCM adds to the accumulator `total`.

    Only the eigenvectors of the smaller Gram matrix are computed. In float64 its round-off, eps64 * s_1^2, stays below
    every s_i^2 above the numerical rank, which is taken at the precision of the checkpoints (eps32), so nothing is
    lost against a full SVD.

    Args:
        total: accumulator, (m, n) or its core coordinates, float64.
        tau: incoming task vector in the same coordinates, float64.
        shape: of the full matrix, which sets the numerical rank.
        alpha: share of the sum of singular values.
        variant: see `OPCM`.

    Returns:
        The projected task vector, float64, in the same coordinates.
    """
    import torch

    if total.shape[0] < total.shape[1]:
        return project(total.T, tau.T, (shape[1], shape[0]), alpha, variant).T
    squares, vectors = torch.linalg.eigh(total.T @ total)
    singular = squares.flip(0).clamp_min(0.0).sqrt()
    rank = int((singular > singular[0] * EPS * max(shape)).sum())
    if rank == 0:
        return tau
    s, v = singular[:rank], vectors.flip(1)[:, :rank].contiguous()
    share = torch.cumsum(s, 0) > alpha * s.sum()
    r = int(torch.argmax(share.int())) if alpha < 1.0 and bool(share.any()) else rank
    lead_v, tail = v[:, :r], v[:, r:]
    cross = total.T @ tau
    # what goes is `total @ away`: with u_i = S v_i / s_i, the coefficient of u_i v_j^T in tau is v_i^T cross v_j / s_i
    rows = (lead_v.T @ cross) / s[:r, None] ** 2
    block = (rows @ lead_v) @ lead_v.T
    away = lead_v @ (rows - block if variant == "paper" else block)
    if variant != "code-no-diagonal" and r < rank:
        diagonal = ((cross @ tail) * tail).sum(0) / s[r:] ** 2
        away += (tail * diagonal) @ tail.T
    projected = torch.addmm(tau, total, away, alpha=-1.0)
    return projected - (tau @ lead_v) @ lead_v.T if variant == "paper" else projected
