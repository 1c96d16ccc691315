"""Task vectors: the difference of one model to the base in one parameter, dense or as low-rank factors.

Methods see `TaskVector` only and never ask which kind it is. What a method handles at once is a block: a real matrix
of a fused or stacked tensor, or the whole tensor. A `Segment` says where it lies in the stored one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Where a block, one independent piece, lies in a stored tensor.

    Attributes:
        label: "" for the whole tensor, else what it is ("q", "experts.3.gate").
        matrix: True for a real 2-D linear map, False for anything else (bias, norm, embedding, convolution).
        transposed: the stored matrix is (in, out), as in GPT-2's `Conv1D`; methods get it as (out, in).
        expert: index into axis 0 of a 3-D stack, taken before `axis` counts; None without a stack.
        axis: 0 (rows) or 1 (columns) of the 2-D stored matrix along which `ranges` select; None for all of it.
        ranges: half-open index ranges along `axis`, in order (several for interleaved heads).
    """

    label: str = ""
    matrix: bool = False
    transposed: bool = False
    expert: int | None = None
    axis: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def is_whole(self) -> bool:
        """The block is the stored tensor as it lies."""
        return self.expert is None and self.axis is None and not self.transposed

    def take(self, stored: Tensor) -> Tensor:
        """The block of `stored` in the form that methods get: (out, in) for a matrix, else the stored shape."""
        piece = stored if self.expert is None else stored[self.expert]
        if self.axis is not None:
            piece = _select(piece, self.axis, self.ranges)
        return piece.T if self.transposed else piece

    def put(self, stored: Tensor, value: Tensor) -> None:
        """Write `value`, shaped as `take` returns it, back into its place in `stored`."""
        piece = stored if self.expert is None else stored[self.expert]
        value = value.T if self.transposed else value
        if self.axis is None:
            piece.copy_(value)
            return
        at = 0
        for start, stop in self.ranges:
            piece.narrow(self.axis, start, stop - start).copy_(value.narrow(self.axis, at, stop - start))
            at += stop - start

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `take` for a tensor of shape `stored`, from the shape alone."""
        shape = list(stored if self.expert is None else stored[1:])
        if self.axis is not None:
            shape[self.axis] = sum(stop - start for start, stop in self.ranges)
        return tuple(reversed(shape)) if self.transposed else tuple(shape)


WHOLE = Segment()


def _select(tensor: Tensor, axis: int, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    import torch

    pieces = [tensor.narrow(axis, start, stop - start) for start, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)


class TaskVector:
    """A change of one parameter block: `Dense` or `LowRank`. Arithmetic keeps factors while that is cheaper.

    Values are float32, or float64 where a method carries its state so; sums over elements are taken in float64.
    """

    shape: tuple[int, ...]

    def to_dense(self) -> Tensor:
        """The change as one tensor of `shape`."""
        raise NotImplementedError

    def squared_norm(self) -> float:
        """Squared Frobenius norm, accumulated in float64."""
        raise NotImplementedError

    def inner(self, other: TaskVector) -> float:
        """Frobenius inner product with a task vector of the same shape, accumulated in float64."""
        raise NotImplementedError

    def scaled(self, factor: float) -> TaskVector:
        """`factor` times this change."""
        raise NotImplementedError

    def to(self, target: torch.device | torch.dtype | str) -> TaskVector:
        """The same change with its tensors on a device or of a dtype."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The stored form: {"": dense} or {".up": (m, k), ".down": (k, n)}."""
        raise NotImplementedError

    @property
    def is_zero(self) -> bool:
        """True when the change is zero by its form alone (rank 0), without looking at values."""
        return False

    def __mul__(self, factor: float) -> TaskVector:
        return self.scaled(factor)

    __rmul__ = __mul__

    def plus(self, other: TaskVector, factor: float) -> TaskVector:
        """`self + factor * other`, in one pass over dense values."""
        if isinstance(self, LowRank) and isinstance(other, LowRank):
            return _concatenate(self, other.scaled(factor))
        import torch

        return Dense(torch.add(self.to_dense(), other.to_dense(), alpha=factor))

    def __add__(self, other: TaskVector) -> TaskVector:
        return self.plus(other, 1.0)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + other.scaled(-1.0)


