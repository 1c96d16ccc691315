"""The tasks on one chunk: measure it, fold or combine all models, write the result, or write it again with a scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from hfmerge.engine.device import CPU, Device
from hfmerge.engine.fold import Folding
from hfmerge.engine.partition import Chunk, remembered, visit_bytes
from hfmerge.engine.run_files import RunFiles
from hfmerge.engine.tile_io import ChunkData
from hfmerge.methods import JointMethod
from hfmerge.methods.base import SAMPLED, Measure
from hfmerge.methods.fit import FitProducts, fit_products, fit_scale
from hfmerge.recipe.values import FITS
from hfmerge.task_vector import WHOLE, Dense, Segment, TaskVector


if TYPE_CHECKING:
    from torch import Tensor

_HELD = 1 << 20
"""Elements of all models' task vectors that one visit of a joint method may hold at a time; more are read again."""


@dataclass(frozen=True)
class Norms:
    """Results of the first pass on one chunk.

    Attributes:
        models: squared Frobenius norms of the pieces of each new model's task vector (see `partition.pieces`).
        read_out: those of the merged task vector before any scaling.
        deviation: of an approximating method's last step, see `FoldMethod.deviation`; None where it was not measured.
        dependent: models whose change was left out, see `JointMethod.dependent`.
        fits: parts of every matrix in the scale of a fitted norm, see `methods.fit`; empty where none is fitted.
    """

    models: tuple[tuple[float, ...], ...]
    read_out: tuple[float, ...]
    deviation: float | None = None
    dependent: tuple[int, ...] = ()
    fits: tuple[FitProducts, ...] = ()

    @classmethod
    def of(cls, noted: Sequence[Any]) -> Norms:
        """From what a journal noted of it."""
        models, read_out, deviation, dependent, fits = noted
        return cls(
            tuple(map(tuple, models)),
            tuple(read_out),
            deviation,
            tuple(dependent),
            tuple((top, bottom) for top, bottom in fits),
        )


