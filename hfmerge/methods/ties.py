"""TIES: trim small changes, elect one sign per element, average the changes that agree with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from hfmerge.methods.declare import Block, Member, method, option
from hfmerge.methods.election import elected, times
from hfmerge.methods.trimming import Histograms, KthMagnitudes, flat_pieces, kth_magnitude, trim


if TYPE_CHECKING:
    from torch import Tensor


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
    """
    found = block.found
    limits = [found[m.index] if found is not None else kth_magnitude(m.tau, density) for m in block.models]

    def trimmed(model: Member) -> Iterable[Tensor]:
        limit, weight = limits[model.index], model.weight
        return (times(trim(part, limit), weight) for part in flat_pieces(model.tau))

    return elected(block, trimmed, scale)
