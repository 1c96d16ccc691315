"""What a merging method is: a frozen dataclass of pure functions over task vectors; its fields are the options.

A **fold** takes one model at a time into a small carried state per block and reads the merged task vector out of it.
A **joint** method sees all models of a block at once. Neither reads files, knows names, or keeps anything on `self`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from hfmerge.errors import UnsupportedError
from hfmerge.task_vector import TaskVector, summed_rank


if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

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


@dataclass(frozen=True)
class MergeMethod:
    """Base of all methods.

    Class attributes:
        name: as written in a recipe.
        arity: least and greatest number of models, the base not counted; None = no bound.
        normalises_weights: the weights are divided by their sum, so a zero sum is an error.
        default_norm: the `norm` a recipe gets when it names none.
        matrixwise: the cost of a matrix is m n min(m, n) (spectral), not m n.
        element_bytes: what a visit of a matrix holds for each element at its peak, if `matrixwise`; measured.
        square_bytes: the same for each element of a square matrix of `square_side`.
        elementwise: every element is computed by itself, so that large tensors may be visited in slices of rows.
        citations: for the card.
    """

    name: ClassVar[str]
    arity: ClassVar[tuple[int, int | None]] = (1, None)
    normalises_weights: ClassVar[bool] = False
    default_norm: ClassVar[str] = "none"
    matrixwise: ClassVar[bool] = False
    element_bytes: ClassVar[int] = 60
    square_bytes: ClassVar[int] = 60
    elementwise: ClassVar[bool] = False
    version: ClassVar[int] = 1
    citations: ClassVar[tuple[Citation, ...]] = ()

    def choices(self, low: int, dense: int) -> list[str]:
        """Lines for the plan on options that the sources decided.

        Args:
            low, dense: number of matrices that adapters alone change, and of the others.
        """
        return []

    def square_side(self, shape: tuple[int, ...], *, low: bool) -> int:
        """Side of the square matrices that a matrixwise method makes of a matrix; `low`: only adapters change it."""
        return min(shape)

    def gap_bound(self, norms: Sequence[float], subtracted: Sequence[int]) -> float | None:
        """Greatest norm by which a merged change with models subtracted may be off the one that never saw them.

        Before `norm` is applied; None, the default, where nothing is known.

        Args:
            norms: per model, greatest norm of its change times its weight over all parameters.
            subtracted: indices of the models that were subtracted.
        """
        return None


@runtime_checkable
class InParts(Protocol):
    """A method whose merged change is `sum w_t d_t`, with parts `d_t` that no weight changes."""

    def parts(self, taus: Sequence[TaskVector], *, matrix: bool) -> list[TaskVector]:
        """All `d_t` of one block; factors stay factors.

        Args:
            taus: of all models, in their order, without weights; zero where a model changes nothing.
            matrix: the block is a real matrix.
        """

    def part_ranks(self, shape: tuple[int, ...], ranks: Sequence[int | None]) -> list[int | None]:
        """Ranks of the parts of a matrix of this shape, from those of the models' changes; None: dense."""


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
    """A continual method: `step` takes one model into the carried state, `emit` reads the merged change out.

    Class attributes:
        additive: the state is a sum of terms of one model each, so that a model leaves exactly (see `AdditiveFold`).
    """

    additive: ClassVar[bool] = False

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


@dataclass(frozen=True)
class JointMethod(MergeMethod, ABC):
    """A method that needs all models of one block at once; `add` and `unmerge` run it again from the sources.

    What it has to know beforehand is found over all parameters (`measure`), or else over the block: by a `survey`
    where that is read in pieces, by `examine` where it is there as a whole.

    Class attributes:
        subtractable: a model with weight 0 still shapes what the others add, so that weight 0 is what `subtract` does.
    """

    subtractable: ClassVar[bool] = False

    @abstractmethod
    def combine(
        self,
        taus: Sequence[TaskVector],
        weights: Sequence[float],
        base: Callable[[], Tensor],
        found: Sequence[float] | None,
    ) -> TaskVector:
        """The merged task vector of one block, before `norm` is applied.

        Args:
            taus: one task vector per model.
            weights: one per model.
            base: gives the base's float32 values of the block when called.
            found: by `measure`, by a `survey` of the block that `taus` are rows of, or by `examine`.
        """

    def survey(self, models: int, count: int) -> Survey | None:
        """What has to be found out about all of a block before `combine` can be given some of its rows at a time.

        None, the default: `combine` needs the whole block.

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
        """What `combine` has to know about a block that is there as a whole; None where it finds that by itself."""
        return None

    def dependent(self, found: Sequence[float]) -> tuple[int, ...]:
        """Models that `combine` leaves out because their change is one of earlier models' over again."""
        return ()
