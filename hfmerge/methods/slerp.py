"""Spherical interpolation between two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hfmerge.methods.base import Survey
from hfmerge.methods.declare import Block, method, option
from hfmerge.methods.trimming import flat_pieces


if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 1.0 - 5e-4
"""|cosine| above which the great circle is undetermined to float32 precision and straight interpolation is used."""


@method(
    "slerp",
    source="shoemake1985slerp",
    needs="tensor",
    laws=lambda self: ("order_free",) if self.t is None else (),
    arity=(2, 2),
    normalises_weights=True,
    of_weights=True,
    survey=lambda self, models, count: Angle(),
)
def slerp(
    block: Block,
    *,
    t: float | None = option(
        None, 0.0, 1.0, "0 is the first model, 1 the second; unset: the second model's share of the weights"
    ),
) -> Tensor:
    """Interpolation of two models' weights along the great circle of each tensor's direction.

    With the angle `w` between the flattened tensors: `sin((1-t) w)/sin(w) * theta_1 + sin(t w)/sin(w) * theta_2`;
    straight interpolation where the tensors are nearly parallel or one of them is zero.
    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, equation for slerp.
    Departure from common practice: the angle is taken in float64 from the weights as they are.

    Computed piece by piece, so that one tensor is held.
    """
    import torch

    first, second = (model.tau for model in block.models)
    found = block.found
    if found is None:
        angle = Angle()
        angle.add((first, second), block.base)
        found = angle.settle()
    if t is None:
        t = block.weights[1] / (block.weights[0] + block.weights[1])
    near, far = arc_shares(t, *found)
    merged = torch.empty_like(first, memory_format=torch.contiguous_format)
    for into, origin, one, other in zip(
        flat_pieces(merged), flat_pieces(block.base()), flat_pieces(first), flat_pieces(second), strict=True
    ):
        torch.add(origin, one, out=into).mul_(near).add_(origin + other, alpha=far).sub_(origin)
    return merged


class Angle(Survey):
    """Squared norms of two models' weights and their inner product, summed in float64."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float, float]] = []

    def add(self, taus: Iterable[Tensor], base: Callable[[], Tensor]) -> None:
        import torch

        first, second = taus
        for origin, near, far in zip(flat_pieces(base()), flat_pieces(first), flat_pieces(second), strict=True):
            one, other = (origin + near).double(), (origin + far).double()
            pairs = ((one, one), (other, other), (one, other))
            squares = [float(torch.dot(left, right)) for left, right in pairs]
            self._sums.append((squares[0], squares[1], squares[2]))

    def settle(self) -> list[float]:
        return [math.fsum(column) for column in zip(*self._sums, strict=True)]


def arc_shares(t: float, first: float, second: float, inner: float) -> tuple[float, float]:
    """Factors of the two ends of an arc at its share t; from their squared norms and inner product."""
    if min(first, second) > 0.0:
        cosine = inner / (math.sqrt(first) * math.sqrt(second))
        if abs(cosine) < PARALLEL:
            angle = math.acos(cosine)
            return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return 1.0 - t, t