@dataclass(frozen=True, eq=False)
class Dense(TaskVector):
    """A change given element by element: `value` is floating, of any shape."""

    value: Tensor
    _square: float | None = field(default=None, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.value.shape)

    def to_dense(self) -> Tensor:
        return self.value

    def squared_norm(self) -> float:
        if self._square is None:
            # asked for more than once; nobody changes a value that is part of a task vector
            object.__setattr__(self, "_square", squared_norm(self.value))
        assert self._square is not None
        return self._square

    def inner(self, other: TaskVector) -> float:
        import torch

        if isinstance(other, LowRank):
            return other.inner(self)
        return float(torch.dot(self.value.reshape(-1).double(), other.to_dense().reshape(-1).double()))

    def scaled(self, factor: float) -> TaskVector:
        return self if factor == 1.0 else Dense(self.value * factor)

    def to(self, target: torch.device | torch.dtype | str) -> TaskVector:
        return Dense(self.value.to(target))

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.value}


@dataclass(frozen=True, eq=False)
class LowRank(TaskVector):
    """A change of a matrix as `up @ down`: `up` (m, k) and `down` (k, n), floating; k = 0 is the zero change."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """Number of columns of `up`: an upper bound of the matrix rank."""
        return self.up.shape[1]

    @property
    def is_zero(self) -> bool:
        return self.rank == 0

    def to_dense(self) -> Tensor:
        return self.up @ self.down

    def squared_norm(self) -> float:
        up, down = self.up.double(), self.down.double()
        # round-off may leave a sum below zero; NaN has to come through, and `max` keeps its first argument then
        return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)

    def inner(self, other: TaskVector) -> float:
        up, down = self.up.double(), self.down.double()
        if isinstance(other, LowRank):
            return float(((up.T @ other.up.double()) * (down @ other.down.double().T)).sum())
        return float(((up.T @ other.to_dense().double()) * down).sum())

    def scaled(self, factor: float) -> TaskVector:
        return self if factor == 1.0 else LowRank(self.up * factor, self.down)

    def to(self, target: torch.device | torch.dtype | str) -> TaskVector:
        return LowRank(self.up.to(target), self.down.to(target))

    def tensors(self) -> dict[str, Tensor]:
        return {".up": self.up, ".down": self.down}


def squared_norm(value: Tensor) -> float:
    """Sum of squares of a tensor: rows of 1024 in its own precision, their sums in float64.

    The relative error is below 4e-6, which equal values come near; it is 2e-7 for a thousand random values and 1e-8
    for a million. Magnitudes from 1e-19 to 1e17 count: smaller ones may be lost, larger ones make the result Inf. NaN
    or Inf anywhere makes the result NaN or Inf, so it also serves as the check for them.
    """
    import torch

    flat = value.reshape(-1)
    whole = flat.numel() // 1024 * 1024
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1).double()
    rest = float(torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)) if whole < flat.numel() else 0.0
    return float(torch.dot(rows, rows)) + rest**2


def zero(shape: tuple[int, ...]) -> TaskVector:
    """The zero change: rank 0 for a matrix shape, a tensor of zeros otherwise."""
    import torch

    if len(shape) == 2:
        return LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))
    return Dense(torch.zeros(shape))


def from_tensors(tensors: dict[str, Tensor]) -> TaskVector:
    """Inverse of `TaskVector.tensors`."""
    return Dense(tensors[""]) if "" in tensors else LowRank(tensors[".up"], tensors[".down"])


def cut(tau: TaskVector, block: Segment) -> TaskVector:
    """The part of a stored tensor's change that lies in `block`, as methods see it."""
    if block.is_whole and (isinstance(tau, LowRank) or tau.to_dense().is_contiguous()):
        return tau
    if not isinstance(tau, LowRank):
        return Dense(block.take(tau.to_dense()).contiguous())
    if block.expert is not None:
        raise ValueError("a low-rank change has no expert axis")
    up, down = tau.up, tau.down
    if block.axis == 0:
        up = _select(up, 0, block.ranges)
    elif block.axis == 1:
        down = _select(down, 1, block.ranges)
    return LowRank(down.T.contiguous(), up.T.contiguous()) if block.transposed else LowRank(up, down)


def summed_rank(shape: tuple[int, ...], ranks: Sequence[int | None]) -> int | None:
    """Rank of the factors that a sum of changes is kept in, or None when it is kept dense.

    Args:
        shape: of the block.
        ranks: of the terms' factors in order; None for a dense term, 0 for a zero change.
    """
    if len(shape) != 2 or any(rank is None for rank in ranks):
        return None
    total = sum(rank for rank in ranks if rank is not None)
    return total if total < min(shape) else None


