"""Base classes of merging methods. A method is a frozen dataclass of pure functions; its fields are the options.

A **fold** takes one model at a time into a small carried state per block, and computes the merged task vector from the
state. A **joint** method gets all models of a block at once. Neither reads files or stores anything on `self`. A joint
method is told where the block lies (`Site`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from hfmerge.errors import UnsupportedError
from hfmerge.task_vector import TaskVector, summed_rank


if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from hfmerge.methods.spectral import OpcmVariant

Carry = dict[str, TaskVector]
"""The carried state of one block: named task vectors. It is never normalised; only the merged change is."""

Scalars = dict[str, float]
"""Global numbers a read-out may need; the executor sums them over all parameters with `math.fsum`."""


@dataclass(frozen=True)
class Citation:
    """The publication a method comes from."""

    title: str
    url: str
    bibtex: str


Needs = Literal["elements", "tensor", "matrix", "model"]
"""The piece of the input that a method needs at once.

elements: single elements, so a tensor may be visited in any rows.
tensor: a whole tensor or matrix, unless a `survey` finds the necessary numbers beforehand.
matrix: a whole real matrix, which the method decomposes, on an accelerator if the run has one. Other tensors are given
    whole too.
model: numbers about all parameters, which a `measure` finds in a first pass; then as `tensor`.
"""

Law = Literal["order_free", "identity_for_one", "scale_equivariant", "linear_in_weights"]
"""Laws that a method may declare. They hold up to rounding, with the default values of numeric options.

order_free: models in another order, with their weights, give the same merge.
identity_for_one: one model of weight 1 is merged to itself.
scale_equivariant: twice the task vectors on the same base give twice the merged task vector.
linear_in_weights: with weights `a + b`, none of them 0, the merged change is that of `a` plus that of `b`.
"""


@dataclass(frozen=True)
class MergeMethod:
    """Base of all methods; `declare.method` sets the class attributes that a declaration names.

    Class attributes:
        name: as written in a recipe.
        arity: least and greatest number of models, the base not counted; None = no bound.
        needs: see `Needs`.
        laws: see `Law` and `holds`.
        normalises_weights: the weights are divided by their sum, so a zero sum is an error.
        default_norm: the `norm` a recipe gets when it names none.
        element_bytes: for methods that need matrices: measured peak memory of a visit, in bytes per matrix element.
        square_bytes: the same per element of a square matrix of side `square_side`.
        of_weights: the method combines the models' weights themselves, so the base may be one of the models.
        absolute: a size in units of the weights counts: twice the base and the models do not give twice the change.
        is_fold: the method is a `FoldMethod`.
        additive: the state is a sum with one term per model, so a model leaves exactly (see `AdditiveFold`).
        subtractable: `unmerge --mode subtract` is possible: the term of one model can be subtracted alone.
        learnable: the weights can be learned: the merged change is `sum_s (M a)_s d_s`, see `parts` and `mixing`.
        in_parts: the `d_s` are not the changes themselves; they are computed from all changes.
        leaps_at_zero: a model of weight 0 counts as absent, so the merge is not continuous at weight 0.
        fits_from_state: of a fold: its state holds what `norm: fit` needs, see `FoldMethod.fit`.
        citations: publications for the card.
    """

    name: ClassVar[str]
    arity: ClassVar[tuple[int, int | None]] = (1, None)
    needs: ClassVar[Needs] = "tensor"
    laws: ClassVar[tuple[Law, ...]] = ()
    normalises_weights: ClassVar[bool] = False
    default_norm: ClassVar[str] = "none"
    element_bytes: ClassVar[int] = 60
    square_bytes: ClassVar[int] = 60
    of_weights: ClassVar[bool] = False
    absolute: ClassVar[bool] = False
    is_fold: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    subtractable: ClassVar[bool] = False
    learnable: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False
    leaps_at_zero: ClassVar[bool] = False
    fits_from_state: ClassVar[bool] = False
    version: ClassVar[int] = 1
    citations: ClassVar[tuple[Citation, ...]] = ()

    @property
    def fold(self) -> FoldMethod | None:
        """The method as a fold; None if it is joint."""
        return None

    @property
    def joint(self) -> JointMethod | None:
        """The method as a joint one; None if it is a fold."""
        return None

    @property
    def plain_sum(self) -> PlainSum | None:
        """The method, if its state is only the exact sum of the weighted changes, element by element; else None."""
        return None

    @property
    def projection(self) -> tuple[float, OpcmVariant] | None:
        """`alpha` and `variant` of OPCM's projection, if the method projects changes in this way; else None."""
        return None

    def holds(self, law: Law) -> bool:
        """Whether a law holds with these options."""
        return law in self.laws

    def files(self) -> tuple[str, ...]:
        """Files of every model that are read beside its weights: the values of options made by `declare.tensors`."""
        named = [getattr(self, one.name) for one in dataclasses.fields(self) if one.metadata.get("tensors")]
        return tuple(dict.fromkeys(file for file in named if file is not None))

    def scalars(self) -> dict[str, float]:
        """Further numbers that the ledger records for the method."""
        return {}

    def choices(self, low: int, dense: int) -> list[str]:
        """Lines for the plan on options that the sources decided.

        Args:
            low: number of matrices that only adapters change.
            dense: number of the other matrices.
        """
        return []

    def square_side(self, shape: tuple[int, ...], *, low: bool) -> int:
        """Side of the square matrices that a method of matrices makes of one; `low`: only adapters change it."""
        return min(shape)

    def gap_bound(self, norms: Sequence[float], subtracted: Sequence[int]) -> float | None:
        """Upper bound of the gap of a subtraction: distance to the merged change that never saw the models.

        The bound holds before `norm` is applied. None, the default: the method has no bound.

        Args:
            norms: per model, greatest norm of its change times its weight over all parameters.
            subtracted: indices of the models that were subtracted.
        """
        return None

    def survey(self, models: int, count: int) -> Survey | None:
        """A survey of the whole block, if the method needs one before it merges the block some rows at a time.

        None, the default: the method needs the whole block at once, or needs no survey.

        Args:
            models: number of task vectors.
            count: elements of the block.
        """
        return None

    def measure(self, models: int) -> Measure | None:
        """The measurement that a first pass makes over all merged parameters; None, the default: no such pass.

        Args:
            models: number of task vectors.
        """
        return None

    def examine(self, taus: Sequence[TaskVector]) -> list[float] | None:
        """Numbers that `combine` needs about a block that is given whole; None if the method needs none."""
        return None

    def parts(self, taus: Sequence[TaskVector], *, matrix: bool) -> list[TaskVector]:
        """All `d_s` of one block (see `learnable`). They do not depend on the weights. Factors stay factors.

        Args:
            taus: of all models, in their order, without weights; zero where a model changes nothing.
            matrix: the block is a real matrix.
        """
        return list(taus)

    def part_ranks(self, shape: tuple[int, ...], ranks: Sequence[int | None]) -> list[int | None]:
        """Ranks of the parts of a matrix of this shape, from those of the models' changes; None: dense."""
        return list(ranks)

    def mixing(self, models: int, found: Sequence[float] | None) -> list[list[float]] | None:
        """Rows of M (see `learnable`), models x models: the identity, unless a method says otherwise.

        Args:
            models: number of task vectors.
            found: by `examine`, of a block or summed over all; None at first.

        Returns:
            None if M depends on `found`.
        """
        return [[float(i == j) for j in range(models)] for i in range(models)]

    def usual_weight(self, models: int) -> float:
        """Initial weight of every model in learning, unless the recipe sets another."""
        return 1.0 / math.sqrt(models)


