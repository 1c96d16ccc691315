"""Weighted averages and sums of task vectors: `linear` and `task_arithmetic`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hfmerge.methods.base import Carry, Citation, FoldMethod
from hfmerge.taskvector import TaskVector


def _add(carry: Carry | None, tau: TaskVector, weight: float) -> Carry:
    return {"S": tau.scaled(weight) if carry is None else carry["S"].plus(tau, weight)}


@dataclass(frozen=True)
class Linear(FoldMethod):
    """Weighted average of the models: `theta_0 + sum w_t tau_t / sum w_t`, which is `sum w_t theta_t / sum w_t`.

    Source: "Model soups", arXiv 2203.05482 (uniform soup for equal weights).
    """

    name: ClassVar[str] = "linear"
    normalises_weights: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
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

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """`S + weight * tau`."""
        return _add(carry, tau, weight)

    def emit(self, carry: Carry, weights: Sequence[float]) -> TaskVector:
        """`S / sum of weights`."""
        return carry["S"].scaled(1.0 / math.fsum(weights))


@dataclass(frozen=True)
class TaskArithmetic(FoldMethod):
    """Sum of task vectors: `theta_0 + scale * sum w_t tau_t`; a negative weight negates a task.

    Source: "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2.
    """

    name: ClassVar[str] = "task_arithmetic"
    elementwise: ClassVar[bool] = True
    citations: ClassVar[tuple[Citation, ...]] = (
        Citation(
            "Editing Models with Task Arithmetic",
            "https://arxiv.org/abs/2212.04089",
            "@inproceedings{ilharco2023task,\n  title     = {Editing Models with Task Arithmetic},\n"
            "  author    = {Gabriel Ilharco and others},\n  booktitle = {ICLR},\n  year      = {2023}\n}",
        ),
    )

    scale: float = field(default=1.0, metadata={"help": "factor of the summed task vectors"})

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """`S + weight * tau`."""
        return _add(carry, tau, weight)

    def emit(self, carry: Carry, weights: Sequence[float]) -> TaskVector:
        """`scale * S`."""
        return carry["S"].scaled(self.scale)
