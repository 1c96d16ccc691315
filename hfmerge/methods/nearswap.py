"""NearSwap: every change cut off at a fixed size, so that only what lies near the base is taken over as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, method, option, summed


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "nearswap",
    source=("alchemonaut2024nearswap", "goddard2024mergekit"),
    needs="elements",
    laws=("order_free", "linear_in_weights"),
    absolute=True,
)
def nearswap(
    block: Block, *, t: float = option(0.001, 0.0, help="greatest change of one element, in units of the weights")
) -> Tensor:
    """Changes cut off at `t`, with weights, summed: `sum_t w_t clamp(tau_t, -t, t)`.

    Elements that differ from the base by at most `t` are the model's; others move by `t` towards it.

    Source: the card of alchemonaut/QuartetAnemoi-70B-t0.0001, whose rule interpolates from the base to the model by
    `min(1, t / |tau|)`; that is `clamp(tau, -t, t)`. Departures: any number of models, with weights, where the source
    has one; NaN, which a recipe may allow, is no change.
    """
    return summed(model.tau.nan_to_num(0.0).clamp_(-t, t).mul_(model.weight) for model in block.models)
