"""Cuts the work into chunks (a parameter or some of its rows), groups them, and estimates their cost and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hfmerge.checkpoint.reader import Rows
from hfmerge.engine.plan import Param, Plan
from hfmerge.engine.threads import AHEAD
from hfmerge.methods import MergeMethod


_CHUNK = 1 << 20
"""Elements of a chunk that is some rows of a larger parameter: enough that handing it out costs nothing beside it."""
TILE = 1 << 18
"""Elements of a tile: all that is computed of it stays near a core, and calls cost little beside the work on it."""
REMEMBERED = 1 << 24
"""Elements of all models' changes that stay in memory from a survey to their merging; more are read again."""

TOGETHER = 16
"""Matrices that an accelerator takes apart in one call, at most."""
STACKED = 1 << 24
"""Elements of them together: larger ones fill it one by one."""


@dataclass(frozen=True)
class Chunk:
    """The work of one visit: a parameter, or some of its rows, which are computed tile by tile.

    Attributes:
        param: the output parameter.
        rows: half-open range along its first axis; None for the whole parameter.
        tile: approximate number of elements of a tile.
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
    """Cut parameters into chunks."""
    result: list[Chunk] = []
    for param in params:
        aligned = param.vocab_axis is not None and plan.vocabulary is not None
        cut = [] if aligned else _cut(plan, param)
        sliceable = all(delta.sliceable(param.key) for delta in (*plan.deltas, *plan.leaving))
        result.extend(cut if cut and sliceable else [Chunk(param)])
    return result


def pieces(plan: Plan, chunk: Chunk) -> list[Rows]:
    """Rows of a whole parameter whose norms are summed up one by one; none if its norm is that of the whole.

    These are the rows in which the parameter would be visited if all models could be read in rows. The norm is part of
    the result, so it must not depend on which models can be read in rows.
    """
    cut = _cut(plan, chunk.param) if chunk.rows is None else []
    return [tile.rows for each in cut for tile in each.tiles() if tile.rows is not None]


def _cut(plan: Plan, param: Param) -> list[Chunk]:
    """The chunks of a large parameter whose rows the method takes one by one; they follow from method and shape."""
    shape, method = param.slot.shape, plan.method
    size = math.prod(shape)
    if len(shape) < 2 or size <= TILE:
        return []
    if plan.fits(param):
        # the scale needs products of whole matrices
        return []
    surveyed = method.survey(1, 1) is not None and _is_one(param)
    # a spectral method sums tensors that are no matrices
    summed = method.is_fold and _is_one(param) and not param.blocks[0].matrix
    if not (method.needs == "elements" or surveyed or summed):
        return []
    # plain sums choose the size of their pieces themselves
    tile = TILE if method.plain_sum is None else _CHUNK
    # a survey needs all rows
    step = shape[0] if surveyed else max(1, _CHUNK // (size // shape[0]))
    return [Chunk(param, (at, min(at + step, shape[0])), tile) for at in range(0, shape[0], step)]


def alike(
    method: MergeMethod, candidates: Iterable[Chunk], room: int | None, place: Callable[[Chunk], object]
) -> list[tuple[Chunk, ...]]:
    """Chunks in groups whose matrices an accelerator takes apart together, as one of them would not fill it.

    They have equal shapes, and models change them in equal forms. What is no matrix is a group of its own.

    Args:
        room: bytes that a group may take there.
        place: what the chunks of a group have in common besides.
    """
    groups: list[list[Chunk]] = []
    begun: dict[Any, list[Chunk]] = {}
    for chunk in candidates:
        blocks = chunk.param.blocks
        shapes = tuple((block.shape(chunk.shape), block.matrix) for block in blocks)
        key = (chunk.shape, shapes, chunk.param.ranks, place(chunk))
        size = math.prod(chunk.shape)
        many = min(TOGETHER, STACKED // size if size else 0)
        if room is not None:
            many = min(many, room // visit_bytes(chunk.param, chunk.shape, method))
        if many < 2 or not any(block.matrix for block in blocks):
            groups.append([chunk])
            continue
        if key not in begun:
            begun[key] = []
            groups.append(begun[key])
        begun[key].append(chunk)
        if len(begun[key]) == many:
            del begun[key]
    return [tuple(group) for group in groups]


def cost(plan: Plan, chunk: Chunk) -> float:
    """Relative time of a visit: of matrices m n min(m, n), or another side, for spectral methods, bytes otherwise."""
    if plan.method.needs != "matrix":
        return float(chunk.nbytes)
    shapes = [block.shape(chunk.shape) for block in chunk.param.blocks if block.matrix]
    sides = _sides(chunk.param, chunk.shape, plan.method)
    return chunk.nbytes + float(sum(math.prod(shape) * side for shape, side in zip(shapes, sides, strict=True)))


def held(plan: Plan, chunk: Chunk) -> int:
    """About the bytes that a visit holds at its peak."""
    param = chunk.param
    if not param.touched and plan.base.tensors[param.key].dtype == param.slot.dtype:
        return chunk.nbytes
    shape = max((tile.shape for tile in chunk.tiles()), key=math.prod)
    kept = 4 * (len(plan.deltas) + 1) * math.prod(chunk.shape) if remembered(plan, chunk) else 0
    # PEFT's layer has the weight, what it becomes, and what it is made of
    layered = any(param.key in delta.layers for delta in plan.deltas)
    return visit_bytes(param, shape, plan.method) + kept + 16 * math.prod(shape) * layered


def ahead(plan: Plan) -> int:
    """Visits under way beyond the cores: none where dense matrices are taken apart, much longer work than reading."""
    slow = plan.method.needs == "matrix" and any(
        rank is None and block.matrix for param in plan.params for rank in param.ranks for block in param.blocks
    )
    return 0 if slow and not plan.recipe.stream else AHEAD


def remembered(plan: Plan, chunk: Chunk) -> bool:
    """What is read of a chunk when its rows are surveyed stays in memory until they are merged."""
    method, models = plan.method, len(plan.deltas)
    if method.survey(1, 1) is None or chunk.rows is None or method.measure(models) is not None:
        return False
    return models * math.prod(chunk.shape) <= REMEMBERED


def visit_bytes(param: Param, shape: tuple[int, ...], method: MergeMethod | None) -> int:
    """About the bytes that computing a parameter, or a piece of it of this shape, holds at its peak.

    The base and a task vector in float32 with what they are read from; of a spectral method the accumulator, the task
    vector, its projection and their sum in float64, the method's square matrices, and what the libraries hold for
    them: as many bytes an element as the method says, which were measured.

    Args:
        method: None for what stays in the CPU's memory where an accelerator takes matrices apart.
    """
    size = math.prod(shape)
    if method is None or method.needs != "matrix" or not any(block.matrix for block in param.blocks):
        return 24 * size
    side = max(_sides(param, shape, method))
    return method.element_bytes * size + method.square_bytes * side * side


def _sides(param: Param, shape: tuple[int, ...], method: MergeMethod) -> list[int]:
    """Sides of the square matrices that a method of matrices makes of a parameter's matrices."""
    low = all(rank is not None for rank in param.ranks)
    return [method.square_side(block.shape(shape), low=low) for block in param.blocks if block.matrix]


def _is_one(param: Param) -> bool:
    """The parameter is one block, so that what is done with its rows is done with the block's."""
    return len(param.blocks) == 1 and param.blocks[0].expert is None and param.blocks[0].axis is None
