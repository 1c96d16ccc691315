"""TIES: trim small changes, elect one sign per element, average the changes that agree with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from hfmerge.methods.base import Citation, JointMethod
from hfmerge.methods.trimming import histogram_threshold, kth_magnitude
from hfmerge.taskvector import Dense, TaskVector


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ties(JointMethod):
    """TIES-Merging: `theta_0 + scale * disjoint mean of the trimmed task vectors`.

    Source: arXiv 2306.01708, algorithm 1. Per model only the `density` share of largest magnitudes is kept; the sign
    of an element is that of the weighted sum of what was kept; merged = sum of the agreeing weighted values over the
    sum of their weights' magnitudes. Departures: the paper trims each model over all parameters (`scope: model`, here
    with a histogram threshold, relative error 2^-12); `scope: tensor`, the default and other tools' habit, trims each
    matrix or vector by itself and needs one pass. Elements whose weighted values sum to exactly zero stay at the base.
    """

    name: ClassVar[str] = "ties"
    normalises_weights: ClassVar[bool] = False
    citations: ClassVar[tuple[Citation, ...]] = (
        Citation(
            "TIES-Merging: Resolving Interference When Merging Models",
            "https://arxiv.org/abs/2306.01708",
            "@inproceedings{yadav2023ties,\n"
            "  title     = {TIES-Merging: Resolving Interference When Merging Models},\n"
            "  author    = {Prateek Yadav and others},\n  booktitle = {NeurIPS},\n  year      = {2023}\n}",
        ),
    )

    density: float = field(
        default=0.2, metadata={"minimum": 0.0, "maximum": 1.0, "help": "share of each task vector that is kept"}
    )
    scale: float = field(default=1.0, metadata={"help": "factor of the merged task vector"})
    scope: Literal["tensor", "model"] = field(
        default="tensor", metadata={"help": "trim each tensor by itself, or over the whole model as in the paper"}
    )

    @property
    def measured(self) -> bool:
        return self.scope == "model"

    def settle(self, counts: Tensor) -> float:
        return histogram_threshold(counts, self.density)

    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        thresholds: Sequence[float] | None,
    ) -> TaskVector:
        """Two sweeps over the models (elect, then average), so that three tensors are held, whatever their number."""
        import torch

        limits = [
            thresholds[i] if thresholds is not None else kth_magnitude(tau.to_dense(), self.density)
            for i, tau in enumerate(taus)
        ]

        def trimmed(i: int) -> Tensor:
            value = taus[i].to_dense()
            return torch.where(value.abs() >= limits[i], value, 0.0).mul_(weights[i])

        elected = trimmed(0)
        for i in range(1, len(taus)):
            elected += trimmed(i)
        elected.sign_()
        total, share = torch.zeros_like(elected), torch.zeros_like(elected)
        for i, weight in enumerate(weights):
            value = trimmed(i)
            agrees = (value * elected) > 0
            total += torch.where(agrees, value, 0.0)
            share += agrees * abs(weight)
        return Dense(total.div_(share.clamp_min_(torch.finfo(torch.float32).tiny)).mul_(self.scale))
