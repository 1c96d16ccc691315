"""Merging over time: an exponential moving average of the models' changes, so that what came last counts most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hfmerge.methods.base import Carry, FoldMethod
from hfmerge.methods.declare import method
from hfmerge.task_vector import TaskVector


@method(
    "ema",
    source="dziadzio2025time",
    needs="elements",
    laws=("identity_for_one", "scale_equivariant", "linear_in_weights"),
)
@dataclass(frozen=True)
class Ema(FoldMethod):
    """Exponential moving average over the models in their order of arrival.

    `S_1 = w_1 tau_1`, `S_t = decay S_{t-1} + (1 - decay) w_t tau_t`; the merged change is `S_T`. With weights 1 this
    is the moving average of the models themselves, `theta_t = decay theta_{t-1} + (1 - decay) W_t`.

    Source: arXiv 2412.06712, the merging rule "EMA" of its time axis, for models tuned from the base. Departure: the
    weights, which the paper does not have.

    The state is a recursive sum in float64, in the order of arrival. So a model that leaves is left out by folding
    again from the kept state before it.
    """

    subtractable: ClassVar[bool] = False

    decay: float = field(
        default=0.5,
        metadata={"minimum": 0.0, "maximum": 1.0, "help": "share of the merge so far when a further model joins"},
    )

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """The average with one more model."""
        import torch

        own = tau.to(torch.float64).scaled(weight)
        if carry is None:
            return {"S": own}
        return {"S": carry["S"].scaled(self.decay).plus(own, 1.0 - self.decay)}

    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """The average itself."""
        return carry["S"]
