"""The processes of one run: rank, world, exchange, fair shares. Only this module imports accelerate.

A launcher (`torchrun`, `accelerate launch --multi_gpu`) sets `WORLD_SIZE`; without it there is one process and
accelerate is not even imported. Only small Python objects cross processes; tensors meet in the files of the output.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hfmerge.engine.watchdog import Watch, accept, connect, listen, lost_contact
from hfmerge.errors import HfMergeError


if TYPE_CHECKING:
    from torch.distributed import Store

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=24)
"""How long a process waits for another: as long as the largest spectral decompositions may take."""
ARRIVAL = timedelta(minutes=10)
"""How long the processes that came wait for the others when a run begins; torchrun's own rendezvous waits as long."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: from 0; rank 0 talks to the user and the Hub.
        world: number of processes.
        disks: disk to which each rank writes, from 0, which is rank 0's; empty if there is one for all (`storage`).
    """

    rank: int = 0
    world: int = 1
    disks: tuple[int, ...] = ()
    _state: Any = field(default=None, repr=False, compare=False)
    _watch: Watch | None = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """True for rank 0."""
        return self.rank == 0

    @property
    def disk(self) -> int:
        """The disk to which this process writes."""
        return self.disks[self.rank] if self.disks else 0

    @property
    def disk_count(self) -> int:
        """Disks to which the processes write; each process sees one of them."""
        return max(self.disks, default=0) + 1

    @property
    def leads(self) -> bool:
        """True for the one process a disk that lays out its files."""
        return self.rank == (self.disks.index(self.disk) if self.disks else 0)

    def on_disk(self, disk: int) -> list[int]:
        """The ranks that write to a disk."""
        return [rank for rank in range(self.world) if not self.disks or self.disks[rank] == disk]

    def check(self) -> None:
        """Check that all other processes live. Call it between pieces of long work, so that a rank stops early.

        Raises:
            LostProcessError: another process is gone.
        """
        if self._watch is not None:
            self._watch.check()

    def gather(self, value: _T) -> list[_T]:
        """Every rank's value, in rank order, on every rank.

        Raises:
            LostProcessError: another process is gone.
        """
        if self.world == 1:
            return [value]
        self.check()
        from accelerate.utils import gather_object

        try:
            return list(gather_object([value]))
        except RuntimeError as error:
            if self._watch is not None:
                raise self._watch.explain(error) from error
            raise lost_contact(self.rank, self.world, error) from error

    def each(self, work: Callable[[], _T]) -> _T:
        """Run `work` on every rank and give this rank's result; if it fails on one, all ranks raise that error.

        Call sequence on each rank: run, exchange errors, raise the own one or else the lowest rank's.
        """
        if self.world == 1:
            return work()
        result: _T | None = None
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

    def together(self, work: Callable[[], _T]) -> list[_T]:
        """As `each`, with all results, which must be small, in rank order on every rank."""
        return self.gather(self.each(work))

    def on_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0 alone; its result, or its error, on every rank."""
        return self.together(work if self.main else lambda: None)[0]  # type: ignore[return-value]  # rank 0's, never the None


@contextlib.contextmanager
def processes() -> Iterator[Ranks]:
    """The processes of this run for as long as one verb works, each watching that no other is gone.

    Raises:
        HfMergeError: see `current_ranks`; the processes cannot reach one another.
    """
    ranks = current_ranks()
    if ranks.world == 1:
        yield ranks
        return
    watch = _watch(ranks)
    orderly = False
    try:
        yield dataclasses.replace(ranks, _watch=watch)
        orderly = True
    except Exception:
        # `each` raises the error on all processes; an interruption happens on this one alone
        orderly = True
        raise
    finally:
        watch.close(orderly=orderly)


def _watch(ranks: Ranks) -> Watch:
    """Connect all processes with rank 0."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world)
    server = listen(everywhere=not one_machine) if ranks.main else None
    port = server.getsockname()[1] if server is not None else 0
    everyone = ranks.gather((socket.gethostname(), port, secrets.token_bytes(16)))
    _, port, token = everyone[0]
    host = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
    if server is not None:
        links = ranks.each(lambda: accept(server, token, ranks.world))
    else:
        links = ranks.each(lambda: connect(host, port, token, ranks.rank))
    return Watch(ranks.rank, [name for name, _, _ in everyone], links)


def current_ranks() -> Ranks:
    """This process's rank as the launcher set it; starts the process group on first use.

    Raises:
        HfMergeError: the launcher was asked for several processes and started one; the others do not come.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        # accelerate's launcher of one process sets this when the user asked for several
        raise HfMergeError(
            "`accelerate launch` was asked for several processes and started one (as it does with `--cpu` and "
            "`distributed_type: MULTI_CPU`); use `accelerate launch --multi_gpu`, which needs no GPU, or `torchrun`."
        )
    if wanted <= 1:
        return Ranks()
    import torch.distributed
    from accelerate import PartialState

    begun = torch.distributed.is_initialized()
    met = {} if begun else {"store": _meet(wanted)}
    # on the CPU backend even beside accelerators: what crosses processes are small Python objects
    state = PartialState(cpu=True, timeout=_PATIENCE, **met)
    if not begun:
        # a thread of the group that lets go of its last tensor once the interpreter is gone would abort the process
        atexit.register(state.destroy_process_group)
    return Ranks(state.process_index, state.num_processes, _state=state)


def _meet(wanted: int) -> Store:
    """The address at which the processes find one another, once all have come. torch alone would wait `_PATIENCE`.

    Raises:
        HfMergeError: not all come; the launcher has not said where.
    """
    import torch.distributed as distributed

    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=ARRIVAL))
    except ValueError as error:
        raise HfMergeError(
            f"WORLD_SIZE asks for {wanted} processes, and {error}; use `torchrun` or `accelerate launch --multi_gpu`."
        ) from error
    except distributed.DistError as error:
        raise HfMergeError(
            f"process {os.environ['RANK']} of {wanted}: not all processes have come to "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {ARRIVAL.total_seconds():.0f} seconds "
            f"({str(error).splitlines()[0]}); see what the others printed, and run the same command again."
        ) from error
    store.set_timeout(_PATIENCE)
    return distributed.PrefixStore("hfmerge", store)


def assign_owners(costs: Sequence[float], world: int, allowed: Sequence[Sequence[int]] | None = None) -> list[int]:
    """Owner of each piece of work: the largest first, each to the process with least so far; equal on every rank.

    Args:
        allowed: the processes that may do each piece; None: all.
    """
    owners = [0] * len(costs)
    if world == 1:
        return owners
    loads = [0.0] * world
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world) if allowed is None else allowed[index], key=lambda r: (loads[r], r))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
