"""Weighted averages and sums of task vectors: `linear` and `task_arithmetic`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hfmerge.methods.declare import method
from hfmerge.methods.exact_sum import AdditiveFold


if TYPE_CHECKING:
    from torch import Tensor


@method(
    "linear",
    source="wortsman2022soups",
    needs="elements",
    laws=("order_free", "identity_for_one", "scale_equivariant"),
    normalises_weights=True,
    of_weights=True,
    version=2,
)
@dataclass(frozen=True)
class Linear(AdditiveFold):
    """Weighted average of the models: `theta_0 + sum w_t tau_t / sum w_t`, which is `sum w_t theta_t / sum w_t`.

    Source: "Model soups", arXiv 2203.05482 (uniform soup for equal weights).
    """

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """`S / sum of weights`."""
        return sums["S"] * (1.0 / math.fsum(weights))


@method(
    "task_arithmetic",
    source="ilharco2023task",
    needs="elements",
    laws=("order_free", "identity_for_one", "scale_equivariant", "linear_in_weights"),
    version=2,
)
@dataclass(frozen=True)
class TaskArithmetic(AdditiveFold):
    """Sum of task vectors: `theta_0 + scale * sum w_t tau_t`; a negative weight negates a task.

    Source: "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2.
    """

    learnable: ClassVar[bool] = True

    scale: float = field(default=1.0, metadata={"help": "factor of the summed task vectors"})

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """`scale * S`."""
        return sums["S"] if self.scale == 1.0 else sums["S"] * self.scale

    def mixing(self, models: int, found: Sequence[float] | None) -> list[list[float]]:
        """The identity times `scale`."""
        return [[self.scale * (i == j) for j in range(models)] for i in range(models)]
