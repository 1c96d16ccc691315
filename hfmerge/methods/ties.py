"""TIES: trim small changes, elect one sign per element, average the changes that agree with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from hfmerge.methods.base import Citation, JointMethod, Survey
from hfmerge.methods.trimming import Histograms, KthMagnitudes, kth_magnitude, parts, trim
from hfmerge.task_vector import Dense, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

HELD = 1 << 20
"""Elements of trimmed task vectors that one visit keeps, all models together."""


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

    def survey(self, models: int, count: int) -> Survey:
        return KthMagnitudes(models, count, self.density)

    def measure(self, models: int) -> Histograms | None:
        return Histograms(models, self.density) if self.scope == "model" else None

    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        found: Sequence[float] | None,
    ) -> TaskVector:
        """Two sweeps over the models (elect, then average), so that little more than two tensors are held.

        What is computed on the way lies in pieces that a cache holds (see `trimming.PART`). The task vectors of a
        small block are kept from the first sweep to the second, those of a large one are asked for again.
        """
        import torch

        limits = [
            found[i] if found is not None else kth_magnitude(tau.to_dense(), self.density)
            for i, tau in enumerate(taus)
        ]
        shape = base().shape
        size = math.prod(shape)
        held: dict[int, list[Tensor]] = {}

        def trimmed(model: int) -> Iterable[Tensor]:
            if model in held:
                return held[model]
            pieces = (_weighted(trim(part, limits[model]), weights[model]) for part in parts(taus[model].to_dense()))
            if (len(held) + 1) * size > HELD:
                return pieces
            held[model] = list(pieces)
            return held[model]

        sums = torch.cat(list(trimmed(0)))
        for model in range(1, len(taus)):
            for votes, value in zip(parts(sums), trimmed(model), strict=True):
                votes += value
        # Inf against -Inf elects nothing; a large block's signs take a byte each
        elected = sums.sign().nan_to_num_(0.0) if size * len(taus) <= HELD else _signs(sums)
        sums.zero_()
        shares = torch.zeros_like(sums)
        for model, weight in enumerate(weights):
            for sign, total, share, value in zip(
                parts(elected), parts(sums), parts(shares), trimmed(model), strict=True
            ):
                agreeing = value.mul_(sign.float()).clamp_min_(0.0)
                total += agreeing
                share.add_(agreeing.sign_(), alpha=abs(weight))
        for sign, total, share in zip(parts(elected), parts(sums), parts(shares), strict=True):
            total.mul_(sign.float()).div_(share.clamp_min_(torch.finfo(torch.float32).tiny)).mul_(self.scale)
        return Dense(sums.view(shape))


def _signs(values: Tensor) -> Tensor:
    """-1, 0 or 1 of each element as int8; 0 for NaN."""
    import torch

    signs = torch.empty_like(values, dtype=torch.int8)
    for into, part in zip(parts(signs), parts(values), strict=True):
        into.copy_(part.sign().nan_to_num_(0.0))
    return signs


def _weighted(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1.0 else value.mul_(weight)
