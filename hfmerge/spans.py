"""How a streamed file is cut into blocks along its tensors, and which blocks make one request."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from hfmerge.blockstore import SMALL


def cut(start: int, spans: Sequence[tuple[int, int]], unit: int) -> list[int]:
    """Bounds of blocks: small tensors together, larger ones by themselves, those beyond `unit` in equal parts.

    Args:
        start: where the first tensor begins.
        spans: first byte and length of each tensor, in order and without gaps.
        unit: bytes of the longest block.
    """
    bounds, stop = [start], start
    for first, length in spans:
        stop = first + length
        if length >= SMALL:
            if first > bounds[-1]:
                bounds.append(first)
            parts = -(-length // unit)
            bounds.extend(first + length * part // parts for part in range(1, parts + 1))
        elif stop - bounds[-1] >= SMALL:
            bounds.append(stop)
    return bounds if stop == bounds[-1] else [*bounds, stop]


def block_at(bounds: Sequence[int], byte: int) -> int:
    """Index of the block that holds a byte."""
    return bisect_right(bounds, byte) - 1


def adjacent(blocks: Sequence[int], bounds: Sequence[int], unit: int) -> list[tuple[int, int]]:
    """Adjacent blocks put together, up to `unit` bytes: first, and the one after the last."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block and bounds[block + 1] - bounds[runs[-1][0]] <= unit:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
