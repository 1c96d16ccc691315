"""Statistics of one parameter for `inspect`: inner products, signs, and the spectra of its matrices.

A task vector is read when it is needed. Factors of an adapter stay factors. Only signs need single elements, which are
computed some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hfmerge.checkpoint.delta import longer_base
from hfmerge.checkpoint.reader import Reader, Rows
from hfmerge.checkpoint.streaming.session import Streaming
from hfmerge.engine.plan import Param, Plan
from hfmerge.engine.plan_readers import open_deltas
from hfmerge.evaluation.inspection.spectra import Detail, Spectrum, take_apart
from hfmerge.task_vector import LowRank, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", int, float)

HELD = 1 << 25
"""Elements of all models' changes of one parameter that are held at once; more are read some rows at a time."""
_TILE = 1 << 20
"""Elements of one model's change that signs are compared in at a time."""


@dataclass(frozen=True)
class Measured:
    """Of one parameter; sums over elements, so that they add up over parameters.

    Attributes:
        key: stored tensor.
        elements: of it.
        gram: inner products of all models' changes, T x T.
        both, opposed: T x T counts of the elements that both models change, and change in opposite directions.
        magnitude: sum of the models' absolute changes, each times its weight, and of the absolute sum of them.
        matrices: per model, squared norm of its (weighted) change of real matrices, and what OPCM would clear of it.
        spectra: of every matrix and model that was asked for.
    """

    key: str
    elements: int
    gram: tuple[tuple[float, ...], ...]
    both: tuple[tuple[int, ...], ...]
    opposed: tuple[tuple[int, ...], ...]
    magnitude: tuple[float, float]
    matrices: tuple[tuple[float, float], ...]
    spectra: tuple[Spectrum, ...]


