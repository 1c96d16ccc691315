"""MagMax: each element is the one that some model changed most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, method, option
from hfmerge.methods.trimming import flat_pieces


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "magmax",
    source="marczak2024magmax",
    needs="elements",
    laws=("order_free", "identity_for_one", "scale_equivariant"),
)
def magmax(block: Block, *, scale: float = option(1.0, help="factor of the merged task vector")) -> Tensor:
    """Of each element the weighted change of greatest magnitude: `scale * w_t tau_t` of the greatest `|w_t tau_t|`.

    Source: arXiv 2407.06322, section 4, for independent fine-tunes; its lambda is `scale`. Departures: the paper has
    no weights of models, which is all weights 1; of opposite changes of one magnitude the positive one is taken, so
    that the order of the models does not matter.
    """
    import torch

    chosen = (block.models[0].tau * block.models[0].weight).contiguous()
    for model in block.models[1:]:
        for held, part in zip(flat_pieces(chosen), flat_pieces(model.tau), strict=True):
            value = part * model.weight
            size, most = value.abs(), held.abs()
            held.copy_(torch.where((size > most) | ((size == most) & (value > held)), value, held))
    return chosen.mul_(scale)
