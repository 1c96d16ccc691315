"""Task singular vectors: the leading singular vectors of all changes of a matrix, made orthogonal to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member, method, option, summed
from hfmerge.methods.spectral import EPS, polar, thin_svd


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "tsv_m",
    source="gargiulo2025tsv",
    needs="matrix",
    laws=("order_free", "identity_for_one", "scale_equivariant", "linear_in_weights"),
)
def tsv_m(block: Block, *, scale: float = option(1.0, help="factor of the merged task vector")) -> Tensor:
    """TSV-Merge: `scale * U diag(s) V^T` of the first 1/T of every change's singular triples, made orthogonal.

    Of each matrix's change `w_t tau_t` the first `min(m, n) / T` triples are kept, at least one. The left vectors of
    all models, side by side, are replaced by the nearest matrix with orthonormal columns (`polar`), and so are the
    right ones. What is no matrix is averaged: `scale * sum w_t tau_t / T`.

    Source: arXiv 2412.00081, algorithm 1; its alpha is `scale`. Departures: directions at rounding level
    (`s <= s_1 eps max(m, n)`, eps of float32, over all models) are nobody's and are left out, so that adapters can be
    merged; the factors of an adapter are decomposed without multiplying them out.
    """
    import torch

    if not block.matrix:
        return average(block) * scale
    count = max(1, min(block.shape) // len(block.models))
    parts = [triples(model, count) for model in block.models]
    u, s, v = (torch.cat(each, dim) for each, dim in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
    if not len(s) or float(s.max()) == 0.0:
        return torch.zeros(block.shape, device=u.device)
    real = s > float(s.max()) * EPS * max(block.shape)
    return (polar(u[:, real])[0] * (s[real] * scale)) @ polar(v[real])[0]


def average(block: Block) -> Tensor:
    """`sum w_t tau_t / T`."""
    return summed(model.tau * (model.weight / len(block.models)) for model in block.models)


def triples(model: Member, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a weighted change: `U` (m, k), `s` (k,), `V^T` (k, n), float64; k <= `count`.

    Singular values are magnitudes: the sign of a negative weight is in `U`.
    """
    import torch

    factors = model.factors
    if factors is None or min(factors[0].shape[0], factors[1].shape[1]) <= factors[0].shape[1]:
        u, s, vt = thin_svd(model.tau.double())
    else:
        left, upper = torch.linalg.qr(factors[0].double())
        right, lower = torch.linalg.qr(factors[1].double().T)
        inner, s, across = thin_svd(upper @ lower.T)
        u, vt = left @ inner, across @ right.T
    sign = -1.0 if model.weight < 0.0 else 1.0
    return sign * u[:, :count], s[:count] * abs(model.weight), vt[:count]
