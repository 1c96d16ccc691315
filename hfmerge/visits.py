"""The computation of one chunk: read base and models, fold or combine, keep the carried state, scale, write."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.reader import Rows
from hfmerge.checkpoint.vocabulary import extended_base
from hfmerge.checkpoint.writer import SIZES, TORCH_NAMES, SafetensorsWriter
from hfmerge.chunks import Chunk
from hfmerge.errors import GridOverflowError, NonFiniteError
from hfmerge.journal import checksum
from hfmerge.methods import Carry, FoldMethod, JointMethod
from hfmerge.methods.additive import AdditiveFold, staying
from hfmerge.methods.base import SAMPLED, Measure
from hfmerge.planned import DTYPE_NAMES, Param, state_name
from hfmerge.runfiles import RunFiles, carried
from hfmerge.stacking import merged
from hfmerge.taskvector import WHOLE, Block, Dense, LowRank, TaskVector, cut, squared_norm, zero
from hfmerge.weights import weight_at


if TYPE_CHECKING:
    from torch import Tensor

WATCHED = 8
"""Of one in so many parameters, the last step of an approximating method is compared with the exact one."""
HELD = 1 << 20
"""Elements of all models' task vectors that one visit of a joint method may hold at a time; more are read again."""


@dataclass(frozen=True)
class Norms:
    """What the first pass found out about one chunk.

    Attributes:
        models: squared Frobenius norm of each new model's task vector.
        read_out: squared Frobenius norm of the merged task vector before any scaling.
        deviation: of an approximating method's last step, see `FoldMethod.deviation`; None where it was not measured.
        dependent: models whose change was left out, see `JointMethod.dependent`.
    """

    models: tuple[float, ...]
    read_out: float
    deviation: float | None = None
    dependent: tuple[int, ...] = ()

    @classmethod
    def of(cls, noted: Sequence[Any]) -> Norms:
        """From what a journal noted of it."""
        models, read_out, deviation, dependent = noted
        return cls(tuple(models), read_out, deviation, tuple(dependent))


