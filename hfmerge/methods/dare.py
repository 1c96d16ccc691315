"""DARE: elements of every change are dropped at random, the others scaled up; then a sum, or the election of TIES.

What is dropped follows from the seed, the model, the parameter and the place of the element alone (`Block.bernoulli`).
So the order of the models, the cut of a tensor and the number of processes change nothing, and a model that leaves
takes its own pattern with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member, method, option, summed
from hfmerge.methods.election import elected
from hfmerge.methods.trimming import flat_pieces


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "dare_linear",
    source="yu2024dare",
    needs="elements",
    laws=("order_free", "scale_equivariant", "linear_in_weights"),
)
def dare_linear(
    block: Block,
    *,
    density: float = option(0.5, 1e-6, 1.0, "share of each task vector that is kept"),
    scale: float = option(1.0, help="factor of the merged task vector"),
    rescale: bool = option(True, help="divide what is kept by the density, so that the expected change is the whole"),
    seed: int = option(0, 0, help="of the drawing"),
) -> Tensor:
    """DARE with task arithmetic: `scale * sum_t w_t m_t tau_t / density`, `m_t` being 1 with probability `density`.

    Source: "Language Models are Super Mario", arXiv 2311.03099, equations 2 and 3; its drop rate is `1 - density`.
    Departure: `rescale: false` leaves the kept changes as they are.
    """
    factor = scale / (density if rescale else 1.0)
    return summed(_kept(block, model, density, seed).mul_(factor * model.weight) for model in block.models)


@method(
    "dare_ties",
    source=("yu2024dare", "yadav2023ties"),
    needs="elements",
    laws=("order_free", "scale_equivariant"),
)
def dare_ties(
    block: Block,
    *,
    density: float = option(0.5, 1e-6, 1.0, "share of each task vector that is kept"),
    scale: float = option(1.0, help="factor of the merged task vector"),
    rescale: bool = option(True, help="divide what is kept by the density, so that the expected change is the whole"),
    average: bool = option(True, help="average the changes that agree with the elected sign; else they are summed"),
    seed: int = option(0, 0, help="of the drawing"),
) -> Tensor:
    """DARE in the place of TIES's trimming: random elements are dropped, then one sign an element is elected.

    Source: arXiv 2311.03099, section 3.2, with arXiv 2306.01708, algorithm 1, lines 8 to 15, on what `dare_linear`
    keeps of each change. Departure: `average: false` sums the agreeing changes, as other tools do.
    """

    def changed(model: Member) -> Iterable[Tensor]:
        factor = model.weight / (density if rescale else 1.0)
        return flat_pieces(_kept(block, model, density, seed).mul_(factor))

    return elected(block, changed, scale, average=average)


def _kept(block: Block, model: Member, density: float, seed: int) -> Tensor:
    """A model's change where it is kept, else 0, in memory of its own."""
    return block.bernoulli(density, seed, model).mul_(model.tau)
