"""Merging on spheres: `nuslerp`, `multislerp` and `karcher`; directions and lengths are merged apart.

All results lie in the span of the models, so inner products are all that has to be known of a tensor: a large one is
read some rows at a time, and factors of adapters are not multiplied out for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from hfmerge.methods.base import Survey
from hfmerge.methods.declare import Block, method, option, summed
from hfmerge.methods.mdm_oc import Products, gram
from hfmerge.methods.slerp import arc_shares
from hfmerge.methods.trimming import flat_pieces


if TYPE_CHECKING:
    from torch import Tensor

DETERMINED = 1e-6
"""Length of a mean of unit vectors, relative to the sum of its weights, down to which its direction is determined."""


@method(
    "nuslerp",
    source=("goddard2024mergekit", "shoemake1985slerp"),
    needs="tensor",
    laws=("order_free", "scale_equivariant"),
    arity=(2, 2),
    normalises_weights=True,
    survey=lambda self, models, count: Products(models) if self.by == "tensor" else None,
)
def nuslerp(
    block: Block,
    *,
    by: Literal["tensor", "row", "column"] = option(
        "tensor", help="one angle for each tensor, or one for each row or column of a matrix"
    ),
) -> Tensor:
    """Spherical interpolation of two changes, at the second model's share of the weights.

    With the angle `w` between the changes and `t = w_2 / (w_1 + w_2)`:
    `sin((1-t) w)/sin(w) * tau_1 + sin(t w)/sin(w) * tau_2`. Weights that are not of one sign give a `t` outside of 0
    and 1. `slerp` is the same between the models' weights in the place of their changes.

    Source: NuSLERP of arXiv 2403.13257's tool, with a base; the equation is Shoemake's, "Animating rotation with
    quaternion curves", SIGGRAPH 1985. Departures: the straight line is taken where changes are parallel to 5e-4, where
    float32 does not determine the circle, or one is zero; a vector has one angle whatever `by` says.
    """
    import torch

    t = block.weights[1] / math.fsum(block.weights)
    first, second = (model.tau for model in block.models)
    if by == "tensor" or first.dim() < 2:
        products = gram(block.taus) if block.found is None else block.found
        near, far = arc_shares(t, products[0], products[3], products[1])
        return _combined((first, second), (near, far))
    axis = tuple(range(1, first.dim())) if by == "row" else (0,)
    one, other = first.double(), second.double()
    squares = [(a * b).sum(axis, keepdim=True) for a, b in ((one, one), (other, other), (one, other))]
    shares = [arc_shares(t, *(float(v) for v in values)) for values in zip(*map(_flat, squares), strict=True)]
    near_far = torch.tensor(shares, dtype=torch.float64)
    return near_far[:, 0].view(squares[0].shape) * one + near_far[:, 1].view(squares[0].shape) * other


@method(
    "multislerp",
    source="goddard2024mergekit",
    needs="tensor",
    laws=("order_free", "identity_for_one", "scale_equivariant"),
    normalises_weights=True,
    survey=lambda self, models, count: Products(models),
)
def multislerp(block: Block) -> Tensor:
    """The weighted mean direction of the changes, at the weighted mean of their lengths.

    `sum w_t ||tau_t|| / sum w_t` times the direction of `sum w_t tau_t / ||tau_t||`, norms over each tensor.

    Source: Multi-SLERP of arXiv 2403.13257's tool, which projects the directions into the tangent space at their
    weighted mean, averages there and projects back. That average is zero: the part of `sum w_t u_t` that is orthogonal
    to `sum w_t u_t` itself. So the equation here is the same in closed form. Departures: a change of zero has length 0
    and no direction; where the directions cancel to 1e-6 of their weights, the merged change is the weighted average.
    """
    products = gram(block.taus) if block.found is None else block.found
    return _combined((model.tau for model in block.models), _barycentre(products, block.weights))


@method(
    "karcher",
    source="karcher1977center",
    needs="tensor",
    laws=("order_free", "identity_for_one"),
    normalises_weights=True,
    of_weights=True,
    survey=lambda self, models, count: OfModels(models),
)
def karcher(
    block: Block,
    *,
    steps: int = option(100, 1, 10_000, "most steps of the iteration"),
    tolerance: float = option(1e-8, 0.0, 1.0, "step length, as an angle, at which the iteration ends"),
) -> Tensor:
    """The Riemannian mean of the models on the sphere of each tensor's directions, at the weighted mean length.

    With unit tensors `u_t = theta_t / ||theta_t||`, the point m of the sphere at which
    `sum w_t log_m(u_t) = 0`, `log_m(u) = a / sin(a) (u - cos(a) m)`, a the angle between m and u: found by
    `m <- exp_m(sum w_t log_m(u_t) / sum w_t)` from the weighted mean direction on. The merged tensor is
    `sum w_t ||theta_t|| / sum w_t * m`. The base is none of the models, unless the recipe names it as one.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977. Departures: m is a combination of the
    u_t, so the iteration runs in float64 on its coefficients, from the inner products alone; a model that is zero in a
    tensor does not take part in it; where the mean direction is undetermined to 1e-6, or a model lies opposite to it,
    the tensor is averaged.
    """
    products = block.found
    if products is None:
        survey = OfModels(len(block.models))
        survey.add((model.tau for model in block.models), block.base)
        products = survey.settle()
    shares = _mean_on_sphere(products, block.weights, steps, tolerance)
    # the merged tensor less the base, without the rounding that a subtraction of the two would have
    rest = block.base() * (math.fsum(shares) - 1.0)
    return rest.add_(_combined((model.tau for model in block.models), shares))


class OfModels(Survey):
    """The Gram matrix of the models' weights, the sums of base and change; settles on it row by row."""

    def __init__(self, models: int):
        self._products = Products(models)

    def add(self, taus: Iterable[Tensor], base: Callable[[], Tensor]) -> None:
        for origin, *changes in zip(flat_pieces(base()), *map(flat_pieces, taus), strict=True):
            self._products.add((origin.double() + change for change in changes), base)

    def settle(self) -> list[float]:
        return self._products.settle()


