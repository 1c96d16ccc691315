"""Spherical interpolation between two models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hfmerge.methods.base import Citation, JointMethod
from hfmerge.taskvector import Dense, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 1.0 - 5e-4
"""|cosine| above which the great circle is undetermined to float32 precision and straight interpolation is used."""


@dataclass(frozen=True)
class Slerp(JointMethod):
    """Interpolation of two models' weights along the great circle of each tensor's direction.

    With the angle `w` between the flattened tensors: `sin((1-t) w)/sin(w) * theta_1 + sin(t w)/sin(w) * theta_2`;
    straight interpolation where the tensors are nearly parallel or one of them is zero.
    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, equation for slerp.
    Departure from common practice: the angle is taken in float64 from the weights as they are.
    """

    name: ClassVar[str] = "slerp"
    arity: ClassVar[tuple[int, int | None]] = (2, 2)
    normalises_weights: ClassVar[bool] = True
    citations: ClassVar[tuple[Citation, ...]] = (
        Citation(
            "Animating rotation with quaternion curves",
            "https://doi.org/10.1145/325334.325242",
            "@inproceedings{shoemake1985slerp,\n  title     = {Animating rotation with quaternion curves},\n"
            "  author    = {Ken Shoemake},\n  booktitle = {SIGGRAPH},\n  year      = {1985}\n}",
        ),
    )

    t: float | None = field(
        default=None,
        metadata={
            "minimum": 0.0,
            "maximum": 1.0,
            "help": "0 is the first model, 1 the second; unset: the second model's share of the weights",
        },
    )

    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        thresholds: Sequence[float] | None,
    ) -> TaskVector:
        import torch

        t = weights[1] / (weights[0] + weights[1]) if self.t is None else self.t
        origin = base()
        first, second = origin + taus[0].to_dense(), origin + taus[1].to_dense()
        norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (first, second)]
        near, far = 1.0 - t, t
        if min(norms) > 0.0:
            unit = torch.dot(first.reshape(-1).double() / norms[0], second.reshape(-1).double() / norms[1])
            cosine = max(-1.0, min(1.0, float(unit)))
            if abs(cosine) < PARALLEL:
                angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
                near = float(torch.sin((1.0 - t) * angle) / torch.sin(angle))
                far = float(torch.sin(t * angle) / torch.sin(angle))
        return Dense(first.mul_(near).add_(second, alpha=far).sub_(origin))