class PlainSum(Protocol):
    """Interface of a method that is a plain sum (see `MergeMethod.plain_sum`), to compute all models at once."""

    @property
    def step_size(self) -> float:
        """The step: terms are rounded to multiples of it."""

    @property
    def limit(self) -> float:
        """Largest magnitude that a sum may have."""

    def multiples(self, changes: Tensor, weights: Sequence[float]) -> Tensor:
        """The terms of several changes, float32 (models, ...), as multiples of the step; takes the place of them."""

    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """The merged task vector of one block from its state, the sum `S`."""


@dataclass(frozen=True)
class Form:
    """How one carried tensor is stored: its shape, the rank of its factors (None: dense), its safetensors dtype.

    Factors are `up` (m, rank) and `down` (rank, n); of rank 0 nothing is stored.
    """

    shape: tuple[int, ...]
    rank: int | None
    dtype: str


@dataclass(frozen=True)
class FoldMethod(MergeMethod, ABC):
    """A continual method: `step` takes one model into the carried state, `emit` reads the merged change out."""

    is_fold: ClassVar[bool] = True
    subtractable: ClassVar[bool] = True

    @property
    def fold(self) -> FoldMethod:
        return self

    @abstractmethod
    def step(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """Take one model into the state of one block.

        Args:
            carry: the state so far, None before the first model.
            tau: the model's task vector in this block.
            weight: of the model.
            matrix: the block is a real matrix (out, in).
        """

    def unstep(self, carry: Carry, tau: TaskVector, weight: float, *, matrix: bool) -> Carry:
        """Subtract `weight * tau` from the state. This is exact only for an additive fold.

        Args:
            carry: the state after the last model, in the form of `carry_form`.
            tau, weight, matrix: as in the `step` of the model.

        Raises:
            UnsupportedError: the state has no term that belongs to one model alone.
        """
        raise UnsupportedError(f"{self.name}: no model can be subtracted; unmerge it exactly.")

    @abstractmethod
    def emit(self, carry: Carry, weights: Sequence[float], *, matrix: bool) -> TaskVector:
        """The merged task vector of one block, before `norm` is applied.

        Args:
            carry: the state after the last model.
            weights: of all models in it, in order.
            matrix: the block is a real matrix (out, in).
        """

    def deviation(self, carry: Carry | None, tau: TaskVector, weight: float, *, matrix: bool) -> float | None:
        """Distance of an approximate `step` from the exact step with the same arguments, relative to `weight * tau`.

        None if the step is exact. It costs more than an exact step, so it is measured on a sample of blocks.
        """
        return None

    def fit(self, carry: Carry, change: TaskVector, weights: Sequence[float]) -> tuple[float, float] | None:
        """A matrix's part of the scale of `norm: fit`, see `methods.fit`; None: the state does not hold it.

        Args:
            carry: the state of a matrix after the last model.
            change: what `emit` made of it.
            weights: of all models in it, in order.
        """
        return None

    def carry_form(self, shape: tuple[int, ...], ranks: Sequence[int | None], *, matrix: bool) -> dict[str, Form]:
        """The tensors of the state, from shapes and ranks alone. Carried values are rounded to these dtypes.

        Args:
            shape: of the block.
            ranks: per model, rank of its factors, 0 for a zero change, None for a dense one.
            matrix: the block is a real matrix.
        """
        return {"S": Form(shape, summed_rank(shape, ranks), "F64")}


SAMPLED = 16
"""One in so many rows is given to a survey that samples."""


class Survey(ABC):
    """Numbers about all rows of a block, found as it is read some rows at a time.

    Call sequence: `sample`, if `samples`, with one in `SAMPLED` rows from everywhere; then `add` with all rows, in any
    cut, and `settle`; both again while that is None.
    """

    samples: ClassVar[bool] = False

    def sample(self, taus: Iterable[Tensor]) -> None:
        """Look at a few rows: one tensor per model."""
        raise NotImplementedError

    @abstractmethod
    def add(self, taus: Iterable[Tensor], base: Callable[[], Tensor]) -> None:
        """Add some rows: one float32 tensor per model, and a function that gives the base's values."""

    @abstractmethod
    def settle(self) -> list[float] | None:
        """The result, as `combine` takes it; None if all rows have to be added again."""


class Measure(ABC):
    """Numbers about all merged parameters together, found beside each other on the threads and processes of a run.

    Call sequence: for every parameter, or every piece of one if `tiled`, `add` gets what `find` yields; `join` takes
    in what other processes have; `settle`. The result must depend on no order: sums of integers, or `math.fsum`.
    """

    tiled: ClassVar[bool] = False

    @abstractmethod
    def find(self, taus: Sequence[TaskVector]) -> Iterator[Any]:
        """The measurement of one piece, from one task vector per model, each read when indexed; pure."""

    @abstractmethod
    def add(self, measured: Any) -> None:
        """Add one result of `find`."""

    @abstractmethod
    def join(self, other: Self) -> None:
        """Add all results of another process."""

    @abstractmethod
    def settle(self) -> list[float]:
        """The result, as `combine` takes it."""


def _nowhere(*asked: object) -> Any:
    raise LookupError("what is outside of a block's tensors can be asked for in a merge only")


@dataclass(frozen=True, eq=False)
class Site:
    """The place of a block, and facts about it.

    Attributes:
        key: name of the parameter; of a matrix inside a fused one "name#part".
        shape: of the block; None: that of the base's values.
        matrix: the block is a real matrix (out, in).
        first: elements of the parameter before the block's first; not 0 where some of its rows are visited.
        device: where the block is computed, as torch names it.
        pin: model -> the commit of its repository, or the digest of its folder.
        tensor: file and model -> what that file of the model holds for the block, float32, on the device.
    """

    key: str = ""
    shape: tuple[int, ...] | None = None
    matrix: bool = False
    first: int = 0
    device: str = "cpu"
    pin: Callable[[int], str] = _nowhere
    tensor: Callable[[str, int], Tensor] = _nowhere


NOWHERE = Site()


@dataclass(frozen=True)
class JointMethod(MergeMethod, ABC):
    """A method that needs all models of one block at once; `add` and `unmerge` run it again from the sources.

    A method may need numbers beforehand. `measure` finds them over all parameters. `survey` finds them over a block
    that is read in pieces, `examine` over a block that is given whole.

    In a `subtractable` method, a model of weight 0 still changes the terms of the others. `unmerge --mode subtract`
    sets the weight of a model to 0.
    """

    @property
    def joint(self) -> JointMethod:
        return self

    @abstractmethod
    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        found: Sequence[float] | None,
        site: Site = NOWHERE,
    ) -> TaskVector:
        """The merged task vector of one block, before `norm` is applied.

        Args:
            taus: one task vector per model.
            weights: one per model.
            base: gives the base's float32 values of the block when called.
            found: result of `measure`, of a `survey` of the block, or of `examine`.
            site: where the block lies.
        """

    def dependent(self, found: Sequence[float]) -> tuple[int, ...]:
        """Models that `combine` leaves out because their change is a combination of changes of earlier models."""
        return ()
