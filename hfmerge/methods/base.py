"""What a merging method is: a frozen dataclass of pure functions over task vectors; its fields are the options.

A **fold** takes one model at a time into a small carried state per block and reads the merged task vector out of it.
A **joint** method sees all models of a block at once. Neither reads files or keeps anything on `self`; what a joint
method knows of a block's place it is told (`Site`).
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

    from hfmerge.methods.spectral import Variant

Carry = dict[str, TaskVector]
"""The carried state of one block: named task vectors. It is never normalised; read-outs are."""

Scalars = dict[str, float]
"""Global numbers a read-out may need; the executor sums them over all parameters with `math.fsum`."""


@dataclass(frozen=True)
class Citation:
    """The publication a method comes from."""

    title: str
    url: str
    bibtex: str


Needs = Literal["elements", "tensor", "matrix", "model"]
"""What a method has to be given at once.

elements: nothing but the element itself, so that a tensor may be visited in any rows.
tensor: a whole tensor or matrix, unless a `survey` finds out beforehand what is needed of it.
matrix: a whole real matrix, which is taken apart, on an accelerator if the run has one; other tensors are whole too.
model: numbers about all parameters, which a `measure` finds in a pass of its own; then as `tensor`.
"""

Law = Literal["order_free", "identity_for_one", "scale_equivariant", "linear_in_weights"]
"""What may hold for a method, up to rounding; of options that are numbers, with their defaults.

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
        element_bytes: what a visit of a matrix holds for each element at its peak, if it needs matrices; measured.
        square_bytes: the same for each element of a square matrix of `square_side`.
        of_weights: the method is about the models' weights themselves, so that the base may be one of the models.
        is_fold: it is a `FoldMethod`.
        additive: its state is a sum of terms of one model each, so that a model leaves exactly (see `AdditiveFold`).
        subtractable: `unmerge --mode subtract` is possible: what a model itself brought can be left out alone.
        learnable: the weights can be learned: the merged change is `sum_s (M a)_s d_s`, see `parts` and `mixing`.
        in_parts: the `d_s` are not the changes themselves but have to be computed from all of them.
        leaps_at_zero: a model of weight 0 is as if it were not there, so that the merge leaps where a weight gets 0.
        citations: for the card.
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
    is_fold: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    subtractable: ClassVar[bool] = False
    learnable: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False
    leaps_at_zero: ClassVar[bool] = False
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
        """The method, if all it keeps is the exact sum of the weighted changes, element by element; else None."""
        return None

    @property
    def projection(self) -> tuple[float, Variant] | None:
        """`alpha` and `variant` of OPCM's projection, if the method clears with it what earlier models occupy."""
        return None

    def holds(self, law: Law) -> bool:
        """Whether a law holds with these options."""
        return law in self.laws

    def files(self) -> tuple[str, ...]:
        """Files of every model that are read beside its weights: what options name that are of `declare.tensors`."""
        named = [getattr(self, one.name) for one in dataclasses.fields(self) if one.metadata.get("tensors")]
        return tuple(dict.fromkeys(file for file in named if file is not None))

    def scalars(self) -> dict[str, float]:
        """Numbers that the ledger records of the method beside its options."""
        return {}

    def choices(self, low: int, dense: int) -> list[str]:
        """Lines for the plan on options that the sources decided.

        Args:
            low, dense: number of matrices that adapters alone change, and of the others.
        """
        return []

    def square_side(self, shape: tuple[int, ...], *, low: bool) -> int:
        """Side of the square matrices that a method of matrices makes of one; `low`: only adapters change it."""
        return min(shape)

    def gap_bound(self, norms: Sequence[float], subtracted: Sequence[int]) -> float | None:
        """Greatest norm by which a merged change with models subtracted may be off the one that never saw them.

        Before `norm` is applied; None, the default, where nothing is known.

        Args:
            norms: per model, greatest norm of its change times its weight over all parameters.
            subtracted: indices of the models that were subtracted.
        """
        return None

    def survey(self, models: int, count: int) -> Survey | None:
        """What has to be found out about all of a block before some of its rows can be merged at a time.

        None, the default: the whole block is needed, or none of it.

        Args:
            models: number of task vectors.
            count: elements of the block.
        """
        return None

    def measure(self, models: int) -> Measure | None:
        """What a first pass has to find out about all merged parameters; None, the default: there is no such pass.

        Args:
            models: number of task vectors.
        """
        return None

    def examine(self, taus: Sequence[TaskVector]) -> list[float] | None:
        """What has to be known about a block that is there as a whole; None where the method finds that by itself."""
        return None

    def parts(self, taus: Sequence[TaskVector], *, matrix: bool) -> list[TaskVector]:
        """All `d_s` of one block (see `learnable`), which no weight changes; factors stay factors.

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
            None where it depends on what is found.
        """
        return [[float(i == j) for j in range(models)] for i in range(models)]

    def usual_weight(self, models: int) -> float:
        """Weight of every model at which learning starts, unless a recipe says otherwise."""
        return 1.0 / math.sqrt(models)