class Changes:
    """Reads the models' task vectors of a plan; leaving the `with` block closes the files.

    Args:
        plan: whose models they are.
        streaming: holds the files that the plan streams; None where it streams none.
    """

    def __init__(self, plan: Plan, streaming: Streaming | None):
        self.plan = plan
        self.base = Reader(plan.base, streaming)
        self.models = open_deltas(plan, plan.deltas, streaming)

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.base.close()
        for model in self.models:
            model.close()

    def expect(self, params: Sequence[Param]) -> None:
        """Announce the parameters that are read next, in order, so that streamed tensors are fetched in time."""
        keys = [param.key for param in params]
        self.base.expect(keys)
        for model in self.models:
            model.expect(keys)

    def task_vectors(self, param: Param, rows: Rows | None = None) -> Iterator[TaskVector | None]:
        """Every model's change of a parameter, or of some rows of it, in order; None where it has none."""
        vocabulary = self.plan.vocabulary if param.vocab_axis is not None else None
        held: list[Tensor] = []

        def base() -> Tensor:
            if not held:
                value = self.base.value(param.key, rows)
                if vocabulary is not None and param.vocab_axis is not None:
                    value = longer_base(vocabulary, value, self.models, param.key, param.vocab_axis)
                held.append(value)
            return held[0]

        for i, model in enumerate(self.models):
            aligned = None
            if vocabulary is not None and param.vocab_axis is not None:
                aligned = (vocabulary, i, param.vocab_axis)
            yield model.task_vector(param.key, base, aligned, rows)

    def check_finite(self, model: int, key: str) -> None:
        """Raise NonFiniteError, naming the tensor, if the model or the base holds NaN or Inf in it."""
        self.models[model].check_finite(key)
        self.base.check_finite(key)

    def cuts(self, param: Param) -> list[Rows | None]:
        """Rows to read at a time: all of them, unless that is too much and pieces of every change can be read."""
        shape, models = param.slot.shape, len(self.models)
        aligned = param.vocab_axis is not None and self.plan.vocabulary is not None
        dense = sum(rank is None for rank in param.ranks)
        if len(shape) < 2 or dense * math.prod(shape) <= HELD or aligned:
            return [None]
        if not all(delta.sliceable(param.key) for delta in self.plan.deltas):
            return [None]
        step = max(1, HELD // models // math.prod(shape[1:]))
        return [(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]


def measure(changes: Changes, param: Param, detail: Detail) -> Measured:
    """Measure one parameter.

    Raises:
        NonFiniteError: names the model and the tensor.
    """
    weights = changes.plan.weights_of(param)
    count = len(weights)
    sums = _Sums(weights)
    whole: list[TaskVector | None] | None = None
    for rows in changes.cuts(param):
        taus = list(changes.task_vectors(param, rows))
        whole = taus if rows is None else None
        sums.add(taus)
    for i in range(count):
        if not math.isfinite(sums.gram[i][i]):
            changes.check_finite(i, param.key)
    matrices, spectra = [(0.0, 0.0)] * count, []
    for block in param.blocks if detail.spectral else ():
        if block.matrix and len(block.shape(param.slot.shape)) == 2:
            # what was too much to hold is read once more, one model at a time
            source = whole if whole is not None else changes.task_vectors(param)
            parts, found = take_apart(param.key, block, source, weights, detail)
            matrices = [(a + c, b + d) for (a, b), (c, d) in zip(matrices, parts, strict=True)]
            spectra.extend(found)
    return Measured(
        param.key,
        math.prod(param.slot.shape),
        _frozen(sums.gram),
        _frozen(sums.both),
        _frozen(sums.opposed),
        (sums.magnitude, sums.left),
        tuple(matrices),
        tuple(spectra),
    )


class _Sums:
    """Sums over elements of all models' changes, as they are read."""

    def __init__(self, weights: Sequence[float]):
        count = len(weights)
        self.weights = weights
        self.gram = [[0.0] * count for _ in range(count)]
        self.both = [[0] * count for _ in range(count)]
        self.opposed = [[0] * count for _ in range(count)]
        self.magnitude = self.left = 0.0

    def add(self, taus: Sequence[TaskVector | None]) -> None:
        """Take in all models' changes of the same elements."""
        for i, first in enumerate(taus):
            for j, second in enumerate(taus[: i + 1]):
                if first is not None and second is not None:
                    self.gram[i][j] += first.squared_norm() if i == j else first.inner(second)
                    self.gram[j][i] = self.gram[i][j]
        models = [i for i, tau in enumerate(taus) if tau is not None]
        for piece in _pieces([tau for tau in taus if tau is not None]):
            self._add_signs(models, piece)

    def _add_signs(self, models: Sequence[int], piece: Sequence[Tensor]) -> None:
        """Flat pieces of at most `_TILE` elements: counts up to 2^24 are exact in float32."""
        import torch

        signs = torch.stack([change.sign() for change in piece])
        product, both = signs @ signs.T, signs.abs() @ signs.abs().T
        opposed = (both - product) / 2
        for a, i in enumerate(models):
            for b, j in enumerate(models):
                self.both[i][j] += int(both[a, b])
                self.opposed[i][j] += int(opposed[a, b])
        scale = torch.tensor([self.weights[i] for i in models])
        scaled = torch.stack(list(piece)) * scale[:, None]
        self.magnitude += float(scaled.abs().sum(dtype=torch.float64))
        self.left += float(scaled.sum(0).abs().sum(dtype=torch.float64))


def _pieces(taus: Sequence[TaskVector]) -> Iterator[list[Tensor]]:
    """The same elements of every change, flat, at most `_TILE` (or one row) at a time."""
    if not taus:
        return
    shape = taus[0].shape
    if len(shape) < 2:
        yield [tau.to_dense().reshape(-1) for tau in taus]
        return
    step = max(1, _TILE // math.prod(shape[1:]))
    for at in range(0, shape[0], step):
        yield [_rows(tau, at, at + step).reshape(-1) for tau in taus]


def _rows(tau: TaskVector, start: int, stop: int) -> Tensor:
    return tau.up[start:stop] @ tau.down if isinstance(tau, LowRank) else tau.to_dense()[start:stop]


def _frozen(rows: Sequence[Sequence[Number]]) -> tuple[tuple[Number, ...], ...]:
    return tuple(tuple(row) for row in rows)
