"""Additive folds: the state is an exact sum with one term per model, so models may join in any order and leave.

A sum of floating-point numbers depends on their order, and a term cannot be subtracted again bit for bit. So every
term is rounded to a multiple of one fixed step, `2^-grid`, and the multiples are summed in a type that holds them all
exactly: 53 bits of float64. As long as a sum stays below `2^52` steps, which is checked, additions and subtractions
have no rounding error, and the sum depends on the set of its terms alone. The step is fixed and does not depend on the
models. By default it is 9e-13, far below the last place of any checkpoint's weights, and sums may reach 4096.
`sums: float32` halves the state: 24 bits and a step of 9.5e-7. Then each model's term is off by 4.8e-7 at most, and
sums may reach 8.

Low-rank changes are not summed: their factors are the state, as they are, and are multiplied out, rounded and summed
when the result is read out. Each model's factors stay its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from hfmerge.errors import GridOverflowError
from hfmerge.methods.base import Carry, FoldMethod, Form
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero


if TYPE_CHECKING:
    from torch import Tensor

Sums = Literal["float64", "float32"]

_BITS = {"float64": 53, "float32": 24}
GRIDS = {"float64": 40, "float32": 20}


@dataclass(frozen=True)
class AdditiveFold(FoldMethod):
    """Base of the folds whose state is a sum: a method says what a model's terms are, and what the sums mean.

    The carried state of a block holds one dense sum for each of `terms`, over the models whose change is dense, if
    there are any, and the scaled factors of each other model, called `T1`, `T2`, ... in order of arrival.
    """

    additive: ClassVar[bool] = True
    subtractable: ClassVar[bool] = False

    sums: Sums = field(
        default="float64", metadata={"help": "type of the exact sums; float32 halves the state and is coarser"}
    )
    grid: int | None = field(
        default=None,
        metadata={
            "minimum": -100,
            "maximum": 120,
            "help": "terms are rounded to multiples of 2^-grid (default: 40, or 20 with float32 sums)",
        },
    )

    @property
    def plain_sum(self) -> AdditiveFold | None:
        own = (type(self).taken, type(self).terms, type(self).sum_shapes, type(self).fitted)
        plain = (AdditiveFold.taken, AdditiveFold.terms, AdditiveFold.sum_shapes, AdditiveFold.fitted)
        return self if self.needs == "elements" and own == plain else None

    def scalars(self) -> dict[str, float]:
        return {"grid": self.step_size}

    @property
    def step_size(self) -> float:
        """The step: terms are rounded to multiples of it."""
        return 2.0 ** -(GRIDS[self.sums] if self.grid is None else self.grid)

    @property
    def limit(self) -> float:
        """Largest magnitude that a sum may have."""
        return 2.0 ** (_BITS[self.sums] - 1) * self.step_size

    def multiples(self, changes: Tensor, weights: Sequence[float]) -> Tensor:
        """The terms of several changes, float32 (models, ...), as multiples of the step; takes the place of them."""
        import torch

        # multiplying by a power of two is exact
        factors = [weight / self.step_size for weight in weights]
        if len(set(factors)) == 1:
            return changes.mul_(factors[0]).round_()
        return changes.mul_(torch.tensor(factors, dtype=changes.dtype).view(-1, *[1] * (changes.dim() - 1))).round_()

    def taken(self, tau: TaskVector, weight: float, *, matrix: bool) -> TaskVector:
        """The part of a model that is kept, as factors or as input of `terms`: the change times its weight."""
        return tau.scaled(weight)

    def terms(self, tau: TaskVector, *, matrix: bool) -> dict[str, Tensor]:
        """One model's terms: name -> floating tensor, of the shape `sum_shapes` gives, not rounded yet.

        Args:
            tau: the kept part of the model, see `taken`.
            matrix: the block is a real matrix.
        """
        return {"S": tau.to_dense()}

    def sum_shapes(self, shape: tuple[int, ...], *, matrix: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums of one block of `shape`."""
        return {"S": shape}

    @abstractmethod
    def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
        """The merged task vector of one block from its sums.

        Args:
            sums: name -> float64, over all models.
            weights: of all models.
            matrix: the block is a real matrix.
        """

    def fitted(self, *, low: bool) -> AdditiveFold:
        """The method with options that depend on the kind of changes filled in; `low`: all of them are low-rank."""
        return self

    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """Add one model to the state."""
        held = {name: value for name, value in (carry or {}).items() if not value.is_zero}
        if not isinstance(tau, LowRank):
            return self._with(held, self.taken(tau, weight, matrix=matrix), 1.0, matrix=matrix)
        if tau.is_zero:
            return held or {"T1": tau}
        return {**held, f"T{len(_factors(held)) + 1}": self.taken(tau, weight, matrix=matrix)}

    def unstep(self, carry: Carry, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """Subtract a dense change: the result is bit for bit the state that never held it. Factors: `staying`."""
        return self._with(carry, self.taken(tau, weight, matrix=matrix), -1.0, matrix=matrix)

    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """Multiply out what is kept as factors, add it to the sums, and read them out."""
        if all(value.is_zero for value in carry.values()):
            return carry["T1"]
        fitted, sums = self.totals(carry, matrix=matrix)
        return Dense(fitted.read_out(sums, weights, matrix=matrix))

    def totals(self, carry: Carry, *, matrix: bool) -> tuple[AdditiveFold, dict[str, Tensor]]:
        """The method with its options filled in, and the sums of a state that is not zero, as for `read_out`."""
        low = _factors(carry)
        sums = {name: value for name, value in carry.items() if name not in low}
        fitted = self.fitted(low=not sums)
        for factors in low.values():
            sums = fitted._summed(sums, factors, 1.0, matrix=matrix)
        return fitted, {name: value.to_dense().double() for name, value in sums.items()}

    def carry_form(self, shape: tuple[int, ...], ranks: Sequence[int | None], *, matrix: bool) -> dict[str, Form]:
        dtype = {"float64": "F64", "float32": "F32"}[self.sums]
        # a change that is no matrix has no factors: what does not touch it is a tensor of zeros
        dense = any(rank is None for rank in ranks) or len(shape) != 2
        sums = self.sum_shapes(shape, matrix=matrix) if dense else {}
        low = [rank for rank in ranks if rank]
        if not dense and not low:
            return {"T1": Form(shape, 0, "F32")}
        kept = self.taken(zero(shape), 1.0, matrix=matrix).shape if low else shape
        return {
            **{name: Form(form, None, dtype) for name, form in sums.items()},
            **{f"T{i}": Form(kept, rank, "F32") for i, rank in enumerate(low, 1)},
        }

    def _with(self, carry: Carry, tau: TaskVector, sign: float, *, matrix: bool) -> Carry:
        return {**self.fitted(low=False)._summed(carry, tau, sign, matrix=matrix), **_factors(carry)}

    def _summed(self, sums: Mapping[str, TaskVector], tau: TaskVector, sign: float, *, matrix: bool) -> Carry:
        found: Carry = {}
        for name, term in self.terms(tau, matrix=matrix).items():
            # a plain sum's term is the change itself, whose norm is known by now
            largest = math.sqrt((tau if self.plain_sum is not None else Dense(term)).squared_norm())
            total = sums[name].to_dense() if name in sums else None
            found[name] = Dense(self._added(total, term, sign, largest))
        return found

    def _added(self, total: Tensor | None, term: Tensor, sign: float, largest: float) -> Tensor:
        """`total + sign * term`, the term rounded to the grid; exact, or an error.

        Args:
            largest: bound of the term's magnitudes. Up to a 4096th of the limit nothing is checked: 4096 such terms
                stay below half the limit, and larger ones are checked to leave the other half.
        """
        import torch

        step, dtype = self.step_size, getattr(torch, self.sums)
        # multiplying by a power of two is exact
        multiples = (term * (1.0 / step)).round_()
        if total is None:
            # minus zero becomes zero, because a sum cannot tell the two apart
            result = multiples.mul_(sign * step).add_(0.0).to(dtype)
        else:
            # of one dtype, as mixed ones are slow
            result = multiples.to(dtype)
            torch.add(total.to(dtype), result, alpha=sign * step, out=result)
        limit = self.limit
        if largest * 4096.0 <= limit or not result.numel():
            return result
        low, high = (float(edge) for edge in result.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            # NaN and Inf of the input may stay; a value that became infinite is too large
            large = bool(term.isfinite().all()) and (total is None or bool(total.isfinite().all()))
            finite = term if large else result.nan_to_num(0.0, 0.0, 0.0)
            low, high = float(finite.min()), float(finite.max())
        if max(-low, high) > limit:
            wide = _BITS[self.sums] - math.ceil(math.log2(max(-low, high))) - 5
            raise GridOverflowError(
                f"a sum of {self.name} reaches {max(-low, high):.3g}, and is exact up to {limit:.3g} only; set the "
                f"option `grid` to {wide}, which rounds terms to multiples of {2.0**-wide:.1g}."
            )
        return result


def staying(carry: Carry, ranks: Sequence[int | None], order: Sequence[int]) -> Carry:
    """A state's factors of the models that stay, in their new order, beside its sums.

    Args:
        carry: of an additive fold.
        ranks: per model of it, rank of its change.
        order: indices of those that stay.
    """
    names: dict[int, str] = {}
    for i, rank in enumerate(ranks):
        if rank:
            names[i] = f"T{len(names) + 1}"
    kept = [carry[names[i]] for i in order if i in names]
    sums = {name: value for name, value in carry.items() if name not in names.values()}
    return {**sums, **{f"T{i}": value for i, value in enumerate(kept, 1)}}


def _factors(carry: Mapping[str, TaskVector]) -> Carry:
    return {name: value for name, value in carry.items() if name[0] == "T" and name[1:].isdigit()}