def _concatenate(a: LowRank, b: TaskVector) -> TaskVector:
    import torch

    assert isinstance(b, LowRank)

    up, down = torch.cat([a.up, b.up], dim=1), torch.cat([a.down, b.down], dim=0)
    if summed_rank(a.shape, [a.rank, b.rank]) is None:
        return Dense(up @ down)
    return LowRank(up, down)


@dataclass(frozen=True, eq=False)
class Core:
    """Two changes of one matrix in coordinates small enough to compute with, in float64.

    For two dense changes the coordinates are the matrices themselves. For two low-rank changes they are their
    components in orthonormal bases of the joint column and row spaces (k x k, k = the sum of the ranks): every
    product of the two matrices, and so their singular value decompositions, are kept without loss.
    Source: "Core Space", NeurIPS 2025.

    Attributes:
        first, second: the coordinates, float64.
        shape: of the full matrix.
        left: orthonormal columns, (m, k); None when the coordinates are the matrices.
        right: (k, n), rows that span the joint row space.
        lower: triangular (k, k); the basis is `lower^-1 right`, and never formed. None: it is `right` itself.
    """

    first: Tensor
    second: Tensor
    shape: tuple[int, int]
    left: Tensor | None = None
    right: Tensor | None = None
    lower: Tensor | None = None

    @classmethod
    def of(cls, first: TaskVector, second: TaskVector) -> Core:
        """Coordinates of two changes of the same matrix; cheapest if `first` is what `lift` gave before."""
        m, n = first.shape
        if (
            not (isinstance(first, LowRank) and isinstance(second, LowRank))
            or summed_rank((m, n), [first.rank, second.rank]) is None
        ):
            return cls(first.to_dense().double(), second.to_dense().double(), (m, n))
        left, columns = _column_basis(first.up.double(), second.up.double())
        right, rows, lower = _row_basis(first.down.double(), second.down.double())
        k = first.rank
        return cls(columns[:, :k] @ rows[:k], columns[:, k:] @ rows[k:], (m, n), left, right, lower)

    def lift(self, coordinates: Tensor) -> TaskVector:
        """A change from its coordinates; float64, factors (the first with orthonormal columns) if they are reduced."""
        import torch

        if self.left is None or self.right is None:
            return Dense(coordinates)
        if self.lower is not None:
            coordinates = torch.linalg.solve_triangular(self.lower, coordinates, upper=False, left=False)
        return LowRank(self.left, coordinates @ self.right)


def _column_basis(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`Q` (m, k) with orthonormal columns and `R` (k, k) with `Q R = [first second]`; float64.

    Columns of `first` that are orthonormal already stay, and `second` is made orthogonal to them, twice, as once is
    not enough (Giraud et al., 2005). Else, and where `second` adds nothing to `first`, Householder's method.
    """
    import torch

    own = first.shape[1]
    if bool(((first.T @ first - torch.eye(own, dtype=first.dtype, device=first.device)).abs() < 1e-12).all()):
        inside = first.T @ second
        outside = second - first @ inside
        again = first.T @ outside
        outside -= first @ again
        more, upper = torch.linalg.qr(outside)
        if bool(((first.T @ more).abs() < 1e-12).all()):
            corner = torch.zeros(len(upper), own, dtype=first.dtype, device=first.device)
            top = torch.cat([torch.eye(own, dtype=first.dtype, device=first.device), inside + again], dim=1)
            return torch.cat([first, more], dim=1), torch.cat([top, torch.cat([corner, upper], dim=1)])
    found: tuple[Tensor, Tensor] = torch.linalg.qr(torch.cat([first, second], dim=1))
    return found


def _row_basis(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A basis of the rows of `[first; second]` (k, n), and their coordinates in it (k, k); float64.

    The rows themselves with the Cholesky factor of their Gram matrix, if rows scaled to one length are so far from
    dependent that squaring their condition costs less than the precision of float32; else Householder's method.

    Returns:
        `right`, the coordinates, and `lower`; see `Core`.
    """
    import torch

    rows = torch.cat([first, second])
    gram = rows @ rows.T
    lengths = gram.diagonal().sqrt()
    scaled, failed = torch.linalg.cholesky_ex(gram / lengths[:, None] / lengths)
    if not int(failed) and float(scaled.diagonal().min()) > 1e-3:
        lower = scaled * lengths[:, None]
        return rows, lower, lower
    basis, upper = torch.linalg.qr(rows.T)
    return basis.T.contiguous(), upper.T, None
