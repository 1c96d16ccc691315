"""Consensus task arithmetic: the sum of changes, without the elements that matter to too few models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, method, option
from hfmerge.methods.trimming import flat_pieces


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "consensus_ta",
    source="wang2024localizing",
    needs="elements",
    laws=("order_free", "identity_for_one", "scale_equivariant"),
)
def consensus_ta(
    block: Block,
    *,
    threshold: float = option(0.4, 0.0, help="size of a change, relative to what the others change, to matter"),
    agreement: int = option(2, 1, help="least number of models to which an element matters"),
    scale: float = option(1.0, help="factor of the merged task vector"),
) -> Tensor:
    """The sum of changes in the elements that matter to several models: `scale * m S` with `S = sum_t w_t tau_t`.

    `m` is 1 where an element matters to at least `agreement` models, else 0. An element matters to model t if `|w_t
    tau_t| >= threshold * |S - w_t tau_t|`.

    Source: arXiv 2405.07813, equations 4 to 6 (TALL-masks, whose lambda is `threshold`) and section 5 (consensus
    merging, whose k is `agreement`). Departures: one threshold for all models, where the paper selects one for each by
    validation; the paper has no weights of models, which is all weights 1; of fewer models than `agreement` all have
    to agree; a change of zero matters to nobody.
    """
    import torch

    total = torch.zeros(block.shape)
    for model in block.models:
        total.add_(model.tau, alpha=model.weight)
    votes = torch.zeros(block.shape)
    for model in block.models:
        for count, sum_, part in zip(flat_pieces(votes), flat_pieces(total), flat_pieces(model.tau), strict=True):
            own = part * model.weight
            count += (own.abs() >= threshold * (sum_ - own).abs()) & (own != 0.0)
    return total.mul_(scale).masked_fill_(votes < min(agreement, len(block.models)), 0.0)
