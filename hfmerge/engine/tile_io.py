"""Reads and writes the data of one chunk: the base, the change of every model, the merged values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.delta import longer_base
from hfmerge.checkpoint.writer import TORCH_NAMES, SafetensorsWriter
from hfmerge.engine.device import CPU
from hfmerge.engine.journal import checksum
from hfmerge.engine.partition import Chunk, pieces
from hfmerge.engine.plan import DTYPE_NAMES
from hfmerge.engine.run_files import RunFiles
from hfmerge.errors import NonFiniteError
from hfmerge.methods import Site
from hfmerge.task_vector import Dense, Segment, TaskVector, cut, squared_norm, zero


if TYPE_CHECKING:
    from torch import Tensor


class ChunkData:
    """The data of one chunk, for one thread.

    Attributes:
        wrote: file and tensor -> checksum of what was written to it, for the journal; empty without one.
        remember: changes that were read are kept for the next time.
    """

    def __init__(self, files: RunFiles, chunk: Chunk, wrote: dict[tuple[str, str], int] | None = None):
        self.files, self.plan, self.chunk = files, files.plan, chunk
        self.wrote = {} if wrote is None else wrote
        self.remember = False
        self._changes: dict[int, TaskVector | None] = {}
        self._put: list[tuple[SafetensorsWriter, str, int]] = []
        self._base: Tensor | None = None

    def base(self) -> Tensor:
        """The base's float32 value in the output's rows, in memory of this object's own; read at the first use."""
        if self._base is None:
            param = self.chunk.param
            value = self.files.base.value(param.key, self.chunk.rows)
            vocabulary = self.plan.vocabulary
            if vocabulary is not None and param.vocab_axis is not None:
                value = longer_base(vocabulary, value, self.files.models, param.key, param.vocab_axis)
            self._base = value
        return self._base

    def task_vector(self, model: int) -> TaskVector | None:
        """One model's change, read anew at every call unless it is remembered; None where it has none."""
        if model in self._changes:
            return self._changes[model]
        aligned = None
        param = self.chunk.param
        if self.plan.vocabulary is not None and param.vocab_axis is not None:
            aligned = (self.plan.vocabulary, model, param.vocab_axis)
        change = self.files.models[model].task_vector(param.key, self.base, aligned, self.chunk.rows)
        if self.remember:
            self._changes[model] = change
        return change

    def taus(self, block: Segment, device: str = CPU) -> Sequence[TaskVector]:
        """The task vectors of one block on a device, each read when indexed, so that few need be held."""
        return _LazyTaus(self, block, device)

    def site(self, block: Segment, device: str) -> Site:
        """Where one block lies, for a method."""
        param, chunk, files = self.chunk.param, self.chunk, self.files
        first = 0 if chunk.rows is None else chunk.rows[0] * math.prod(chunk.shape[1:])

        def pin(model: int) -> str:
            assert files.pin is not None
            return files.pin(model)

        def beside(file: str, model: int) -> Tensor:
            return block.take(files.beside(model, file, param.key, chunk.rows)).contiguous().to(device)

        name = f"{param.key}#{block.label}" if block.label else param.key
        return Site(name, block.shape(chunk.shape), block.matrix, first, device, pin, beside)

    def squared_norms(self, model: int, tau: TaskVector | None) -> tuple[float, ...]:
        """Of one model's change, see `norms_of`; not a number means that model or base is not: refused by name.

        Where the recipe allows such values they count as zero in norms, but no matrix with them can be taken apart.
        """
        if tau is None:
            return (0.0,)
        parts = self._parts(tau)
        squares = tuple(part.squared_norm() for part in parts)
        if all(map(math.isfinite, squares)):
            return squares
        param, method = self.chunk.param, self.plan.method
        if not self.plan.recipe.allow_nonfinite:
            self.files.models[model].check_finite(param.key)
            self.files.base.check_finite(param.key)
        elif method.needs == "matrix" and any(block.matrix for block in param.blocks):
            raise NonFiniteError(
                f"{self.files.models[model].delta.source.snapshot.label}: {param.key} holds NaN or Inf, and "
                f"{method.name} cannot take such a matrix apart; repair the source, or leave the tensor out with "
                "`exclude`."
            )
        return tuple(map(_finite_square, parts))

    def norms_of(self, change: TaskVector) -> tuple[float, ...]:
        """Squared norms of a change's pieces (see `partition.pieces`), of finite elements."""
        return tuple(map(_finite_square, self._parts(change)))

    def _parts(self, change: TaskVector) -> list[TaskVector]:
        rows = pieces(self.plan, self.chunk) if isinstance(change, Dense) else []
        return [Dense(change.to_dense()[first:last]) for first, last in rows] or [change]

    def write(self, changes: Sequence[TaskVector], scale: float) -> None:
        """`base + scale * change` into the output, rounded once; the base in memory is used up."""
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
        self.emit(value)

    def emit(self, value: Tensor) -> None:
        """Values of all rows into the output, rounded to its dtype.

        Raises:
            NonFiniteError: they do not fit it, and the recipe does not allow that.
        """
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
            self.put(self.files.outputs[target.file], target.key, cast)

    def put(self, writer: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        """A tensor, or the chunk's rows of it, into a file; noted for the journal."""
        data = writer.write(name, tensor, None if self.chunk.rows is None else self.chunk.rows[0])
        self._put.append((writer, name, len(data)))
        if self.files.journal is not None:
            place = (writer.path.name, name)
            self.wrote[place] = checksum(data, self.wrote.get(place, 0))

    def take_back(self) -> None:
        """Count what was put into files as not written; for a whole parameter that is computed again."""
        for writer, name, nbytes in self._put:
            writer.claim(name, -nbytes)
        self._put.clear()
        self.wrote.clear()


class _LazyTaus(Sequence[TaskVector]):
    def __init__(self, data: ChunkData, block: Segment, device: str):
        self.data, self.block, self.device = data, block, device

    def __len__(self) -> int:
        return len(self.data.files.models)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tau = part_of(self.data.task_vector(index), self.block, self.data.chunk)
        return tau if self.device == CPU else tau.to(self.device)


def part_of(tau: TaskVector | None, block: Segment, chunk: Chunk) -> TaskVector:
    """One block of a model's change, zero where it has none."""
    return zero(block.shape(chunk.shape)) if tau is None else cut(tau, block)


def _finite_square(change: TaskVector) -> float:
    """Squared norm of the finite elements, whose squares may exceed float32."""
    square = change.squared_norm()
    if math.isfinite(square):
        return square
    return float(change.to_dense().double().nan_to_num(0.0, 0.0, 0.0).square().sum())
