"""SCE: select the elements that differ most, calculate each model's share from their size, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member, method, option
from hfmerge.methods.election import elected
from hfmerge.methods.trimming import flat_pieces, kth_magnitude


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "sce",
    source="wan2024fusechat",
    needs="tensor",
    laws=("order_free", "identity_for_one", "scale_equivariant"),
)
def sce(
    block: Block,
    *,
    density: float = option(
        1.0, 0.0, 1.0, "share of the elements, those that differ most between models, that is kept"
    ),
    scale: float = option(1.0, help="factor of the merged task vector"),
) -> Tensor:
    """Select, calculate, erase: an average of the changes, each weighted by the size of what is selected of it.

    With `m` the mask of the elements of largest variance between the models (the `density` share of each tensor),
    `c_t` proportional to `sum (m tau_t)^2`, and the sign of an element that of `sum w_t m tau_t`: the merged change is
    `scale * sum c_t w_t m tau_t / sum c_t |w_t|`, over the models that agree with the sign.

    Source: arXiv 2408.07990, section 3.3; its tau is `density`, of which it recommends 0.1. Departures: the paper has
    no weights of models, which is all weights 1; where no element differs between models, all are kept; elements of a
    variance equal to the border's are all kept. The default keeps all elements, as other tools do.
    """
    import torch

    mask = _selected(block, density)

    def masked(model: Member) -> Tensor:
        return model.tau if mask is None else model.tau * mask

    def changed(model: Member) -> Iterable[Tensor]:
        # new values, because the election writes into them
        return (part * model.weight for part in flat_pieces(masked(model)))

    sizes = [float(torch.linalg.vector_norm(masked(model), dtype=torch.float64)) for model in block.models]
    largest = max(sizes)
    shares = [(size / largest) ** 2 if math.isfinite(largest) and largest > 0.0 else 1.0 for size in sizes]
    return elected(block, changed, scale, shares=shares)


def _selected(block: Block, density: float) -> Tensor | None:
    """1 where the variance between the models is among the largest `density` share, else 0; None: everywhere."""
    import torch

    if density >= 1.0:
        return None
    mean = torch.zeros(block.shape)
    for model in block.models:
        mean += model.tau
    mean /= len(block.models)
    spread = torch.zeros_like(mean)
    for model in block.models:
        # the root is taken so that small squares are not lost below the smallest float32
        spread = torch.hypot(spread, model.tau - mean)
    return (spread >= kth_magnitude(spread, density)).float()
