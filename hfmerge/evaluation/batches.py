"""Rows in batches: sorted by length so that little is padding, shared between processes, results in row order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hfmerge.engine.ranks import Ranks, assign_owners


_T = TypeVar("_T")


@dataclass(frozen=True)
class Runner:
    """How batches are run.

    Attributes:
        batch_size: rows in a batch.
        device: of the model, as torch names it.
        ranks: the processes among which batches are shared.
        tick: called with the number of rows just done, by all processes together.
    """

    batch_size: int
    device: str
    ranks: Ranks
    tick: Callable[[int], object]

    def run(
        self, lengths: Sequence[int], work: Callable[[Sequence[int]], Sequence[_T]], *, budget: int | None = None
    ) -> list[_T]:
        """Results of all rows, in their order, on every process; the same whatever the number of processes.

        Args:
            lengths: of each row; a batch is padded to its longest.
            work: row numbers of one batch -> a result for each.
            budget: padded length of a batch at most, where memory depends on it.
        """
        import torch

        batches = length_batches(lengths, self.batch_size, budget)
        costs = [float(len(batch) * lengths[batch[0]]) for batch in batches]
        owners = assign_owners(costs, self.ranks.world)

        def mine() -> dict[int, _T]:
            found: dict[int, _T] = {}
            with torch.inference_mode():
                for batch, owner in zip(batches, owners, strict=True):
                    if owner == self.ranks.rank:
                        self.ranks.check()
                        found.update(zip(batch, work(batch), strict=True))
                        self.tick(len(batch) * self.ranks.world)
            return found

        everyone: dict[int, _T] = {}
        for found in self.ranks.together(mine):
            everyone.update(found)
        return [everyone[i] for i in range(len(lengths))]


def length_batches(lengths: Sequence[int], size: int, budget: int | None = None) -> list[list[int]]:
    """Row numbers in batches, longest first, so that a batch that does not fit the memory fails at once."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        last = batches[-1] if batches else None
        full = last is None or len(last) >= size
        if last is None or full or (budget is not None and (len(last) + 1) * lengths[last[0]] > budget):
            batches.append([row])
        else:
            last.append(row)
    return batches


def padded(rows: Sequence[Any], fill: int, device: str) -> tuple[Any, Any]:
    """Rows of token numbers as one array, padded on the right, and the mask of what is not padding.

    Args:
        rows: integer arrays.

    Returns:
        int64 tensors (rows, longest) on the device.
    """
    import numpy as np
    import torch

    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
