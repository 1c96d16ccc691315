"""DELLA: like DARE, and the larger a change is within its row, the likelier it is kept.

The random numbers depend on the seed, the model, the parameter and the place of the element alone (`Block.uniform`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member, method, option, summed
from hfmerge.methods.election import elected
from hfmerge.methods.trimming import PART, flat_pieces


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "della",
    source=("deep2024della", "yadav2023ties"),
    needs="tensor",
    laws=("order_free", "scale_equivariant"),
)
def della(
    block: Block,
    *,
    density: float = option(0.5, 0.0, 1.0, "mean share of each row of a task vector that is kept"),
    epsilon: float = option(0.15, 0.0, 1.0, "how far the largest and the smallest change's share are from the mean"),
    scale: float = option(1.0, help="factor of the merged task vector"),
    rescale: bool = option(True, help="divide each kept change by its probability"),
    average: bool = option(True, help="average the changes that agree with the elected sign; else they are summed"),
    seed: int = option(0, 0, help="of the drawing"),
) -> Tensor:
    """DELLA-Merging: MAGPRUNE on every change, then the election of TIES.

    Source: arXiv 2406.11617, sections 3.1 to 3.3. An element of rank r within its row, from 0 for the smallest to n -
    1, is kept with probability `density - epsilon + 2 epsilon r / (n - 1)`, and divided by it. Departures: the paper's
    epsilon is the whole range of the probabilities, here it is half of it, as in other tools; probabilities are cut
    off at 0 and 1; a row of one element is kept with probability `density`; what is no matrix is one row if it has one
    axis, else its first axis counts the rows; `rescale: false` and `average: false` leave out the two divisions.
    """

    def changed(model: Member) -> Iterable[Tensor]:
        return flat_pieces(_pruned(block, model, (density, epsilon), rescale=rescale, seed=seed).mul_(model.weight))

    return elected(block, changed, scale, average=average)


@method(
    "della_linear",
    source="deep2024della",
    needs="tensor",
    laws=("order_free", "scale_equivariant", "linear_in_weights"),
)
def della_linear(
    block: Block,
    *,
    density: float = option(0.5, 0.0, 1.0, "mean share of each row of a task vector that is kept"),
    epsilon: float = option(0.15, 0.0, 1.0, "how far the largest and the smallest change's share are from the mean"),
    scale: float = option(1.0, help="factor of the merged task vector"),
    rescale: bool = option(True, help="divide each kept change by its probability"),
    seed: int = option(0, 0, help="of the drawing"),
) -> Tensor:
    """MAGPRUNE on every change, then the weighted sum: `della` without the election of signs.

    Source: arXiv 2406.11617, section 3.1, with arXiv 2212.04089; the departures are those of `della`.
    """
    shares = (density, epsilon)
    return summed(
        _pruned(block, model, shares, rescale=rescale, seed=seed).mul_(scale * model.weight) for model in block.models
    )


def _pruned(block: Block, model: Member, shares: tuple[float, float], *, rescale: bool, seed: int) -> Tensor:
    """MAGPRUNE of a model's change with `density` and `epsilon`, in memory of its own.

    The rank of equal magnitudes is that of their places.
    """
    import torch

    tau, drawn = model.tau, block.uniform(seed, model)
    many = tau.shape[0] if tau.dim() > 1 else 1
    rows, result = tau.reshape(many, -1), drawn.view(many, -1)
    n = rows.shape[1]
    density, epsilon = shares
    steps = torch.linspace(-epsilon, epsilon, n) if n > 1 else torch.zeros(n)
    by_rank = (density + steps).clamp_(0.0, 1.0).to(rows.device)
    step = max(1, PART // max(1, n))
    for at in range(0, many, step):
        part = rows[at : at + step]
        places = part.abs().argsort(dim=1, stable=True)
        probability = torch.empty_like(part, memory_format=torch.contiguous_format)
        probability.scatter_(1, places, by_rank.expand_as(part))
        kept = result[at : at + step] < probability
        value = part / probability if rescale else part
        result[at : at + step] = torch.where(kept, value, 0.0)
    return result.view(tau.shape)