class PlainSum(Protocol):
    """What is asked of a method that is a plain sum (see `MergeMethod.plain_sum`), to take all models at once."""

    @property
    def step_size(self) -> float:
        """What terms are rounded to multiples of."""

    @property
    def limit(self) -> float:
        """What sums may reach."""

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
        """What `subtract` makes of the state: without `weight * tau`, which is exact only where the fold is additive.

        Args:
            carry: the state after the last model, as its form says.
            tau, weight, matrix: as the model came in.

        Raises:
            UnsupportedError: nothing of the state belongs to one model alone.
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
        """How far `step` with the same arguments is from what the method says, relative to `weight * tau`.

        None where nothing is approximated. Costs as much as an exact step and more, so it is asked for a sample of
        blocks.
        """
        return None

    def carry_form(self, shape: tuple[int, ...], ranks: Sequence[int | None], *, matrix: bool) -> dict[str, Form]:
        """Which tensors the state holds, known before the work; carried values are rounded to these dtypes.

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
        """Take in some rows: one float32 tensor per model, and the base's values when called."""

    @abstractmethod
    def settle(self) -> list[float] | None:
        """What was found, as `combine` takes it; None where all rows have to be added once more."""


class Measure(ABC):
    """Numbers about all merged parameters together, found beside each other on the threads and processes of a run.

    Call sequence: for every parameter, or every piece of one if `tiled`, `add` gets what `find` yields; `join` takes
    in what other processes have; `settle`. The result must depend on no order: sums of integers, or `math.fsum`.
    """

    tiled: ClassVar[bool] = False

    @abstractmethod
    def find(self, taus: Sequence[TaskVector]) -> Iterator[Any]:
        """What one piece tells, from one task vector per model, each read when it is indexed; changes nothing."""

    @abstractmethod
    def add(self, found: Any) -> None:
        """Take in one thing that `find` gave."""

    @abstractmethod
    def join(self, other: Self) -> None:
        """Take in all that another process has."""

    @abstractmethod
    def settle(self) -> list[float]:
        """What was found, as `combine` takes it."""


def _nowhere(*asked: object) -> Any:
    raise LookupError("what is outside of a block's tensors can be asked for in a merge only")


@dataclass(frozen=True, eq=False)
class Site:
    """Where a block lies, and what is known of it beside the changes.

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

    What it has to know beforehand is found over all parameters (`measure`), or else over the block: by a `survey`
    where that is read in pieces, by `examine` where it is there as a whole.

    Where it is `subtractable`, a model with weight 0 still shapes what the others add, and weight 0 is what
    `unmerge --mode subtract` does.
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
            found: by `measure`, by a `survey` of the block that `taus` are rows of, or by `examine`.
            site: where the block lies.
        """

    def dependent(self, found: Sequence[float]) -> tuple[int, ...]:
        """Models that `combine` leaves out because their change is one of earlier models' over again."""
        return ()
