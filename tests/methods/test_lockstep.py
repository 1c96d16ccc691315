"""Threads that wait for each other to take matrices apart: who is answered with whom, whoever comes first or fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hfmerge.methods.batched_linalg import Company, apart, lapack_error, leave


def matrix(member: int, turn: int, size: int = 4) -> Tensor:
    value = torch.randn(size, size, generator=torch.Generator().manual_seed(100 * member + turn), dtype=torch.float64)
    return value @ value.T + torch.eye(size)


def together(works: list[Callable[[Company, int], Any]]) -> list[Any]:
    """Run each on a thread, after a wait of chance; results, or errors."""
    company = Company(len(works))

    def one(member: int) -> Any:
        time.sleep(random.uniform(0.0, 0.01))
        try:
            return company.run(member, lambda: works[member](company, member))
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, range(len(works)), timeout=60))


class Watched:
    """A function of `torch.linalg` that tells how many matrices came at a time."""

    def __init__(self, function: Callable[[Tensor], Any]):
        self.function, self.shapes = function, []

    def __call__(self, value: Tensor) -> Any:
        self.shapes.append(tuple(value.shape))
        return self.function(value)


def test_each_gets_its_own_answer_of_one_call() -> None:
    eigh, cholesky = Watched(torch.linalg.eigh), Watched(torch.linalg.cholesky)

    def work(company: Company, member: int) -> bool:
        for turn in range(20):
            value = matrix(member, turn)
            values, vectors = company.ask(member, eigh, value)
            torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, value)
            factor = company.ask(member, cholesky, value)
            torch.testing.assert_close(factor @ factor.T, value)
        return True

    assert together([work] * 5) == [True] * 5
    assert eigh.shapes == cholesky.shapes == [(5, 4, 4)] * 20


def test_other_shapes_and_other_functions_go_apart_in_the_order_of_the_members() -> None:
    asked: list[tuple[int, ...]] = []

    def eigvalsh(value: Tensor) -> Tensor:
        asked.append(tuple(value.shape))
        return torch.linalg.eigvalsh(value)

    def work(company: Company, member: int) -> Any:
        value = matrix(member, 0, 3 if member % 2 else 4)
        if member == 4:
            return company.ask(member, torch.linalg.cholesky, value)
        return company.ask(member, eigvalsh, value)

    found = together([work] * 5)
    assert asked == [(2, 4, 4), (2, 3, 3)]
    for member in range(4):
        value = matrix(member, 0, 3 if member % 2 else 4)
        torch.testing.assert_close(found[member], torch.linalg.eigvalsh(value))
    torch.testing.assert_close(found[4], torch.linalg.cholesky(matrix(4, 0)))


def test_who_ends_fails_or_leaves_is_not_waited_for() -> None:
    eigvalsh = Watched(torch.linalg.eigvalsh)

    def work(company: Company, member: int) -> Any:
        if member == 0:
            return "nothing to take apart"
        company.ask(member, eigvalsh, matrix(member, 0))
        if member == 1:
            raise RuntimeError("in the middle")
        if member == 2:
            leave()
            return apart(torch.linalg.eigvalsh, matrix(member, 1))
        return company.ask(member, eigvalsh, matrix(member, 1))

    found = together([work] * 5)
    assert found[0] == "nothing to take apart" and str(found[1]) == "in the middle"
    assert eigvalsh.shapes == [(4, 4, 4), (2, 4, 4)]
    for member in (2, 3, 4):
        torch.testing.assert_close(found[member], torch.linalg.eigvalsh(matrix(member, 1)))


def test_one_that_does_not_converge_fails_alone() -> None:
    def work(company: Company, member: int) -> Any:
        value = matrix(member, 0)
        return company.ask(member, torch.linalg.cholesky, -value if member == 1 else value)

    found = together([work] * 3)
    assert isinstance(found[1], lapack_error())
    for member in (0, 2):
        torch.testing.assert_close(found[member], torch.linalg.cholesky(matrix(member, 0)))


def test_what_a_call_of_all_needs_and_does_not_get_all_are_told() -> None:
    def full(value: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(f"{value.shape}")

    found = together([lambda company, member: company.ask(member, full, matrix(member, 0))] * 3)
    assert [type(error) for error in found] == [torch.OutOfMemoryError] * 3
    assert "[3, 4, 4]" in str(found[0])


def test_a_company_of_one_and_no_company() -> None:
    value = matrix(0, 0)
    alone = apart(torch.linalg.cholesky, value)
    torch.testing.assert_close(alone @ alone.T, value)
    company = Company(1)
    found = company.run(0, lambda: company.ask(0, torch.linalg.eigvalsh, value))
    torch.testing.assert_close(found, torch.linalg.eigvalsh(value))
