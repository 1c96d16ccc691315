"""Fisher merging: an average of the models, each element weighted by how much its model depends on it."""

from __future__ import annotations

from torch import Tensor

from hfmerge.methods import Block, method, option, tensors


@method(
    "fisher",
    source="Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832",
    needs="elements",
    laws=("order_free", "identity_for_one", "scale_equivariant"),
    normalises_weights=True,
)
def fisher(
    block: Block,
    *,
    information: str = tensors("fisher.safetensors", "file of each model with its diagonal Fisher information"),
    floor: float = option(1e-10, 1e-30, help="added to the information, for elements that no model depends on"),
) -> Tensor:
    """Fisher merging: `sum_t w_t F_t tau_t / sum_t w_t F_t`, with `F_t` the diagonal Fisher information of model t."""
    total = share = 0.0
    for m in block.models:
        own = m.weight * (m.tensor(information) + floor)
        total, share = total + own * m.tau, share + own
    return total / share
