"""The device of a process: the CPU or an accelerator of its own, and decompositions of matrices on it.

A merge uses an accelerator only with spectral methods, and only if the accelerator supports float64. The time of other
methods goes into reading, hashing and writing, which an accelerator does not speed up. They always give the bytes of
the CPU. Learning and evaluation run whole models on the accelerator.
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
from hfmerge.methods.batched_linalg import Company, leave
from hfmerge.validation.wording import parameter


_T = TypeVar("_T")

CPU = "cpu"
TURNS = 2
"""Matrices on an accelerator at once: one is computed while another comes or goes."""
USABLE = 0.9
"""Share of an accelerator's memory that matrices may fill."""
ERRORS = (RuntimeError, AssertionError, TypeError, AttributeError, NotImplementedError)
"""torch raises a different error for each kind of device and of missing device."""


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

    def run(self, work: Callable[[str], _T], need: int, what: str) -> _T:
        """Result of `work`, called with the place where it computes.

        A matrix that is too large for the device is always computed on the CPU, so its bytes do not depend on timing.
        A matrix that fits, but finds no room because others use the device, is computed on the CPU too. The ledger
        records this.

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
            # only here are the tensors of the failed try freed
            torch.get_device_module(self.place).empty_cache()
        leave()
        self._say(f"{what} found no room in the memory of")
        if self.moved is not None:
            self.moved()
        return work(CPU)

    def together(self, works: Sequence[Callable[[Device], _T]]) -> list[_T]:
        """Results of works on matrices of equal shape, which this device takes apart in common calls.

        Args:
            works: each is called on a thread of its own, with this device as it is to use it; their matrices fit the
                room of one.
        """
        import torch

        company = Company(len(works))
        # all matrices of the group share one turn
        inside = replace(self, _turns=contextlib.nullcontext())
        with self._turns, ThreadPoolExecutor(len(works), "hfmerge", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(company.run, range(len(works)), [partial(work, inside) for work in works]))

    def recorded(self, *, moved: bool) -> str:
        """What the ledger says: the device's name, and whether something was moved off it by chance."""
        return f"{self.name}, in part {CPU}" if moved else self.name

    def _say(self, why: str) -> None:
        if self.notify is not None:
            self.notify(f"{why} {self.name}; computed on the CPU.")


def accelerator() -> str | None:
    """The kind of accelerator that this machine has, such as "cuda"; nothing is started on it."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def place_for(named: str) -> str:
    """Where this process computes, as torch names it: "cpu", "cuda:1".

    Args:
        named: "cpu", "auto" (an accelerator if there is one), or as torch names it: "cuda", "cuda:1". Of several
            processes on a machine, each takes its own of those that "cuda" may be, or shares one if they are fewer.

    Raises:
        HfMergeError: there is no such device.
    """
    import torch

    if named == "auto":
        named = accelerator() or CPU
    if named == CPU:
        return CPU
    try:
        wanted = torch.device(named)
        if wanted.type == CPU:
            return CPU
        count = torch.get_device_module(wanted.type).device_count()
        own = int(os.environ.get("LOCAL_RANK", "0")) % max(1, count)
        place = f"{wanted.type}:{own if wanted.index is None else wanted.index}"
        torch.empty(1, device=place).cpu()
    except ERRORS as error:
        raise HfMergeError(f"{parameter('device', named)}: {_first_line(error)}; leave it out, or say cpu.") from error
    return place


def name_of(place: str) -> str:
    """What the ledger says of a device: "cpu", or the model of the accelerator."""
    import torch

    if place == CPU:
        return CPU
    kind = place.partition(":")[0]
    # Apple's devices have no name that torch can ask for
    tell = getattr(torch.get_device_module(kind), "get_device_name", None)
    return kind if tell is None else str(tell(place))


@contextlib.contextmanager
def full_float32(place: str) -> Iterator[None]:
    """Compute products of float32 in float32 on an accelerator, never in TF32, whatever the process had set."""
    import torch

    if place == CPU:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def repeatable(place: str) -> Iterator[None]:
    """As `full_float32`; and an accelerator adds up sums, such as gradients, in one fixed order."""
    import torch

    if place == CPU:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads this variable before its first product
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # an operation without a deterministic form runs all the same, and torch warns
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with full_float32(place):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextlib.contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a lack of memory, of the device or the machine, into an error with advice.

    Args:
        what: the work that was being done.
        advice: a way that needs less memory.

    Raises:
        HfMergeError: memory does not suffice.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise HfMergeError(f"{what}: out of memory; {advice}.") from error


def device_for(named: str | None, *, spectral: bool, notify: Callable[[str], object] | None = None) -> Device:
    """The device on which a run takes matrices apart.

    Args:
        named: None for the CPU, or as for `place_for`, where "auto" is an accelerator that can do it.
        spectral: the method takes matrices apart.
        notify: told what is computed on the CPU instead.

    Raises:
        HfMergeError: there is no such device, or it cannot compute in float64, as those of Apple cannot.
    """
    import torch

    place = place_for(named or CPU)
    kind = place.partition(":")[0]
    if place == CPU or (named == "auto" and kind == "mps"):
        return Device()
    if not spectral:
        if notify is not None:
            what = parameter("device", named)
            notify(f"{what}: this method is bound by reading and writing; merged on the CPU.")
        return Device()
    module = torch.get_device_module(kind)
    try:
        torch.linalg.eigvalsh(torch.eye(2, dtype=torch.float64, device=place)).cpu()
        memory = int(module.get_device_properties(place).total_memory)
    except ERRORS as error:
        raise HfMergeError(
            f"{parameter('device', named)}: cannot take a float64 matrix apart there ({_first_line(error)}); leave it "
            "out for the CPU."
        ) from error
    mates = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    sharing = mates if named == place else -(-mates // max(1, module.device_count()))
    return Device(place, name_of(place), int(USABLE * memory / (TURNS * sharing)), notify)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
