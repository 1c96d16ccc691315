"""Runs a fold method on one chunk: takes all models into the carry, writes kept states, computes the merged change.

A carry in memory has exactly the form that its state file would give back. So continuing from a state equals starting
from the sources.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from hfmerge.checkpoint.reader import Rows
from hfmerge.checkpoint.writer import SIZES, TORCH_NAMES, SafetensorsWriter
from hfmerge.engine.batched_sum import Term, merge_rows
from hfmerge.engine.device import CPU, Device
from hfmerge.engine.partition import visit_bytes
from hfmerge.engine.plan import Param, state_name
from hfmerge.engine.run_files import carried
from hfmerge.engine.tile_io import ChunkData, part_of
from hfmerge.errors import GridOverflowError
from hfmerge.methods import Carry, FoldMethod
from hfmerge.methods.exact_sum import staying
from hfmerge.methods.fit import FitProducts
from hfmerge.recipe.weights import weight_at
from hfmerge.task_vector import Dense, LowRank, Segment, TaskVector, cut, zero


_Result = TypeVar("_Result")

WATCHED = 8
"""Of one in so many parameters, the last step of an approximating method is compared with the exact one."""


@dataclass(frozen=True)
class Folded:
    """The result of a fold on one chunk.

    Attributes:
        squares: squared norms of the pieces of each new model's change.
        changes: the merged change of every block.
        deviation: see `FoldMethod.deviation`; None where it was not measured.
        fits: parts of every block in the scale of a fitted norm, see `FoldMethod.fit`; None: the state does not hold
            them.
    """

    squares: list[tuple[float, ...]]
    changes: list[TaskVector]
    deviation: float | None = None
    fits: list[FitProducts] | None = None


class Folding:
    """One fold method on one chunk. Its inputs and results lie in the CPU's memory, on whatever device it computes."""

    def __init__(self, data: ChunkData, method: FoldMethod, device: Device):
        self.data, self.method, self.device = data, method, device
        self.files, self.plan, self.chunk = data.files, data.plan, data.chunk
        self._place = CPU

    def fold(self) -> Folded:
        """Take all models into the carry, write the states to keep, and compute the merged change."""
        at_once = self._at_once()
        if at_once is not None:
            return at_once
        return self._placed(self._fold)

    def reread(self) -> list[TaskVector]:
        """The merged change of every block, from what `fold` kept."""
        return self._placed(self._reread)

    def _placed(self, work: Callable[[], _Result]) -> _Result:
        """`work`, on the device if there are matrices."""
        param = self.chunk.param
        if not any(block.matrix for block in param.blocks):
            return work()

        def at(place: str) -> _Result:
            self._place = place
            # an earlier try may have written some of it before it found no more room
            self.data.take_back()
            return work()

        return self.device.run(at, visit_bytes(param, self.chunk.shape, self.method), param.key)

    def _there(self, tau: TaskVector) -> TaskVector:
        """A change where this chunk is computed."""
        return tau if self._place == CPU else tau.to(self._place)

    def _fold(self) -> Folded:
        squares, carries, deviation = self._one_by_one()
        changes, fits = self._read_out(carries)
        return Folded(squares, changes, deviation, fits)

    def _reread(self) -> list[TaskVector]:
        count, param = len(self.files.models), self.chunk.param
        kept = self.files.scratch or self.files.states[count]
        read = partial(carried, kept.slots, kept.read)
        return self._read_out([self._carry_in(read, block, param.ranks) for block in param.blocks])[0]

    def _one_by_one(self) -> tuple[list[tuple[float, ...]], list[Carry], float | None]:
        method = self.method
        param, start, count = self.chunk.param, self.files.start, len(self.files.models)
        carries: list[Carry | None] = [self._prior_carry(block) for block in param.blocks]
        squares, deviations = [], []
        weights = self.plan.weights_of(param)
        watched = zlib.crc32(param.key.encode()) % WATCHED == 0
        for i in range(start, count):
            tau = self.data.task_vector(i)
            squares.append(self.data.squared_norms(i, tau))
            for b, block in enumerate(param.blocks):
                part = self._there(part_of(tau, block, self.chunk))
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

    def _at_once(self) -> Folded | None:
        """Fold all models in few calls; None where they have to be folded one by one."""
        import torch

        method = self.method
        param, files, count = self.chunk.param, self.files, len(self.files.models)
        plain = method.plain_sum
        if plain is None or files.prior is not None or self.plan.subtracted or self.plan.fits(param):
            return None
        if any(kept != count for kept in files.states) or len(param.blocks) != 1 or not param.blocks[0].is_whole:
            return None
        if self.plan.vocabulary is not None and param.vocab_axis is not None:
            return None
        entry = self.plan.base.tensors[param.key]
        weights = self.plan.weights_of(param)
        terms = [
            Term(model, name, weight)
            for model, weight in zip(files.models, weights, strict=True)
            if (name := model.lies_as(param.key, entry)) is not None
        ]
        if len(terms) < count:
            return None
        first = 0 if self.chunk.rows is None else self.chunk.rows[0] * math.prod(entry.shape[1:])
        writers = [writer for writer in (files.states.get(count), files.scratch) if writer is not None]
        dtype = torch.float32 if SIZES[param.slot.dtype] < 4 else torch.float64
        rows = merge_rows(plain, terms, self.data.base(), first, files.memory, dtype=dtype, keep=bool(writers))
        if rows is None:
            return None
        if rows.sum is not None:
            carries = [_settled(method, param, param.blocks[0], count, {"S": Dense(rows.sum)})]
            for writer in writers:
                self._store(writer, carries, count)
        return Folded([(square,) for square in rows.squares], [Dense(rows.change)])

    def _prior_carry(self, block: Segment) -> Carry | None:
        """What the prior state holds of a block, without the models that leave; None where there is none."""
        method, prior, state = self.method, self.plan.prior, self.files.prior
        if prior is None or state is None or not (prior.count or prior.held):
            return None
        param = self.chunk.param
        ranks = prior.ranks(param)
        carry = self._carry_in(state.read, block, ranks)
        if not prior.held:
            return carry
        for j, reader in enumerate(self.files.leaving):
            if param.leaving[j] is None:
                tau = reader.task_vector(param.key, self.data.base, None, self.chunk.rows)
                part = self._there(part_of(tau, block, self.chunk))
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
        block: Segment,
        ranks: Sequence[int | None],
    ) -> Carry:
        """A block's carry from a state of models whose changes have these ranks."""
        param = self.chunk.param
        forms = self.method.carry_form(block.shape(param.slot.shape), ranks, matrix=block.matrix)
        stored = any(rank != 0 for rank in ranks)
        return {
            name: self._there(
                read(state_name(param, block, name), self.chunk.rows)
                if stored and form.rank != 0
                else zero(block.shape(self.chunk.shape))
            )
            for name, form in forms.items()
        }

    def _read_out(self, carries: Sequence[Carry]) -> tuple[list[TaskVector], list[FitProducts] | None]:
        """The merged change of every block, and its part in the scale of a fitted norm if the state holds it.

        Models that the recipe subtracts are approximately removed from it.
        """
        import torch

        param, weights = self.chunk.param, self.plan.weights_of(self.chunk.param)
        counted = [weight for i, weight in enumerate(weights) if i not in self.plan.subtracted]
        taus = [(weights[i], self.data.task_vector(i)) for i in self.plan.subtracted]
        changes, fits = [], list[FitProducts]()
        for block, carry in zip(param.blocks, carries, strict=True):
            for weight, tau in taus:
                if tau is not None:
                    carry = self.method.unstep(carry, self._there(cut(tau, block)), weight, matrix=block.matrix)
            change = self.method.emit(carry, counted, matrix=block.matrix)
            fit = self.method.fit(carry, change, counted) if self.plan.fits(param) else None
            fits += [] if fit is None else [fit]
            # an output of 16 bits needs no more than float32, and float64 would take twice the time
            change = change.to(torch.float32) if SIZES[param.slot.dtype] < 4 else change
            changes.append(change if self._place == CPU else change.to(CPU))
        return changes, fits if len(fits) == len(changes) else None

    def _store(self, writer: SafetensorsWriter, carries: Sequence[Carry | None], count: int) -> None:
        param = self.chunk.param
        if all(rank == 0 for rank in param.ranks[:count]):
            return
        for block, carry in zip(param.blocks, carries, strict=True):
            assert carry is not None
            for name, value in carry.items():
                if value.is_zero:
                    continue
                for suffix, tensor in value.to(CPU).tensors().items():
                    self.data.put(writer, f"{state_name(param, block, name)}{suffix}", tensor)


def _settled(method: FoldMethod, param: Param, block: Segment, count: int, carry: Carry) -> Carry:
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
