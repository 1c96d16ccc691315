"""The second half of TIES: one sign is elected for each element, and the changes that agree with it are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hfmerge.methods.declare import Block, Member
from hfmerge.methods.trimming import flat_pieces


if TYPE_CHECKING:
    from torch import Tensor

_HELD = 1 << 20
"""Elements of pruned task vectors that one visit keeps, all models together."""


def elected(
    block: Block,
    changed: Callable[[Member], Iterable[Tensor]],
    scale: float,
    *,
    average: bool = True,
    shares: Sequence[float] | None = None,
) -> Tensor:
    """The average of the changes that agree with the elected sign, times `scale`; an elected sign is the sum's.

    Where the changes sum to exactly zero the result is zero. Two sweeps over the models (elect, then average), so
    that little more than two tensors are held. What is computed on the way lies in pieces that a cache holds (see
    `trimming.PART`). The changes of a small block are kept from the first sweep to the second, those of a large one
    are asked for again.

    Args:
        changed: a model's change, pruned and times its weight, as flat float32 pieces (`flat_pieces`) of its own.
        average: divide by the sum of the magnitudes of the agreeing weights; else the agreeing changes are summed.
        shares: a factor of each model in the average, that the election does not count; None: 1.
    """
    import torch

    models, shape = block.models, block.shape
    size = math.prod(shape)
    held: dict[int, list[Tensor]] = {}

    def pieces(model: Member) -> Iterable[Tensor]:
        if model.index in held:
            return held[model.index]
        if (len(held) + 1) * size > _HELD:
            return changed(model)
        held[model.index] = list(changed(model))
        return held[model.index]

    sums = torch.cat(list(pieces(models[0])))
    for model in models[1:]:
        for votes, value in zip(flat_pieces(sums), pieces(model), strict=True):
            votes += value
    # Inf against -Inf elects nothing; a large block's signs take a byte each
    chosen = sums.sign().nan_to_num_(0.0) if size * len(models) <= _HELD else _signs(sums)
    sums.zero_()
    divisors = torch.zeros_like(sums)
    for model in models:
        share = 1.0 if shares is None else shares[model.index]
        for sign, total, divisor, value in zip(
            flat_pieces(chosen), flat_pieces(sums), flat_pieces(divisors), pieces(model), strict=True
        ):
            agreeing = value.mul_(sign.float()).clamp_min_(0.0)
            total.add_(agreeing, alpha=share)
            divisor.add_(agreeing.sign_(), alpha=share * abs(model.weight))
    for sign, total, divisor in zip(flat_pieces(chosen), flat_pieces(sums), flat_pieces(divisors), strict=True):
        total.mul_(sign.float())
        if average:
            total.div_(divisor.clamp_min_(torch.finfo(torch.float32).tiny))
        total.mul_(scale)
    return sums.view(shape)


def times(value: Tensor, weight: float) -> Tensor:
    """`value` times a weight, in place of it."""
    return value if weight == 1.0 else value.mul_(weight)


def _signs(values: Tensor) -> Tensor:
    """-1, 0 or 1 of each element as int8; 0 for NaN."""
    import torch

    signs = torch.empty_like(values, dtype=torch.int8)
    for into, part in zip(flat_pieces(signs), flat_pieces(values), strict=True):
        into.copy_(part.sign().nan_to_num_(0.0))
    return signs
