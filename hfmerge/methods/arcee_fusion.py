"""Arcee Fusion: of every change only the elements of outstanding importance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member, method, option, summed
from hfmerge.methods.trimming import PART


if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-8
"""Added to the probabilities before their logarithms are taken."""


@method(
    "arcee_fusion",
    source="goddard2024mergekit",
    needs="tensor",
    laws=("order_free", "linear_in_weights"),
    absolute=True,
)
def arcee_fusion(
    block: Block,
    *,
    spread: float = option(1.5, 0.0, help="how many interquartile ranges above the median importance has to be"),
) -> Tensor:
    """The elements of each change whose importance is outstanding, with weights, summed: `sum_t w_t m_t tau_t`.

    `m_t` is 1 where `importance >= median + spread * (third quartile - first quartile)`. The importance of an element
    is `|tau_t|` times the Kullback-Leibler divergence, over its row, of the softmax of the model's weights from that
    of the base's. Quartiles are taken over the tensor.

    Source: Arcee Fusion of arXiv 2403.13257's tool. Departures: any number of models, with weights, where the source
    has one; divergences are computed in float64, because those of small changes drown in float32's rounding; quartiles
    are of all elements, where the source samples those of large tensors; where no importance differs, all elements are
    kept.
    """
    return summed(_outstanding(block, model, spread).mul_(model.weight) for model in block.models)


def _outstanding(block: Block, model: Member, spread: float) -> Tensor:
    """A model's change where its importance is outstanding, else 0, in memory of its own."""
    import torch

    tau = model.tau
    width = tau.shape[-1] if tau.dim() else 1
    changes, origin = tau.reshape(-1, width), block.base().reshape(-1, width)
    importance = torch.empty(changes.shape)
    step = max(1, PART // max(1, width))
    for at in range(0, len(changes), step):
        change, rows = changes[at : at + step], origin[at : at + step].double()
        own = torch.softmax(rows + change, dim=1) + FLOOR
        divergence = (own * (own / (torch.softmax(rows, dim=1) + FLOOR)).log()).sum(1, keepdim=True)
        importance[at : at + step] = change.abs() * divergence.clamp_min(0.0)
    flat = importance.reshape(-1)
    first, median, third = (float(flat.kthvalue(int(q * (flat.numel() - 1)) + 1)[0]) for q in (0.25, 0.5, 0.75))
    return torch.where(importance >= median + spread * (third - first), changes, 0.0).view(tau.shape)
