"""TIES: trim small changes, elect one sign per element, average the changes that agree with it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from hfmerge.methods.declare import Block, Member, method, option
from hfmerge.methods.trimming import Histograms, KthMagnitudes, flat_pieces, kth_magnitude, trim


if TYPE_CHECKING:
    from torch import Tensor

_HELD = 1 << 20
"""Elements of trimmed task vectors that one visit keeps, all models together."""


@method(
    "ties",
    source="yadav2023ties",
    needs="tensor",
    laws=("order_free", "scale_equivariant"),
    survey=lambda self, models, count: KthMagnitudes(models, count, self.density),
    measure=lambda self, models: Histograms(models, self.density) if self.scope == "model" else None,
)
def ties(
    block: Block,
    *,
    density: float = option(0.2, 0.0, 1.0, "share of each task vector that is kept"),
    scale: float = option(1.0, help="factor of the merged task vector"),
    scope: Literal["tensor", "model"] = option(
        "tensor", help="trim each tensor by itself, or over the whole model as in the paper"
    ),
) -> Tensor:
    """TIES-Merging: `theta_0 + scale * disjoint mean of the trimmed task vectors`.

    Source: arXiv 2306.01708, algorithm 1. Per model only the `density` share of largest magnitudes is kept; the sign
    of an element is that of the weighted sum of what was kept; merged = sum of the agreeing weighted values over the
    sum of their weights' magnitudes. Departures: the paper trims each model over all parameters (`scope: model`, here
    with a histogram threshold, relative error 2^-12); `scope: tensor`, the default and other tools' habit, trims each
    matrix or vector by itself and needs one pass. Elements whose weighted values sum to exactly zero stay at the base.

    Two sweeps over the models (elect, then average), so that little more than two tensors are held. What is computed
    on the way lies in pieces that a cache holds (see `trimming.PART`). The task vectors of a small block are kept from
    the first sweep to the second, those of a large one are asked for again.
    """
    import torch

    models, found = block.models, block.found
    limits = [found[m.index] if found is not None else kth_magnitude(m.tau, density) for m in models]
    shape = block.shape
    size = math.prod(shape)
    held: dict[int, list[Tensor]] = {}

    def trimmed(model: Member) -> Iterable[Tensor]:
        if model.index in held:
            return held[model.index]
        pieces = (_weighted(trim(part, limits[model.index]), model.weight) for part in flat_pieces(model.tau))
        if (len(held) + 1) * size > _HELD:
            return pieces
        held[model.index] = list(pieces)
        return held[model.index]

    sums = torch.cat(list(trimmed(models[0])))
    for model in models[1:]:
        for votes, value in zip(flat_pieces(sums), trimmed(model), strict=True):
            votes += value
    # Inf against -Inf elects nothing; a large block's signs take a byte each
    elected = sums.sign().nan_to_num_(0.0) if size * len(models) <= _HELD else _signs(sums)
    sums.zero_()
    shares = torch.zeros_like(sums)
    for model in models:
        for sign, total, share, value in zip(
            flat_pieces(elected), flat_pieces(sums), flat_pieces(shares), trimmed(model), strict=True
        ):
            agreeing = value.mul_(sign.float()).clamp_min_(0.0)
            total += agreeing
            share.add_(agreeing.sign_(), alpha=abs(model.weight))
    for sign, total, share in zip(flat_pieces(elected), flat_pieces(sums), flat_pieces(shares), strict=True):
        total.mul_(sign.float()).div_(share.clamp_min_(torch.finfo(torch.float32).tiny)).mul_(scale)
    return sums.view(shape)


def _signs(values: Tensor) -> Tensor:
    """-1, 0 or 1 of each element as int8; 0 for NaN."""
    import torch

    signs = torch.empty_like(values, dtype=torch.int8)
    for into, part in zip(flat_pieces(signs), flat_pieces(values), strict=True):
        into.copy_(part.sign().nan_to_num_(0.0))
    return signs


def _weighted(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1.0 else value.mul_(weight)