def _combined(taus: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """`sum_t c_t tau_t`, one change at a time."""
    return summed(tau * share for tau, share in zip(taus, shares, strict=True))


def _barycentre(products: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Coefficients of the changes in the mean direction at the mean length; see `multislerp`."""
    import torch

    count, total = len(weights), math.fsum(weights)
    gram_matrix = torch.tensor(products, dtype=torch.float64).view(count, count)
    lengths = gram_matrix.diagonal().clamp_min(0.0).sqrt()
    inverse = torch.where(lengths > 0.0, 1.0 / lengths, 0.0)
    own = torch.tensor([weight / total for weight in weights], dtype=torch.float64)
    direction = _unit(own * (lengths > 0.0), gram_matrix * inverse[:, None] * inverse)
    shares = own if direction is None else float((own * lengths).sum()) * direction * inverse
    return [float(share) for share in shares]


def _mean_on_sphere(products: Sequence[float], weights: Sequence[float], steps: int, tolerance: float) -> list[float]:
    """Coefficients of the models in their Karcher mean at the mean length; see `karcher`."""
    import torch

    count, total = len(weights), math.fsum(weights)
    average = [weight / total for weight in weights]
    gram_matrix = torch.tensor(products, dtype=torch.float64).view(count, count)
    lengths = gram_matrix.diagonal().clamp_min(0.0).sqrt()
    inverse = torch.where(lengths > 0.0, 1.0 / lengths, 0.0)
    cosines = gram_matrix * inverse[:, None] * inverse
    present = (lengths > 0.0).double()
    shares = torch.tensor(average, dtype=torch.float64) * present
    if float(shares.sum().abs()) <= DETERMINED:
        return average
    own = shares / shares.sum()
    # the mean is `at` in the unit tensors
    at = _unit(own, cosines)
    for _ in range(steps):
        if at is None:
            return average
        cosine = (cosines @ at).clamp(-1.0, 1.0)
        if bool(((cosine < DETERMINED - 1.0) & (present > 0.0)).any()):
            return average
        angle = cosine.acos()
        weighed = own * torch.where(angle > 0.0, angle / angle.sin(), 1.0)
        step = weighed - float((weighed * cosine).sum()) * at
        size = _length(cosines, step)
        at = _unit(math.cos(size) * at + (math.sin(size) / size if size > 0.0 else 1.0) * step, cosines)
        if size <= tolerance:
            break
    if at is None:
        return average
    mean = float((torch.tensor(average, dtype=torch.float64) * lengths).sum())
    return [float(value) for value in mean * at * inverse]


def _unit(shares: Tensor, products: Tensor) -> Tensor | None:
    """Coefficients of the direction of a combination; None where it is undetermined."""
    size = _length(products, shares)
    return shares / size if size > DETERMINED * float(shares.abs().sum()) else None


def _length(products: Tensor, shares: Tensor) -> float:
    """Length of a combination of tensors, from their Gram matrix; float64."""
    return math.sqrt(max(float(shares @ products @ shares), 0.0))


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1)