class Visit:
    """The work on one chunk, on one thread; its methods are the passes, of which one is called, once.

    Attributes:
        wrote: file and tensor -> checksum of what was written to it, for the journal; empty without one.
    """

    def __init__(self, files: RunFiles, chunk: Chunk, wrote: dict[tuple[str, str], int] | None = None):
        self.files, self.plan, self.chunk = files, files.plan, chunk
        self.wrote = {} if wrote is None else wrote
        self._base: Tensor | None = None

    def base(self) -> Tensor:
        """The base's float32 value in the output's rows, in memory of this visit's own; read at the first use."""
        if self._base is None:
            param = self.chunk.param
            value = self.files.base.value(param.key, self.chunk.rows)
            vocabulary = self.plan.vocabulary
            if vocabulary is not None and vocabulary.added and param.vocab_axis is not None:
                rows = [model.new_value(param.key) for model in self.files.models]
                value = extended_base(vocabulary, value, rows, param.vocab_axis)
            self._base = value
        return self._base

    def task_vector(self, model: int) -> TaskVector | None:
        """One model's change, read anew at every call; None where it has none."""
        aligned = None
        param = self.chunk.param
        if self.plan.vocabulary is not None and param.vocab_axis is not None:
            aligned = (self.plan.vocabulary, model, param.vocab_axis)
        return self.files.models[model].task_vector(param.key, self.base, aligned, self.chunk.rows)

    def measure(self, measure: Measure) -> Iterator[Any]:
        """What `measure` finds here, piece by piece."""
        for tile in self.chunk.tiles():
            yield from measure.find(_LazyTaus(Visit(self.files, tile), WHOLE))

    def merge(self, known: Sequence[float] | None, *, write: bool) -> Norms:
        """The first pass: fold or combine all models.

        Args:
            known: what a joint method that measures found out about all parameters.
            write: write the result now; otherwise keep what `rescale` needs.
        """
        method, tiles = self.plan.method, self.chunk.tiles()
        if len(tiles) == 1:
            return self._merge(known, write)
        if isinstance(method, JointMethod) and known is None:
            known = self._surveyed(method, tiles)
        found = [Visit(self.files, tile, self.wrote)._merge(known, write) for tile in tiles]
        models = tuple(math.fsum(norms) for norms in zip(*(norms.models for norms in found), strict=True))
        dependent = tuple(sorted({model for norms in found for model in norms.dependent}))
        return Norms(models, math.fsum(norms.read_out for norms in found), dependent=dependent)

    def _surveyed(self, method: JointMethod, tiles: Sequence[Chunk]) -> list[float]:
        """What a method that is given its rows tile by tile has to know about all of them."""
        import torch

        def dense(visit: Visit) -> Iterator[Tensor]:
            for model in range(len(self.files.models)):
                tau = visit.task_vector(model)
                yield torch.zeros(visit.chunk.shape) if tau is None else tau.to_dense()

        survey = method.survey(len(self.files.models), math.prod(self.chunk.shape))
        assert survey is not None
        if survey.samples:
            for tile in tiles:
                survey.sample(dense(Visit(self.files, tile.start(SAMPLED))))
        while True:
            for tile in tiles:
                visit = Visit(self.files, tile)
                survey.add(dense(visit), visit.base)
            found = survey.settle()
            if found is not None:
                return found

    def _merge(self, known: Sequence[float] | None, write: bool) -> Norms:
        import torch

        method = self.plan.method
        deviation: float | None = None
        dependent: tuple[int, ...] = ()
        at_once = self._at_once(method) if isinstance(method, FoldMethod) else None
        if at_once is not None:
            squares, changes = at_once
        elif isinstance(method, FoldMethod):
            squares, carries, deviation = self._fold(method)
            changes = self._read_out(method, carries)
        else:
            assert isinstance(method, JointMethod)
            squares, changes, dependent = self._combine(method, known)
        norms = Norms(tuple(squares), math.fsum(_finite_square(change) for change in changes), deviation, dependent)
        if write:
            self._write(changes, 1.0)
        elif self.files.scratch is not None and isinstance(method, JointMethod):
            whole = torch.empty(self.chunk.shape)
            for block, change in zip(self.chunk.param.blocks, changes, strict=True):
                block.put(whole, change.to_dense())
            self._put(self.files.scratch, self.chunk.param.key, whole)
        return norms

    def rescale(self, scale: float) -> None:
        """The second pass: read what the first one kept, and write `base + scale * change`."""
        method, count, param = self.plan.method, len(self.files.models), self.chunk.param
        if isinstance(method, FoldMethod):
            kept = self.files.scratch or self.files.states[count]
            read = partial(carried, kept.slots, kept.read)
            carries = [self._carry_in(read, method, block, param.ranks) for block in param.blocks]
            changes = self._read_out(method, carries)
        else:
            assert self.files.scratch is not None
            whole = self.files.scratch.read(param.key, self.chunk.rows)
            changes = [Dense(block.take(whole)) for block in param.blocks]
        self._write(changes, scale)

    def copy(self) -> None:
        """Write the base's value, with its stored bytes where dtype and shape stay."""
        param = self.chunk.param
        entry = self.plan.base.tensors[param.key]
        grown = entry.shape != param.slot.shape
        if entry.floating and (grown or entry.dtype != param.slot.dtype):
            self._emit(self.base())
            return
        stored = self.files.base.stored(param.key)
        for target in self.files.places(param):
            self._put(self.files.outputs[target.file], target.key, stored)

    def _fold(self, method: FoldMethod) -> tuple[list[float], list[Carry], float | None]:
        param, start, count = self.chunk.param, self.files.start, len(self.files.models)
        carries: list[Carry | None] = [self._prior_carry(method, block) for block in param.blocks]
        squares, deviations = [], []
        weights = self.plan.weights_of(param)
        watched = zlib.crc32(param.key.encode()) % WATCHED == 0
        for i in range(start, count):
            tau = self.task_vector(i)
            squares.append(self._squared_norm(i, tau))
            for b, block in enumerate(param.blocks):
                part = zero(block.shape(self.chunk.shape)) if tau is None else cut(tau, block)
                if watched and i + 1 == count:
                    deviations.append(method.deviation(carries[b], part, weights[i], matrix=block.matrix))
                try:
                    carry = method.step(carries[b], part, weights[i], matrix=block.matrix)
                except GridOverflowError as error:
                    raise GridOverflowError(f"{param.key}: {error}") from error
                carries[b] = _settled(method, param, block, i + 1, carry)
            if i + 1 in self.files.states:
                self._store(self.files.states[i + 1], carries, i + 1)
        if start == count and count in self.files.states:
            self._store(self.files.states[count], carries, count)
        if self.files.scratch is not None:
            self._store(self.files.scratch, carries, count)
        deviation = max((found for found in deviations if found is not None), default=None)
        return squares, [carry for carry in carries if carry is not None], deviation

    def _at_once(self, method: FoldMethod) -> tuple[list[float], list[TaskVector]] | None:
        """Squared norms and read-out of all models in few calls; None where they have to come one by one."""
        import torch

        param, files, count = self.chunk.param, self.files, len(self.files.models)
        plain = isinstance(method, AdditiveFold) and method.plain and files.prior is None and not self.plan.subtracted
        if not plain or len(param.blocks) != 1 or not param.blocks[0].is_whole:
            return None
        if self.plan.vocabulary is not None and param.vocab_axis is not None:
            return None
        entry = self.plan.base.tensors[param.key]
        names = [name for model in files.models if (name := model.lies_as(param.key, entry)) is not None]
        if len(names) < count:
            return None
        assert isinstance(method, AdditiveFold)
        first = 0 if self.chunk.rows is None else self.chunk.rows[0] * math.prod(entry.shape[1:])
        writers = [writer for writer in (files.states.get(count), files.scratch) if writer is not None]
        dtype = torch.float32 if SIZES[param.slot.dtype] < 4 else torch.float64
        weights = self.plan.weights_of(param)
        found = merged(
            method, files.models, names, self.base(), first, weights, files.memory, dtype=dtype, keep=bool(writers)
        )
        if found is None:
            return None
        if found.sum is not None:
            carries = [_settled(method, param, param.blocks[0], count, {"S": Dense(found.sum)})]
            for writer in writers:
                self._store(writer, carries, count)
        return found.squares, [Dense(found.change)]

    def _combine(
        self, method: JointMethod, known: Sequence[float] | None
    ) -> tuple[list[float], list[TaskVector], tuple[int, ...]]:
        models = len(self.files.models)
        weights = list(self.plan.weights_of(self.chunk.param))
        for i in self.plan.subtracted:
            weights[i] = 0.0
        dependent: set[int] = set()
        held: list[TaskVector | None] = []
        squares = []
        for i in range(models):
            tau = self.task_vector(i)
            squares.append(self._squared_norm(i, tau))
            if models * math.prod(self.chunk.shape) <= HELD:
                held.append(tau)
        changes = []
        for block in self.chunk.param.blocks:
            taus: Sequence[TaskVector] = _LazyTaus(self, block)
            if held:
                taus = [_cut(tau, block, self.chunk) for tau in held]
            found = method.examine(taus) if known is None else known
            changes.append(method.combine(taus, weights, partial(_taken, block, self.base), found))
            dependent.update(() if found is None else method.dependent(found))
        return squares, changes, tuple(sorted(model for model in dependent if squares[model] > 0.0))

    def _squared_norm(self, model: int, tau: TaskVector | None) -> float:
        """Of one model's change; not a number means that the model or the base is not, which is refused by name.

        Where the recipe allows such values they count as zero in norms, but no matrix with them can be taken apart.
        """
        if tau is None:
            return 0.0
        square = tau.squared_norm()
        if math.isfinite(square):
            return square
        param, method = self.chunk.param, self.plan.method
        if not self.plan.recipe.allow_nonfinite:
            self.files.models[model].check_finite(param.key)
            self.files.base.check_finite(param.key)
        elif method.matrixwise and any(block.matrix for block in param.blocks):
            raise NonFiniteError(
                f"{self.files.models[model].delta.source.pinned.label}: {param.key} holds NaN or Inf, and "
                f"{method.name} cannot take such a matrix apart; repair the source, or leave the tensor out with "
                "`exclude`."
            )
        return _finite_square(tau)

    def _prior_carry(self, method: FoldMethod, block: Block) -> Carry | None:
        """What the prior state holds of a block, without the models that leave; None where there is none."""
        prior, state = self.plan.prior, self.files.prior
        if prior is None or state is None or not (prior.count or prior.held):
            return None
        param = self.chunk.param
        ranks = prior.ranks(param)
        carry = self._carry_in(state.read, method, block, ranks)
        if not prior.held:
            return carry
        for j, reader in enumerate(self.files.leaving):
            if param.leaving[j] is None:
                tau = reader.task_vector(param.key, self.base, None, self.chunk.rows)
                part = _cut(tau, block, self.chunk)
                weight = weight_at(self.plan.leaving_weights[j], param.key)
                carry = method.unstep(carry, part, weight, matrix=block.matrix)
        order = sorted((i for i, model in enumerate(prior.held) if model >= 0), key=lambda i: prior.held[i])
        carry = staying(carry, ranks, order)
        if not prior.count:
            return None
        return _settled(method, param, block, prior.count, carry)

    def _carry_in(
        self,
        read: Callable[[str, Rows | None], TaskVector],
        method: FoldMethod,
        block: Block,
        ranks: Sequence[int | None],
    ) -> Carry:
        """A block's carry from a state of models whose changes have these ranks."""
        param = self.chunk.param
        forms = method.carry_form(block.shape(param.slot.shape), ranks, matrix=block.matrix)
        stored = any(rank != 0 for rank in ranks)
        return {
            name: read(state_name(param, block, name), self.chunk.rows)
            if stored and form.rank != 0
            else zero(block.shape(self.chunk.shape))
            for name, form in forms.items()
        }

    def _read_out(self, method: FoldMethod, carries: Sequence[Carry]) -> list[TaskVector]:
        """The merged change of every block; approximately without what the recipe subtracts."""
        import torch

        param, weights = self.chunk.param, self.plan.weights_of(self.chunk.param)
        counted = [weight for i, weight in enumerate(weights) if i not in self.plan.subtracted]
        taus = [(weights[i], self.task_vector(i)) for i in self.plan.subtracted]
        changes = []
        for block, carry in zip(param.blocks, carries, strict=True):
            for weight, tau in taus:
                if tau is not None:
                    carry = method.unstep(carry, cut(tau, block), weight, matrix=block.matrix)
            change = method.emit(carry, counted, matrix=block.matrix)
            # what is rounded to 16 bits does not need more, and twice the bytes take twice the time
            changes.append(change.to(torch.float32) if SIZES[param.slot.dtype] < 4 else change)
        return changes

    def _store(self, writer: SafetensorsWriter, carries: Sequence[Carry | None], count: int) -> None:
        param = self.chunk.param
        if all(rank == 0 for rank in param.ranks[:count]):
            return
        for block, carry in zip(param.blocks, carries, strict=True):
            assert carry is not None
            for name, value in carry.items():
                if value.is_zero:
                    continue
                for suffix, tensor in value.tensors().items():
                    self._put(writer, f"{state_name(param, block, name)}{suffix}", tensor)

    def _write(self, changes: Sequence[TaskVector], scale: float) -> None:
        """`base + scale * change` into the output, rounded once; the visit's base is used up."""
        import torch

        value = self.base()
        for block, change in zip(self.chunk.param.blocks, changes, strict=True):
            if change.is_zero:
                continue
            dense = change.to_dense()
            if dense.dtype == torch.float64 and value.dtype != torch.float64:
                value = value.double()
            if block.is_whole:
                value.add_(dense, alpha=scale)
            else:
                block.put(value, block.take(value).add(dense, alpha=scale))
        self._emit(value)

    def _emit(self, value: Tensor) -> None:
        import torch

        param = self.chunk.param
        cast = value.to(getattr(torch, TORCH_NAMES[param.slot.dtype]))
        if not self.plan.recipe.allow_nonfinite:
            checked = cast.float() if param.slot.dtype == "F16" else value
            if not math.isfinite(squared_norm(checked)) and not bool(checked.isfinite().all()):
                raise NonFiniteError(
                    f"{param.key}: the merged values do not fit {DTYPE_NAMES[param.slot.dtype]}; choose a wider dtype "
                    "or a smaller norm."
                )
        for target in self.files.places(param):
            self._put(self.files.outputs[target.file], target.key, cast)

    def _put(self, writer: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        data = writer.write(name, tensor, None if self.chunk.rows is None else self.chunk.rows[0])
        if self.files.journal is not None:
            place = (writer.path.name, name)
            self.wrote[place] = checksum(data, self.wrote.get(place, 0))


class _LazyTaus(Sequence[TaskVector]):
    """The task vectors of one block, each read anew when indexed, so that memory does not grow with the models."""

    def __init__(self, visit: Visit, block: Block):
        self.visit, self.block = visit, block

    def __len__(self) -> int:
        return len(self.visit.files.models)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _cut(self.visit.task_vector(index), self.block, self.visit.chunk)


def _cut(tau: TaskVector | None, block: Block, chunk: Chunk) -> TaskVector:
    """One block of a model's change, zero where it has none."""
    return zero(block.shape(chunk.shape)) if tau is None else cut(tau, block)


def _settled(method: FoldMethod, param: Param, block: Block, count: int, carry: Carry) -> Carry:
    """A carry in exactly the form its state file would give back: dtype, contiguous, factored or dense as planned."""
    import torch

    forms = method.carry_form(block.shape(param.slot.shape), param.ranks[:count], matrix=block.matrix)
    result: Carry = {}
    for name, form in forms.items():
        value = carry[name].to(getattr(torch, TORCH_NAMES[form.dtype]))
        if form.rank is None or not isinstance(value, LowRank):
            result[name] = Dense(value.to_dense().contiguous())
        else:
            result[name] = LowRank(value.up.contiguous(), value.down.contiguous())
    return result


def _finite_square(change: TaskVector) -> float:
    """Squared norm of the finite elements, whose squares may exceed float32."""
    square = change.squared_norm()
    if math.isfinite(square):
        return square
    return float(change.to_dense().double().nan_to_num(0.0, 0.0, 0.0).square().sum())


def _taken(block: Block, base: Callable[[], Tensor]) -> Tensor:
    """The base's values in one block."""
    return block.take(base())