class Visit:
    """The work on one chunk, on one thread; its methods are the passes, of which one is called, once.

    Attributes:
        device: where matrices are taken apart.
        wrote: file and tensor -> checksum of what was written to it, for the journal; empty without one.
    """

    def __init__(self, files: RunFiles, chunk: Chunk, device: Device, wrote: dict[tuple[str, str], int] | None = None):
        self.files, self.plan, self.chunk, self.device = files, files.plan, chunk, device
        self.wrote = {} if wrote is None else wrote
        self.data = ChunkData(files, chunk, self.wrote)

    def measure(self, measure: Measure) -> Iterator[Any]:
        """What `measure` finds here, piece by piece."""
        for tile in self.chunk.tiles():
            yield from measure.find(ChunkData(self.files, tile).taus(WHOLE))

    def merge(self, known: Sequence[float] | None, *, write: bool) -> Norms:
        """The first pass: fold or combine all models.

        Args:
            known: what a joint method that measures found out about all parameters.
            write: write the result now; otherwise keep what `rescale` needs.
        """
        tiles, joint = self.chunk.tiles(), self.plan.method.joint
        if len(tiles) == 1:
            return self._merge(known, write)
        visits = [Visit(self.files, tile, self.device, self.wrote) for tile in reversed(tiles)]
        if joint is not None and known is None:
            known = self._surveyed(joint, visits)
        found = []
        while visits:
            # frees what the visit remembers
            found.append(visits.pop()._merge(known, write))
        models = tuple(tuple(chain(*squares)) for squares in zip(*(norms.models for norms in found), strict=True))
        dependent = tuple(sorted({model for norms in found for model in norms.dependent}))
        return Norms(models, tuple(chain(*(norms.read_out for norms in found))), dependent=dependent)

    def rescale(self, scale: float) -> None:
        """The second pass: read what the first one kept, and write `base + scale * change`."""
        fold, param = self.plan.method.fold, self.chunk.param
        if self.plan.norm in FITS and not self.plan.fits(param):
            scale = 1.0
        if fold is not None:
            changes = Folding(self.data, fold, self.device).reread()
        else:
            assert self.files.scratch is not None
            whole = self.files.scratch.read(param.key, self.chunk.rows)
            changes = [Dense(block.take(whole)) for block in param.blocks]
        self.data.write(changes, scale)

    def copy(self) -> None:
        """Write the base's value, with its stored bytes where dtype and shape stay."""
        param = self.chunk.param
        entry = self.plan.base.tensors[param.key]
        grown = entry.shape != param.slot.shape
        if entry.floating and (grown or entry.dtype != param.slot.dtype):
            self.data.emit(self.data.base())
            return
        stored = self.files.base.stored(param.key)
        for target in self.files.places(param):
            self.data.put(self.files.outputs[target.file], target.key, stored)

    def _merge(self, known: Sequence[float] | None, write: bool) -> Norms:
        import torch

        fold, joint = self.plan.method.fold, self.plan.method.joint
        deviation: float | None = None
        dependent: tuple[int, ...] = ()
        fits: Sequence[FitProducts] | None = None
        if fold is not None:
            folded = Folding(self.data, fold, self.device).fold()
            squares, changes, deviation, fits = folded.squares, folded.changes, folded.deviation, folded.fits
        else:
            assert joint is not None
            squares, changes, dependent = self._combine(joint, known)
        if self.plan.fits(self.chunk.param):
            fits = self._fitted(changes) if fits is None else fits
            if self.plan.norm == "fit-matrix":
                changes = [change.scaled(fit_scale([part])) for change, part in zip(changes, fits, strict=True)]
        read_out = tuple(chain(*map(self.data.norms_of, changes)))
        norms = Norms(tuple(squares), read_out, deviation, dependent, tuple(fits or ()))
        if write:
            self.data.write(changes, 1.0)
        elif self.files.scratch is not None and joint is not None:
            whole = torch.empty(self.chunk.shape)
            for block, change in zip(self.chunk.param.blocks, changes, strict=True):
                block.put(whole, change.to_dense())
            self.data.put(self.files.scratch, self.chunk.param.key, whole)
        return norms

    def _fitted(self, changes: Sequence[TaskVector]) -> list[FitProducts]:
        """Parts of every matrix in the scale of a fitted norm, from the changes of all models."""
        weights = [
            0.0 if i in self.plan.subtracted else weight
            for i, weight in enumerate(self.plan.weights_of(self.chunk.param))
        ]
        if self.plan.method.normalises_weights:
            mean = math.fsum(weights) / len(weights)
            weights = [weight / mean for weight in weights]
        pairs = zip(self.chunk.param.blocks, changes, strict=True)
        return [fit_products(change, self.data.taus(block), weights) for block, change in pairs]

    def _surveyed(self, method: JointMethod, visits: Sequence[Visit]) -> list[float] | None:
        """What a method that is given its rows tile by tile, the last visit's first, has to know about all of them."""
        import torch

        def dense(data: ChunkData) -> Iterator[Tensor]:
            for model in range(len(self.files.models)):
                tau = data.task_vector(model)
                yield torch.zeros(data.chunk.shape) if tau is None else tau.to_dense()

        survey = method.survey(len(self.files.models), math.prod(self.chunk.shape))
        if survey is None:
            return None
        if survey.samples:
            for visit in reversed(visits):
                survey.sample(dense(ChunkData(self.files, visit.chunk.start(SAMPLED))))
        keep = remembered(self.plan, self.chunk)
        for visit in visits:
            visit.data.remember = keep
        while True:
            for visit in reversed(visits):
                data = visit.data if keep else ChunkData(self.files, visit.chunk)
                survey.add(dense(data), data.base)
            found = survey.settle()
            if found is not None:
                return found

    def _combine(
        self, method: JointMethod, known: Sequence[float] | None
    ) -> tuple[list[tuple[float, ...]], list[TaskVector], tuple[int, ...]]:
        models, param = len(self.files.models), self.chunk.param
        self.data.remember |= models * math.prod(self.chunk.shape) <= _HELD
        squares = [self.data.squared_norms(i, self.data.task_vector(i)) for i in range(models)]
        work = partial(self._combined, method, known)
        if method.needs == "matrix" and any(block.matrix for block in param.blocks):
            need = visit_bytes(param, self.chunk.shape, method)
            changes, dependent = self.device.run(work, need, param.key)
        else:
            changes, dependent = work(CPU)
        return squares, changes, tuple(sorted(model for model in dependent if any(squares[model])))

    def _combined(
        self, method: JointMethod, known: Sequence[float] | None, place: str
    ) -> tuple[list[TaskVector], set[int]]:
        """The merged change of every block, computed on a device, in the CPU's memory; and who was left out of one."""
        weights = list(self.plan.weights_of(self.chunk.param))
        for i in self.plan.subtracted:
            weights[i] = 0.0
        dependent: set[int] = set()
        changes = []
        for block in self.chunk.param.blocks:
            taus = self.data.taus(block, place)
            found = method.examine(taus) if known is None else known
            base = partial(_taken, block, self.data.base, place)
            change = method.combine(taus, weights, base, found, self.data.site(block, place))
            changes.append(change if place == CPU else change.to(CPU))
            dependent.update(() if found is None else method.dependent(found))
        return changes, dependent


def _taken(block: Segment, base: Callable[[], Tensor], place: str) -> Tensor:
    """The base's values in one block, on a device."""
    return block.take(base()).to(place)
