"""Decomposes the changes of one matrix: singular values of each, and the part that OPCM would clear of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfmerge.methods.opcm import project
from hfmerge.methods.spectral import OpcmVariant
from hfmerge.task_vector import Core, LowRank, Segment, TaskVector, cut


if TYPE_CHECKING:
    from torch import Tensor

VALUES = 32
"""Singular values of a matrix that are reported."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one model's change of one matrix.

    Attributes:
        key, label: stored tensor, and which matrix of it ("" for the only one).
        shape: of the matrix.
        model: index of the model.
        values: the greatest singular values, descending, at most `VALUES`.
        stable_rank: `||A||_F^2 / ||A||_2^2` (Rudelson and Vershynin, arXiv math/0503442).
        energy: number of leading directions -> their share of `||A||_F^2`.
        rank90: directions that hold 90 % of it.
    """

    key: str
    label: str
    shape: tuple[int, int]
    model: int
    values: tuple[float, ...]
    stable_rank: float
    energy: dict[int, float]
    rank90: int


@dataclass(frozen=True)
class Detail:
    """What to measure beyond inner products and signs.

    Attributes:
        spectral: decompose matrices.
        tops: numbers of leading directions whose energy is reported.
        alpha, variant: of OPCM, see `methods.opcm`.
    """

    spectral: bool
    tops: tuple[int, ...]
    alpha: float
    variant: OpcmVariant


def take_apart(
    key: str, block: Segment, taus: Iterable[TaskVector | None], weights: Sequence[float], detail: Detail
) -> tuple[list[tuple[float, float]], list[Spectrum]]:
    """Spectra of one matrix, and per model the squared norms of its change and of the part that OPCM would clear.

    OPCM's accumulator is rebuilt as the models arrive: what is cleared of model t is `||tau_t||^2 - ||P(tau_t)||^2`,
    as P is an orthogonal projection.
    """
    total: TaskVector | None = None
    parts, spectra = [], []
    for i, change in enumerate(taus):
        if change is None or (tau := cut(change, block)).is_zero:
            parts.append((0.0, 0.0))
            continue
        square = tau.squared_norm() * weights[i] ** 2
        if square == 0.0:
            parts.append((0.0, 0.0))
            continue
        spectra.append(_spectrum(key, block.label, i, tau, detail.tops))
        tau = tau.scaled(weights[i])
        if total is None:
            total = tau
            parts.append((square, 0.0))
            continue
        core = Core.of(total, tau)
        kept = project(core.first, core.second, core.shape, detail.alpha, detail.variant)
        before = float(core.second.square().sum())
        parts.append((square, square * max(0.0, 1.0 - float(kept.square().sum()) / before)))
        total = core.lift(core.first + kept)
    return parts, spectra


def _spectrum(key: str, label: str, model: int, tau: TaskVector, tops: Sequence[int]) -> Spectrum:
    squares = squared_singular_values(tau)
    total = float(squares.sum())
    shares = squares.cumsum(0) / total
    m, n = tau.shape
    return Spectrum(
        key,
        label,
        (m, n),
        model,
        tuple(float(value) for value in squares[:VALUES].sqrt()),
        total / float(squares[0]),
        {top: float(shares[min(top, len(shares)) - 1]) for top in tops},
        # the last share is one up to rounding
        int((shares < 0.9).sum()) + 1,
    )


def squared_singular_values(tau: TaskVector) -> Tensor:
    """Of a matrix, descending, float64; of factors as many as their rank. Exact to `eps` of the greatest."""
    import torch

    if isinstance(tau, LowRank):
        # up down = Q_u (R_u R_d^T) Q_d^T, so the small matrix has its singular values
        up, down = torch.linalg.qr(tau.up.double())[1], torch.linalg.qr(tau.down.double().T)[1]
        return torch.linalg.svdvals(up @ down.T).square()
    matrix = tau.to_dense().double()
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(matrix.T @ matrix).flip(0).clamp_min(0.0)
