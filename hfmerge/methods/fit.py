"""The scale that fits a merged change to all models at once: `norm: fit`.

For a merged change D of some matrices, c D is nearest to all models on the inputs that their changes speak of:

    c = sum_t w_t tr(D C_t tau_t^T) / sum_t tr(D C_t D^T),    C_t = tau_t^T tau_t / ||tau_t||^2

minimises `sum_t ||(c D - w_t tau_t) C_t^(1/2)||^2`, the objective of `gram` without its prior. Numerator and
denominator are sums over matrices and models, one number for each pair. So c does not depend on any order, and what a
model adds to them goes when it goes. A method that carries such sums (`gram`) needs no model for c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hfmerge.task_vector import LowRank, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

FitProducts = tuple[float, float]
"""Numerator and denominator of the scale, or a model's and a matrix's part of them."""


def fit_products(change: TaskVector, taus: Sequence[TaskVector], weights: Sequence[float]) -> FitProducts:
    """The part of one matrix; a model of weight 0 or without a change has none.

    Args:
        change: the merged change of the matrix (m, n).
        taus: the models' changes, each read when indexed.
        weights: of the models; of methods that divide by their sum, scaled to a mean of 1.
    """
    if change.is_zero:
        return 0.0, 0.0
    dense = change.to_dense().double()
    parts = [_of_model(dense, taus[i], weight) for i, weight in enumerate(weights) if weight != 0.0]
    return math.fsum(part[0] for part in parts), math.fsum(part[1] for part in parts)


def fit_scale(products: Iterable[FitProducts]) -> float:
    """The scale; 1 where nothing was changed, or where the change does not answer to any model's inputs."""
    found = list(products)
    top, bottom = math.fsum(part[0] for part in found), math.fsum(part[1] for part in found)
    return top / bottom if bottom > 0.0 else 1.0


def _of_model(dense: Tensor, tau: TaskVector, weight: float) -> FitProducts:
    """`w tr(D C tau^T)` and `tr(D C D^T)` of one model, from products on the smaller side of the matrix."""
    if tau.is_zero:
        return 0.0, 0.0
    if isinstance(tau, LowRank):
        up, down = tau.up.double(), tau.down.double()
        # D tau^T = (D down^T) up^T, and the norm of a product with up^T follows from up^T up
        answers, inner = dense @ down.T, up.T @ up
        across = down @ down.T
        square = float((inner * across).sum())
        top = float(((answers.T @ up) * (inner @ across)).sum())
        bottom = float(((answers.T @ answers) * inner).sum())
    else:
        own = tau.to_dense().double()
        square = float((own * own).sum())
        if own.shape[0] <= own.shape[1]:
            answers = dense @ own.T
            top, bottom = float((answers * (own @ own.T)).sum()), float((answers * answers).sum())
        else:
            turned = dense @ (own.T @ own)
            top, bottom = float((turned * own).sum()), float((turned * dense).sum())
    if square == 0.0:
        return 0.0, 0.0
    return weight * top / square, bottom / square
