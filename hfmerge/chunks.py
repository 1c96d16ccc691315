"""How the work is cut into chunks: a whole parameter, or some rows of one whose method works element by element."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hfmerge.checkpoint.reader import Rows
from hfmerge.estimating import visit_bytes
from hfmerge.methods import AdditiveFold, JointMethod
from hfmerge.planned import Param, Plan


CHUNK = 1 << 20
"""Elements of a chunk that is some rows of a larger parameter: enough that handing it out costs nothing beside it."""
TILE = 1 << 18
"""Elements of a tile: all that is computed of it stays near a core, and calls cost little beside the work on it."""


@dataclass(frozen=True)
class Chunk:
    """What one visit computes: a parameter, or some of its rows, then tile by tile.

    Attributes:
        param, rows: see above.
        tile: elements of a tile, about.
    """

    param: Param
    rows: Rows | None = None
    tile: int = TILE

    def tiles(self) -> list[Chunk]:
        """The chunk in pieces of some rows each; itself if it is a whole parameter."""
        if self.rows is None:
            return [self]
        step = max(1, self.tile // max(1, math.prod(self.shape[1:])))
        first, last = self.rows
        return [Chunk(self.param, (at, min(at + step, last)), self.tile) for at in range(first, last, step)]

    def start(self, share: int) -> Chunk:
        """The first of `share` equal parts of a chunk that is some rows, one row at least."""
        assert self.rows is not None
        last = self.rows[0] + -(-(self.rows[1] - self.rows[0]) // share)
        return Chunk(self.param, (self.rows[0], last), self.tile)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what the visit computes."""
        shape = self.param.slot.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of it in the output."""
        shape = self.param.slot.shape
        return self.param.slot.nbytes if self.rows is None else self.param.slot.nbytes // shape[0] * self.shape[0]


def chunks(plan: Plan, params: Iterable[Param]) -> list[Chunk]:
    """Cut parameters into chunks; the cuts depend on the plan alone, so sums over them are the same everywhere."""
    result: list[Chunk] = []
    # plain sums take pieces of their own size
    tile = CHUNK if isinstance(plan.method, AdditiveFold) and plan.method.plain else TILE
    for param in params:
        shape = param.slot.shape
        size = math.prod(shape)
        aligned = param.vocab_axis is not None and plan.vocabulary is not None
        surveyed = isinstance(plan.method, JointMethod) and plan.method.survey(1, 1) is not None and _is_one(param)
        # a norm is summed up as the chunks are cut, and must not depend on which models take part
        if (
            (plan.method.elementwise or surveyed)
            and plan.norm == "none"
            and not aligned
            and len(shape) > 1
            and size > TILE
        ):
            if all(delta.sliceable(param.key) for delta in (*plan.deltas, *plan.leaving)):
                # a survey needs all rows
                step = shape[0] if surveyed else max(1, CHUNK // (size // shape[0]))
                result.extend(Chunk(param, (at, min(at + step, shape[0])), tile) for at in range(0, shape[0], step))
                continue
        result.append(Chunk(param))
    return result


def cost(plan: Plan, chunk: Chunk) -> float:
    """Relative time of a visit: m n min(m, n) of its matrices for spectral methods, bytes otherwise."""
    if not plan.method.matrixwise:
        return float(chunk.nbytes)
    shapes = [block.shape(chunk.shape) for block in chunk.param.blocks if block.matrix]
    return chunk.nbytes + float(sum(math.prod(shape) * min(shape) for shape in shapes))


def held(plan: Plan, chunk: Chunk) -> int:
    """About the bytes that a visit holds at its peak."""
    param = chunk.param
    if not param.touched and plan.base.tensors[param.key].dtype == param.slot.dtype:
        return chunk.nbytes
    shape = max((tile.shape for tile in chunk.tiles()), key=math.prod)
    return visit_bytes(param, shape, plan.method.matrixwise)


def _is_one(param: Param) -> bool:
    """The parameter is one block, so that a survey of its rows is one of the block."""
    return len(param.blocks) == 1 and param.blocks[0].expert is None and param.blocks[0].axis is None
