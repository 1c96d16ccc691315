"""The processes of one run, through accelerate, which nothing else imports: rank, world, exchange, fair shares.

A launcher (`torchrun`, `accelerate launch --multi_gpu`) sets `WORLD_SIZE`; without it there is one process and
accelerate is not even imported. Only small Python objects cross processes; tensors meet in the files of the output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from hfmerge.errors import HfMergeError


T = TypeVar("T")
PATIENCE = timedelta(hours=24)
"""How long a process waits for another: as long as the largest spectral decompositions may take."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: from 0; rank 0 talks to the user and the Hub.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1
    _state: Any = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """True for rank 0."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank.

        Raises:
            HfMergeError: another process is gone.
        """
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        try:
            return list(gather_object([value]))
        except RuntimeError as error:
            raise HfMergeError(
                f"process {self.rank} of {self.world}: another process of this run ended "
                f"({str(error).splitlines()[0]}); run the same command again."
            ) from error

    def each(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and give this rank's result; if it fails on one, all ranks raise that error.

        Call sequence on each rank: run, exchange errors, raise the own one or else the lowest rank's.
        """
        if self.world == 1:
            return work()
        result: T | None = None
        failed: BaseException | None = None
        told: HfMergeError | None = None
        try:
            result = work()
        except HfMergeError as error:
            failed = told = error
        except Exception as error:  # whatever it is, the others wait for this rank and must hear of it
            failed, told = error, HfMergeError(f"process {self.rank}: {type(error).__name__}: {error}")
        problems = self.gather(told)
        if failed is not None:
            raise failed
        for problem in problems:
            if problem is not None:
                raise problem
        return result  # type: ignore[return-value]  # None only if T is None: a failure was raised above

    def together(self, work: Callable[[], T]) -> list[T]:
        """As `each`, with all results, which must be small, in rank order on every rank."""
        return self.gather(self.each(work))

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; its result, or its error, on every rank."""
        return self.together(work if self.main else lambda: None)[0]  # type: ignore[return-value]  # rank 0's, never the None


def current_ranks() -> Ranks:
    """This process's rank as the launcher set it; starts the process group on first use.

    Raises:
        HfMergeError: the launcher asked for several processes and only one was started.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted <= 1:
        return Ranks()
    from accelerate import PartialState

    # on the CPU backend even beside accelerators: what crosses processes are small Python objects
    state = PartialState(cpu=True, timeout=PATIENCE)
    if state.num_processes != wanted:
        raise HfMergeError(
            f"{wanted} processes were asked for and {state.num_processes} runs; use `torchrun --nproc_per_node "
            f"{wanted}` or "
            "`accelerate launch --multi_gpu` (`--cpu` starts one process)."
        )
    return Ranks(state.process_index, state.num_processes, state)


def shares(costs: Sequence[float], world: int) -> list[int]:
    """Owner of each piece of work: the largest first, each to the process with least so far; equal on every rank."""
    owners = [0] * len(costs)
    if world == 1:
        return owners
    loads = [0.0] * world
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world), key=lambda r: (loads[r], r))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
