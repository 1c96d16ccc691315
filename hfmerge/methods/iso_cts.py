"""Isotropic merging in common and task-specific subspaces: `iso_c`, whose weakest directions make room for tasks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, method, option
from hfmerge.methods.spectral import EPS, polar, thin_svd
from hfmerge.methods.tsv_m import average


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "iso_cts",
    source="marczak2025no",
    needs="matrix",
    laws=("order_free", "scale_equivariant"),
    normalises_weights=True,
)
def iso_cts(
    block: Block,
    *,
    common: float = option(0.8, 0.0, 1.0, "share of the directions that are those of the sum of all changes"),
    scale: float = option(1.0, help="factor of the merged task vector"),
) -> Tensor:
    """Directions of the sum of changes and of each change's rest, made orthogonal and equally strong.

    Of `sum w_t tau_t = U diag(s) V^T`, a matrix of `r = min(m, n)`, the first k triples are common; the others make
    room for the first `(r - k) / T` triples of each model's `(I - U_k U_k^T) w_t tau_t`. `k` is `common * r`, changed
    by what makes the share of every model a whole number. All left vectors together, and all right ones, are replaced
    by the nearest matrix with orthonormal columns, and all singular values by their mean, times `scale`. What is no
    matrix is averaged. Weights are scaled to a mean of 1, as in `iso_c`.

    Source: arXiv 2502.04959, algorithm 2. Departures: the paper has no weights of models; directions at rounding level
    (`s <= s_1 eps max(m, n)`, eps of float32) are nobody's and are left out, so that adapters can be merged.
    """
    import torch

    weights = [weight * len(block.weights) / math.fsum(block.weights) for weight in block.weights]
    if not block.matrix:
        return average(block) * (scale * len(weights) / math.fsum(block.weights))
    changes = [weight * model.tau.double() for weight, model in zip(weights, block.models, strict=True)]
    total = torch.stack(changes).sum(0)
    u, s, vt = thin_svd(total)
    side, count = min(block.shape), len(changes)
    own = round((side - int(common * side)) / count)
    lead = side - own * count
    parts = [(u[:, :lead], s[:lead], vt[:lead])]
    for change in changes:
        left, values, right = thin_svd(change - u[:, :lead] @ (u[:, :lead].T @ change))
        parts.append((left[:, :own], values[:own], right[:own]))
    u, s, vt = (torch.cat(each, dim) for each, dim in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
    real = s > float(s.max()) * EPS * max(block.shape)
    if not bool(real.any()):
        return torch.zeros_like(total)
    return polar(u[:, real])[0] @ polar(vt[real])[0] * (scale * float(s[real].mean()))
