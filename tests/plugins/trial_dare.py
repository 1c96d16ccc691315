"""DARE: changes are dropped at random and the rest is scaled up, then summed."""

from __future__ import annotations

from torch import Tensor

from hfmerge.methods import Block, method, option


@method(
    "trial_dare",
    source="Language Models are Super Mario: Absorbing Abilities from Homologous Models, arXiv:2311.03099",
    needs="elements",
    laws=("order_free", "scale_equivariant", "linear_in_weights"),
)
def trial_dare(
    block: Block,
    *,
    density: float = option(0.5, 1e-6, 1.0, "share of each task vector that is kept"),
    seed: int = option(0, 0, help="of the drawing"),
) -> Tensor:
    """DARE with task arithmetic: `sum_t w_t m_t tau_t / density`, where `m_t` is 1 with probability `density`."""
    return sum(m.weight / density * m.tau * block.bernoulli(density, seed, m) for m in block.models)
