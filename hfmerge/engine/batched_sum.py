"""Sums over all models at once, on memory that stays in a core's cache: fewer and larger calls than one model a time.

A call on a few thousand elements costs as much in Python as in arithmetic, and fresh memory for its result costs more
than both. So the changes of all models lie in one buffer, piece by piece, and buffers are used again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfmerge.checkpoint.delta import DeltaReader
from hfmerge.checkpoint.writer import TORCH_NAMES, bytes_of
from hfmerge.methods.base import PlainSum
from hfmerge.task_vector import Dense


if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 1 << 18
"""Elements of all models' changes together that are computed on at a time: one MiB."""
SPAN = 4
"""Pieces that are read at a time."""
ROW = 1024
"""Elements of a change whose squares are summed in float32, as in `task_vector.squared_norm`."""


class Buffers:
    """Memory of one thread: for the values that it reads of several models, and for the results on one piece of them.

    Attributes:
        length: elements of a piece.
        changes: (models, length), float32.
        zeros, sums, term: (length,), float64.
        stored: what is read, SPAN pieces long: (models, ...) of one dtype, or one tensor a model if dtypes differ.
        into: where pieces of `stored` go, all of `changes` or one row for each.
        views: per model, the bytes of what is read of it.
    """

    def __init__(self, dtypes: Sequence[str]):
        import torch

        count = len(dtypes)
        self.length = max(ROW, PIECE // count // ROW * ROW)
        self.changes = torch.empty(count, self.length)
        self.zeros = torch.zeros(self.length, dtype=torch.float64)
        self.sums, self.term = torch.empty_like(self.zeros), torch.empty_like(self.zeros)
        kinds = [getattr(torch, TORCH_NAMES[dtype]) for dtype in dtypes]
        if len(set(kinds)) == 1:
            self.stored = [torch.empty(count, SPAN * self.length, dtype=kinds[0])]
            self.into = [self.changes]
            self.views = [bytes_of(row) for row in self.stored[0]]
        else:
            self.stored = [torch.empty(SPAN * self.length, dtype=kind) for kind in kinds]
            self.into = list(self.changes)
            self.views = [bytes_of(row) for row in self.stored]

    def take(self, pieces: Sequence[Tensor]) -> Tensor:
        """Copy one piece of what was read into `changes`; returns the part of `changes` that it fills."""
        length = pieces[0].shape[-1]
        for into, piece in zip(self.into, pieces, strict=True):
            into[..., :length].copy_(piece)
        return self.changes[:, :length]

    def sum(self, method: PlainSum, changes: Tensor, weights: Sequence[float]) -> Tensor:
        """The sum of all terms of one piece, float64, in the memory of `sums`; `changes` is used up."""
        import torch

        sums, term, zeros = (each[: changes.shape[1]] for each in (self.sums, self.term, self.zeros))
        one, *others = method.multiples(changes, weights)
        sums.copy_(one)
        for other in others:
            # first of the same dtype: mixed ones are slow
            sums.add_(term.copy_(other))
        # added to zero, as minus zero alone could not be told from it in a sum
        torch.add(zeros, sums, alpha=method.step_size, out=sums)
        return sums


class ThreadBuffers(threading.local):
    """The buffers of each thread, one set for the dtypes that it met last."""

    def __init__(self) -> None:
        self._dtypes: tuple[str, ...] = ()
        self._buffers: Buffers | None = None

    def buffers(self, dtypes: tuple[str, ...]) -> Buffers:
        """For models of these stored dtypes."""
        if self._buffers is None or self._dtypes != dtypes:
            self._dtypes, self._buffers = dtypes, Buffers(dtypes)
        return self._buffers


@dataclass(frozen=True)
class Term:
    """One model of a sum: its reader, the name of the tensor in it, of the base's shape, and its weight."""

    model: DeltaReader
    name: str
    weight: float


@dataclass(frozen=True)
class MergedRows:
    """The result of a fold on some rows of a tensor.

    Attributes:
        change: what the method reads out of the sum.
        squares: squared norm of each model's change.
        sum: of all terms, float64; None where it is not asked for.
    """

    change: Tensor
    squares: list[float]
    sum: Tensor | None


def merge_rows(
    method: PlainSum,
    terms: Sequence[Term],
    base: Tensor,
    first: int,
    memory: ThreadBuffers,
    *,
    dtype: torch.dtype,
    keep: bool,
) -> MergedRows | None:
    """Sum and read-out of all models in some rows of a tensor, bit for bit as by `step` and `emit`, model by model.

    Args:
        method: see `MergeMethod.plain_sum`.
        terms: of all models.
        base: float32 values of the rows.
        first: how many elements of the tensor come before them.
        memory: of the thread.
        dtype: of the change.
        keep: the sum is wanted too.

    Returns:
        None where terms may be so large, or not numbers, that each has to be looked at by itself.
    """
    import torch

    origin, count, weights = base.reshape(-1), len(terms), [term.weight for term in terms]
    size = origin.numel()
    use = memory.buffers(tuple(term.model.delta.source.tensors[term.name].dtype for term in terms))
    windows = [term.model.reader.window(term.name) for term in terms]
    norms = torch.empty(count, size // ROW)
    change = torch.empty(size, dtype=dtype)
    total = torch.empty(size, dtype=torch.float64) if keep else None
    rests = [0.0] * count
    for at in range(0, size, SPAN * use.length):
        span = min(SPAN * use.length, size - at)
        for window, view in zip(windows, use.views, strict=True):
            window.read_into(first + at, view[: span * window.itemsize])
        read = [each[..., :span].split(use.length, -1) for each in use.stored]
        for i, start in enumerate(range(at, at + span, use.length)):
            piece = slice(start, min(start + use.length, at + span))
            changes = use.take([pieces[i] for pieces in read]).sub_(origin[piece])
            rests = _norms(changes, norms[:, piece.start // ROW : piece.stop // ROW]) or rests
            sums = use.sum(method, changes, weights)
            change[piece].copy_(method.emit({"S": Dense(sums)}, weights, matrix=False).to_dense())
            if total is not None:
                total[piece].copy_(sums)
    squares = [
        float(torch.dot(lengths, lengths)) + rest**2 for lengths, rest in zip(norms.double(), rests, strict=True)
    ]
    # no partial sum can exceed the bound; not a number fails every comparison
    bound = math.fsum(abs(weight) * math.sqrt(square) for weight, square in zip(weights, squares, strict=True))
    if not bound <= method.limit:
        return None
    return MergedRows(change.view(base.shape), squares, None if total is None else total.view(base.shape))


def _norms(changes: Tensor, out: Tensor) -> list[float]:
    """Norms of each model's change: of every `ROW` elements into `out`; of what is left over, if any, returned."""
    import torch

    whole = out.shape[1] * ROW
    if whole:
        torch.linalg.vector_norm(changes[:, :whole].view(len(changes), -1, ROW), dim=2, out=out)
    if whole == changes.shape[1]:
        return []
    return [float(torch.linalg.vector_norm(each[whole:], dtype=torch.float64)) for each in changes]
