"""Model Breadcrumbs: of every change the largest elements and the small ones are left out; then a sum, or TIES."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member, method, option
from hfmerge.methods.election import elected, times
from hfmerge.methods.trimming import KthMagnitudes, flat_pieces, kth_magnitude, trim


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "breadcrumbs",
    source="davari2024breadcrumbs",
    needs="tensor",
    laws=("order_free", "scale_equivariant", "linear_in_weights"),
    survey=lambda self, models, count: KthMagnitudes(models, count, *_edges(count, self.density, self.gamma)),
)
def breadcrumbs(
    block: Block,
    *,
    density: float = option(0.15, 0.0, 1.0, "share of each task vector that is kept"),
    gamma: float = option(0.01, 0.0, 1.0, "share of the largest changes that is left out"),
    scale: float = option(1.0, help="factor of the merged task vector"),
) -> Tensor:
    """The scaled sum of changes without their outliers and without their small elements: `scale * sum w_t m_t tau_t`.

    Source: arXiv 2312.06795, section 3. In each tensor the `gamma` share of largest magnitudes is left out, then the
    `density` share of the largest of the others is kept; the paper's beta is `1 - gamma - density`. Departures: the
    two shares may not exceed 1 together, so `gamma` counts only up to `1 - density`; the matrices inside a fused
    tensor are masked one by one; magnitudes equal to the border of the outliers are all left out.
    """
    import torch

    bands = _bands(block, density, gamma)
    total = torch.zeros(math.prod(block.shape))
    for model in block.models:
        low, high = bands[model.index]
        for into, part in zip(flat_pieces(total), flat_pieces(model.tau), strict=True):
            into.add_(_between(part, low, high), alpha=scale * model.weight)
    return total.view(block.shape)


@method(
    "breadcrumbs_ties",
    source=("davari2024breadcrumbs", "yadav2023ties"),
    needs="tensor",
    laws=("order_free", "scale_equivariant"),
    survey=lambda self, models, count: KthMagnitudes(models, count, *_edges(count, self.density, self.gamma)),
)
def breadcrumbs_ties(
    block: Block,
    *,
    density: float = option(0.15, 0.0, 1.0, "share of each task vector that is kept"),
    gamma: float = option(0.01, 0.0, 1.0, "share of the largest changes that is left out"),
    scale: float = option(1.0, help="factor of the merged task vector"),
    average: bool = option(True, help="average the changes that agree with the elected sign; else they are summed"),
) -> Tensor:
    """The masks of `breadcrumbs` in the place of TIES's trimming, then the election of one sign an element.

    Source: arXiv 2312.06795, section 3, with arXiv 2306.01708, algorithm 1, lines 8 to 15; putting them together is
    other tools' habit. The departures are those of `breadcrumbs`; `average: false` sums the agreeing changes.
    """
    bands = _bands(block, density, gamma)

    def changed(model: Member) -> Iterable[Tensor]:
        low, high = bands[model.index]
        return (times(_between(part, low, high), model.weight) for part in flat_pieces(model.tau))

    return elected(block, changed, scale, average=average)


def _edges(count: int, density: float, gamma: float) -> tuple[float, ...]:
    """Shares of the largest elements that end at the lower border of what is kept, and at the upper one, if any."""
    outliers = min(gamma, 1.0 - density)
    low = min(1.0, density + outliers)
    return (low, outliers) if round(outliers * count) else (low,)


def _bands(block: Block, density: float, gamma: float) -> list[tuple[float, float]]:
    """For each model the magnitude from which on elements are kept, and that from which on they are outliers."""
    found = block.found
    if found is None:
        edges = _edges(math.prod(block.shape), density, gamma)
        found = [kth_magnitude(model.tau, edge) for model in block.models for edge in edges]
    each = len(found) // len(block.models)
    pairs = [found[at : at + each] for at in range(0, len(found), each)]
    return [(own[0], own[1] if each > 1 else math.inf) for own in pairs]


def _between(values: Tensor, low: float, high: float) -> Tensor:
    """`values` (float32) whose magnitude reaches `low` and not `high`, 0 elsewhere and for NaN; a new tensor."""
    kept = trim(values, low)
    return kept if high == math.inf else kept.masked_fill_(kept.abs() >= high, 0.0)
