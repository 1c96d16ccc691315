"""Where matrices are taken apart: on the CPU, or on an accelerator that knows float64, one or several of a shape.

Only spectral methods go there. The others are bound by reading, hashing and writing, which an accelerator does not
speed up, and so they give the bytes of the CPU whatever is asked for.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from hfmerge.errors import HfMergeError
from hfmerge.lockstep import Company, leave


T = TypeVar("T")

CPU = "cpu"
TURNS = 2
"""Matrices on an accelerator at once: one is computed while another comes or goes."""
USABLE = 0.9
"""Share of an accelerator's memory that matrices may fill."""


@dataclass(frozen=True)
class Device:
    """The device of one process.

    Attributes:
        place: as torch names it: "cpu", "cuda:0".
        name: what the ledger says of it: "cpu", or the model of the accelerator.
        room: bytes that one matrix may take; None for no bound.
        notify: told in one line what is computed on the CPU instead.
        moved: called when that happens by chance.
    """

    place: str = CPU
    name: str = CPU
    room: int | None = None
    notify: Callable[[str], object] | None = None
    moved: Callable[[], object] | None = None
    _turns: contextlib.AbstractContextManager[Any] = field(
        default_factory=lambda: threading.BoundedSemaphore(TURNS), repr=False, compare=False
    )

    def run(self, work: Callable[[str], T], need: int, what: str) -> T:
        """Result of `work`, called with the place where it computes.

        What is too large for the device goes to the CPU, always, so that its bytes do not depend on the moment. What
        fits and finds no room, since others use the device, goes there too; the ledger then says that it was so.

        Args:
            work: may be called again, from the start.
            need: bytes that it holds at its peak.
            what: the tensor, for the message.
        """
        import torch

        if self.place == CPU:
            return work(CPU)
        if self.room is not None and need > self.room:
            self._say(f"{what} needs about {need / 1e9:.2f} GB, and one matrix has {self.room / 1e9:.2f} GB of")
            return work(CPU)
        with self._turns:
            with contextlib.suppress(torch.OutOfMemoryError):
                return work(self.place)
            # only now is nothing held any more of what that try had made
            torch.get_device_module(self.place).empty_cache()
        leave()
        self._say(f"{what} found no room in the memory of")
        if self.moved is not None:
            self.moved()
        return work(CPU)

    def together(self, works: Sequence[Callable[[Device], T]]) -> list[T]:
        """Results of works on matrices of equal shape, which this device takes apart in common calls.

        Args:
            works: each is called on a thread of its own, with this device as it is to use it; their matrices fit the
                room of one.
        """
        import torch

        company = Company(len(works))
        # they have their turn together
        inside = replace(self, _turns=contextlib.nullcontext())
        with self._turns, ThreadPoolExecutor(len(works), "hfmerge", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(company.run, range(len(works)), [partial(work, inside) for work in works]))

    def recorded(self, *, moved: bool) -> str:
        """What the ledger says: the device's name, and whether something was moved off it by chance."""
        return f"{self.name}, in part {CPU}" if moved else self.name

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Products of float32 are rounded as float32's, not as TF32's, whatever the process had set."""
        import torch

        if self.place == CPU:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _say(self, why: str) -> None:
        if self.notify is not None:
            self.notify(f"{why} {self.name}; computed on the CPU.")


def device_for(asked: str | None, *, spectral: bool, notify: Callable[[str], object] | None = None) -> Device:
    """The device for a run.

    Args:
        asked: "cpu" or None, "auto" (an accelerator if there is a fit one), or as torch names it: "cuda", "cuda:1". Of
            several processes on a machine, each takes its own of those that "cuda" may be.
        spectral: the method takes matrices apart.
        notify: told what is computed on the CPU instead.

    Raises:
        HfMergeError: there is no such device, or it cannot compute in float64, as those of Apple cannot.
    """
    import torch

    if asked in (None, CPU):
        return Device()
    if asked == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type == "mps":
            return Device()
        asked = found.type
    assert asked is not None
    mates = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        wanted = torch.device(asked)
        kind = torch.get_device_module(wanted.type)
        count = kind.device_count()
        sharing = mates if wanted.index is not None else -(-mates // max(1, count))
        index = wanted.index if wanted.index is not None else int(os.environ.get("LOCAL_RANK", "0")) % max(1, count)
        place = f"{wanted.type}:{index}"
        torch.linalg.eigvalsh(torch.eye(2, dtype=torch.float64, device=place)).cpu()
        name, memory = str(kind.get_device_name(place)), int(kind.get_device_properties(place).total_memory)
    # each kind of device, and of missing device, has an error of its own
    except (RuntimeError, AssertionError, TypeError, AttributeError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise HfMergeError(
            f"--device {asked}: cannot take a float64 matrix apart there ({first}); leave it out for the CPU."
        ) from error
    if not spectral:
        if notify is not None:
            notify(f"--device {asked}: this method is bound by reading and writing; computed on the CPU.")
        return Device()
    return Device(place, name, int(USABLE * memory / (TURNS * sharing)), notify)
