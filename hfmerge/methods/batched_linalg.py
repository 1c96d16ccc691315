"""Batches decompositions: threads that decompose matrices of equal shape share one call of the library.

A small matrix does not fill an accelerator, so the libraries offer calls for several matrices. A `Company` of threads
makes such calls, and the methods need not know it. A thread that reaches a decomposition waits until all other threads
have reached one or have left. Matrices of equal shape are stacked. The work alone decides which matrices are stacked,
not the timing, because the results may depend on the stack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from torch import Tensor

_Found = TypeVar("_Found")

_MINE: ContextVar[tuple[Company, int] | None] = ContextVar("company", default=None)
"""The company that a thread belongs to, and its number there."""


def apart(function: Callable[[Tensor], _Found], matrix: Tensor) -> _Found:
    """`function(matrix)`, in one call with what the other members of this thread's company ask for; alone without one.

    Args:
        function: of `torch.linalg`, from (..., m, n) to a tensor or several, each with the same leading dimensions.
        matrix: (m, n). One in the CPU's memory is taken apart at once.

    Raises:
        lapack_error: it does not converge for this matrix.
    """
    mine = _MINE.get()
    if mine is None or matrix.device.type == "cpu":
        return function(matrix)
    company, member = mine
    found: _Found = company.ask(member, function, matrix)
    return found


def leave() -> None:
    """From here on this thread takes matrices apart alone, and nobody waits for it."""
    mine = _MINE.get()
    if mine is not None:
        company, member = mine
        company.leave(member)
        _MINE.set(None)


class Company:
    """Threads that wait for each other.

    Args:
        size: how many; each calls `run` once, with a number of its own below that.
    """

    def __init__(self, size: int):
        self._present = set(range(size))
        self._asked: dict[int, tuple[Callable[[Tensor], Any], Tensor, Future[Any]]] = {}
        self._lock = threading.Lock()

    def run(self, member: int, work: Callable[[], _Found]) -> _Found:
        """Do a member's work on this thread; it leaves when that ends, or fails."""
        _MINE.set((self, member))
        try:
            return work()
        finally:
            leave()

    def ask(self, member: int, function: Callable[[Tensor], Any], matrix: Tensor) -> Any:
        """See `apart`."""
        answer: Future[Any] = Future()
        with self._lock:
            self._asked[member] = (function, matrix, answer)
            self._meet()
        return answer.result()

    def leave(self, member: int) -> None:
        """Nobody waits for this member any more."""
        with self._lock:
            self._present.discard(member)
            self._meet()

    def _meet(self) -> None:
        """If all members wait for an answer, compute all answers on this thread."""
        if not self._asked or len(self._asked) < len(self._present):
            return
        alike: dict[Any, list[tuple[Tensor, Future[Any]]]] = {}
        for _, (function, matrix, answer) in sorted(self._asked.items()):
            key = (function, matrix.shape, matrix.dtype, matrix.device)
            alike.setdefault(key, []).append((matrix, answer))
        self._asked.clear()
        for (function, *_), waiting in alike.items():
            _answer(function, waiting)


def _answer(function: Callable[[Tensor], Any], waiting: list[tuple[Tensor, Future[Any]]]) -> None:
    import torch

    found = None
    if len(waiting) > 1:
        try:
            found = function(torch.stack([matrix for matrix, _ in waiting]))
        except lapack_error():
            pass  # one matrix does not converge; decompose each alone to find out which
        except Exception as error:  # whatever it is, it is the members' to handle
            for _, answer in waiting:
                answer.set_exception(error)
            return
    for i, (matrix, answer) in enumerate(waiting):
        try:
            if found is None:
                answer.set_result(function(matrix))
            else:
                answer.set_result(found[i] if isinstance(found, torch.Tensor) else tuple(part[i] for part in found))
        except Exception as error:  # as above
            answer.set_exception(error)


def lapack_error() -> type[Exception]:
    """What `torch.linalg` raises where something does not converge."""
    import torch

    # documented, though the module does not re-export it, and type checkers disagree on whether it is there
    error: type[Exception] = getattr(torch.linalg, "LinAlgError")  # noqa: B009
    return error
