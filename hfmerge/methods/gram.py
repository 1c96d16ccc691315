"""Merging in closed form, `gram`: the change nearest to every model's on the inputs that its task vector speaks of.

It keeps sums over models only, so a model joins at the cost of one and leaves exactly (see `exact_sum`); joint
merging and merging one by one are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from hfmerge.methods.base import Carry
from hfmerge.methods.batched_linalg import apart
from hfmerge.methods.declare import method
from hfmerge.methods.exact_sum import AdditiveFold
from hfmerge.methods.spectral import directions
from hfmerge.task_vector import Dense, LowRank, TaskVector


if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

Side = Literal["auto", "right", "left"]

FULL_BETA, LOW_BETA = 0.1, 100.0
"""Priors for fine-tunes and for adapters, where `beta` is not given."""


@method(
    "gram",
    source="cheng2025whoever",
    needs="matrix",
    laws=("order_free", "identity_for_one", "scale_equivariant", "linear_in_weights"),
)
@dataclass(frozen=True)
class Gram(AdditiveFold):
    """The change closest to every model's own on the inputs that its task vector speaks of, in closed form.

    For a matrix (out, in), with `tau_t` scaled by its weight,
    `A = sum tau_t C_t`, `G = sum C_t`, `C_t = tau_t^T tau_t / ||tau_t||^2 + (beta / n) I`, the merged change is
    `A G^-1`: the minimum of `sum ||(X - tau_t) C_t^(1/2)||^2`. The rows of a task vector lie in the space of the
    inputs it was trained on, which is why `C_t` may stand for their covariance. `beta` leads from that (0) to the
    plain average (infinity), and takes the place of its missing rank; n is the side that `C_t` is square of. `side:
    left` is the same on `tau^T`. What is no matrix is averaged.

    Adapters are different: the row space of a LoRA change is mostly that of its random `A`, which says little about
    inputs, while `B`, which starts at zero, is all learned. Hence the defaults: of a matrix that some model changes
    densely, `side: right` and beta 0.1; of one that only adapters change, `side: left` and beta 100.

    Source: the objective of WUDI-Merging, arXiv 2503.08099, which it minimises by gradient descent; its closed form is
    that of regression mean, "Dataless Knowledge Fusion", arXiv 2212.09849, with `C_t` in the place of the inputs'
    covariance. The prior is ours.
    """

    learnable: ClassVar[bool] = True
    in_parts: ClassVar[bool] = True
    leaps_at_zero: ClassVar[bool] = True
    square_bytes: ClassVar[int] = 30
    fits_from_state: ClassVar[bool] = True

    beta: float | None = field(
        default=None,
        metadata={"minimum": 1e-6, "help": "towards the plain average (default: 0.1, of adapters alone 100)"},
    )
    side: Side = field(
        default="auto", metadata={"help": "which Gram matrix; auto: right, where only adapters change a matrix left"}
    )

    def fit(self, carry: Carry, change: TaskVector, weights: Sequence[float]) -> tuple[float, float]:
        """`tr(D^T A)` and `tr(D G D^T)`: with them the scale minimises this method's objective, its prior included."""
        if change.is_zero:
            return 0.0, 0.0
        fitted, sums = self.totals(carry, matrix=True)
        assert isinstance(fitted, Gram)
        dense, total = fitted._turned(change.to_dense().double()), fitted._turned(sums["A"])
        return float((dense * total).sum()), float(((dense @ fitted._with_prior(sums, weights)) * dense).sum())

    def fitted(self, *, low: bool) -> Self:
        beta = self.beta if self.beta is not None else LOW_BETA if low else FULL_BETA
        side: Side = self.side if self.side != "auto" else "left" if low else "right"
        return replace(self, beta=beta, side=side)

    def square_side(self, shape: tuple[int, ...], *, low: bool) -> int:
        """Of `G`, which is the larger one of a wide matrix."""
        return shape[0] if self.fitted(low=low).side == "left" else shape[1]

    def choices(self, low: int, dense: int) -> list[str]:
        if self.beta is not None and self.side != "auto":
            return []
        lines = []
        for count, adapters, which in ((dense, False, ""), (low, True, " that adapters alone change")):
            if count:
                taken = self.fitted(low=adapters)
                lines.append(f"gram: {count} matrices{which}: side {taken.side}, beta {taken.beta:g}")
        return lines

    def terms(self, tau: TaskVector, *, matrix: bool) -> dict[str, Tensor]:
        """`A` and `G` of a matrix, without the prior's part of `G`, which depends on the number of models alone."""
        dense = tau.to_dense()
        if not matrix:
            return {"S": dense}
        change = self._turned(dense.double())
        square = float((change * change).sum())
        if square == 0.0:
            return {"A": self._turned(change), "G": change.new_zeros(change.shape[1], change.shape[1])}
        c = (change.T @ change) / square
        prior = self._prior(change.shape[1])
        return {"A": self._turned(change @ c + prior * change), "G": c}

    def parts(self, taus: Sequence[TaskVector], *, matrix: bool) -> list[TaskVector]:
        """`d_t` with which the merged change is `sum w_t d_t` for weights `w_t` that are not zero.

        `C_t` does not depend on the weight of its model, so the result is linear in the weights:
        `d_t = tau_t C_t G^-1`. See `MergeMethod.parts`.
        """
        import torch

        if not matrix:
            return [tau.scaled(1.0 / len(taus)) for tau in taus]
        fitted = self.fitted(low=all(isinstance(tau, LowRank) for tau in taus))
        left = fitted.side == "left"
        size = taus[0].shape[0 if left else 1]
        gram = torch.zeros(size, size, dtype=torch.float64)
        for tau in taus:
            gram += _spoken(*_near(tau, left))
        prior = fitted._prior(size)
        gram.diagonal().add_(len(taus) * prior)
        factor = torch.linalg.cholesky(gram)
        found: list[TaskVector] = []
        for tau in taus:
            near, core = _near(tau, left)
            result = torch.cholesky_solve((near @ _spoken(near, core) + prior * near).T.contiguous(), factor).float()
            result = result if left else result.T.contiguous()
            if not isinstance(tau, LowRank):
                found.append(Dense(result))
            else:
                found.append(LowRank(result, tau.down) if left else LowRank(tau.up, result))
        return found

    def usual_weight(self, models: int) -> float:
        """The weight that it has without learning."""
        return 1.0

    def sum_shapes(self, shape: tuple[int, ...], *, matrix: bool) -> dict[str, tuple[int, ...]]:
        if not matrix:
            return {"S": shape}
        size = shape[0] if self.fitted(low=False).side == "left" else shape[1]
        return {"A": shape, "G": (size, size)}

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """`A G^-1` by Cholesky factors; the average of what is no matrix."""
        import torch

        if not matrix:
            return sums["S"] / len(weights)
        factor = apart(torch.linalg.cholesky, self._with_prior(sums, weights))
        return self._turned(torch.cholesky_solve(self._turned(sums["A"]).T, factor).T)

    def _with_prior(self, sums: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
        """`G` with the prior's part of all models."""
        gram = sums["G"].clone()
        gram.diagonal().add_(len(weights) * self._prior(len(gram)))
        return gram

    def _turned(self, value: Tensor) -> Tensor:
        return value.T.contiguous() if self.side == "left" else value

    def _prior(self, size: int) -> float:
        assert self.beta is not None
        return self.beta / size


@method(
    "flat_gram",
    source=("cheng2025whoever", "marczak2025no"),
    needs="matrix",
    laws=("order_free",),
    default_norm="fit",
    absolute=True,
)
@dataclass(frozen=True)
class FlatGram(Gram):
    """The matrix of `gram` with its singular values raised to a power, at the scale that fits all models.

    `U diag(s^power) V^T` of `A G^-1 = U diag(s) V^T` (see `Gram`), over the numerical rank. A power below 1 makes the
    directions of a matrix, and the matrices among themselves, more equal in strength: 1 is `gram`, 0 keeps directions
    alone, as `iso_c` does with the plain sum. The power changes the unit of the change, so the result depends on the
    scale that `norm` gives it: the default, `fit`, is the one scale for all matrices that minimises gram's objective.
    What is no matrix is averaged, and keeps its scale.

    Source: arXiv 2503.08099 for the objective, arXiv 2502.04959 for equal singular values; the power between them and
    the fitted scale are ours.

    It keeps gram's sums, and so gram's exactness: a model leaves by subtraction.
    """

    learnable: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False

    power: float = field(
        default=0.5, metadata={"minimum": 0.0, "maximum": 1.0, "help": "of the singular values; 1 is `gram`"}
    )

    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """See the class."""
        solved = super().read_out(sums, weights, matrix=matrix)
        if not matrix or self.power == 1.0:
            return solved
        right, singular = directions(solved)
        return ((solved @ right) * singular ** (self.power - 1.0)) @ right.T


def _near(tau: TaskVector, left: bool) -> tuple[Tensor, Tensor | None]:
    """The factor (k, n) on the side that the Gram matrix is square of, and the other's own (k, k); None: identity."""
    if isinstance(tau, LowRank):
        up, down = tau.up.double(), tau.down.double()
        return (up.T, down @ down.T) if left else (down, up.T @ up)
    dense = tau.to_dense().double()
    return (dense.T if left else dense), None


def _spoken(near: Tensor, core: Tensor | None) -> Tensor:
    """`tau^T tau / ||tau||^2`, or that of the transpose, from what `_near` gives: float64 (n, n); zeros for zero."""
    c = near.T @ (near if core is None else core @ near)
    square = float(c.trace())
    return c / square if square > 0.0 else c
