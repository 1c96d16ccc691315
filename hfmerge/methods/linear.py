"""Weighted averages and sums of task vectors: `linear` and `task_arithmetic`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hfmerge.methods.base import Citation
from hfmerge.methods.exact_sum import AdditiveFold


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear(AdditiveFold):
    """Weighted average of the models: `theta_0 + sum w_t tau_t / sum w_t`, which is `sum w_t theta_t / sum w_t`.

    Source: "Model soups", arXiv 2203.05482 (uniform soup for equal weights).
    """

    name: ClassVar[str] = "linear"
    version: ClassVar[int] = 2
    normalises_weights: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    citations: ClassVar[tuple[Citation, ...]] = (
        Citation(
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
            "inference time",
            "https://arxiv.org/abs/2203.05482",
            "@inproceedings{wortsman2022soups,\n  title     = {Model soups: averaging weights of multiple fine-tuned "
            "models improves accuracy without increasing inference time},\n  author    = {Mitchell Wortsman and "
            "others},"
            "\n  booktitle = {ICML},\n  year      = {2022}\n}",
        ),
    )

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """`S / sum of weights`."""
        return sums["S"] * (1.0 / math.fsum(weights))


@dataclass(frozen=True)
class TaskArithmetic(AdditiveFold):
    """Sum of task vectors: `theta_0 + scale * sum w_t tau_t`; a negative weight negates a task.

    Source: "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2.
    """

    name: ClassVar[str] = "task_arithmetic"
    version: ClassVar[int] = 2
    elementwise: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    citations: ClassVar[tuple[Citation, ...]] = (
        Citation(
            "Editing Models with Task Arithmetic",
            "https://arxiv.org/abs/2212.04089",
            "@inproceedings{ilharco2023task,\n  title     = {Editing Models with Task Arithmetic},\n"
            "  author    = {Gabriel Ilharco and others},\n  booktitle = {ICLR},\n  year      = {2023}\n}",
        ),
    )

    scale: float = field(default=1.0, metadata={"help": "factor of the summed task vectors"})

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """`scale * S`."""
        return sums["S"] if self.scale == 1.0 else sums["S"] * self.scale
