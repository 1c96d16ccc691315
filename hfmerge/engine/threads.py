"""Threads for the visits of one process: one computes on each core while others read ahead or write behind."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar


Work = TypeVar("Work")
_Result = TypeVar("_Result")

AHEAD = 1
"""Visits beyond the cores, which wait for the disk, or for a core, while the others compute."""


def core_count() -> int:
    """Visits that compute at once in one process: one per core, shared with the run's other processes here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def resident_memory() -> int:
    """Bytes of memory that this process holds now, the pages of mapped files included; 0 where nobody tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # not Linux: the bound then counts the visits alone
        return 0


def overlapped(
    work: Callable[[Work], _Result],
    visits: Sequence[Work],
    needs: Sequence[int],
    *,
    threads: int,
    memory: int | None,
) -> Generator[_Result, None, None]:
    """Results of `work` over the visits, in their order; the first failure ends all, once the running ones are done.

    Args:
        work: called on one of the threads, each of which gives torch one core.
        visits: begun in their order.
        needs: bytes that each visit holds at its peak.
        threads: visits under way at once.
        memory: bytes that the visits under way may need together; one that needs more goes alone. None: no bound.
    """
    import torch

    # the number of threads is a property of each thread: what the main thread set does not reach those of the pool
    pool = ThreadPoolExecutor(threads, "hfmerge", torch.set_num_threads, (1,))
    ordered: deque[Future[_Result]] = deque()
    held: dict[Future[_Result], int] = {}
    try:
        for visit, need in zip(visits, needs, strict=True):
            while held and (len(held) >= threads + 1 or (memory is not None and sum(held.values()) + need > memory)):
                for future in wait(held, return_when=FIRST_COMPLETED).done:
                    del held[future]
                    future.result()
                while ordered and ordered[0].done():
                    yield ordered.popleft().result()
            future = pool.submit(work, visit)
            ordered.append(future)
            held[future] = need
        while ordered:
            yield ordered.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
