"""Task vectors: their algebra in both forms, the blocks they are cut into, norms, and small coordinates of factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfmerge.task_vector import (
    WHOLE,
    Core,
    Dense,
    LowRank,
    Segment,
    TaskVector,
    cut,
    from_tensors,
    squared_norm,
    summed_rank,
    zero,
)


quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(seed: int, *shape: int) -> Dense:
    return Dense(torch.randn(shape, generator=generator(seed)))


def low_rank(seed: int, m: int, n: int, k: int) -> LowRank:
    numbers = generator(seed)
    return LowRank(torch.randn(m, k, generator=numbers), torch.randn(k, n, generator=numbers))


def exact(tau: TaskVector) -> Tensor:
    """The change in float64, from its parts."""
    parts = tau.tensors()
    return parts[""].double() if "" in parts else parts[".up"].double() @ parts[".down"].double()


def near(value: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    return bool((value.double() - expected).norm() <= relative * expected.norm() + 1e-30)


MAKERS: dict[str, Callable[[int, int, int], TaskVector]] = {
    "dense": lambda seed, m, n: dense(seed, m, n),
    "low rank": lambda seed, m, n: low_rank(seed, m, n, 1 + seed % 2),
    "rank beyond the shape": lambda seed, m, n: low_rank(seed, m, n, max(m, n) + 1),
    "zero": lambda seed, m, n: zero((m, n)),
}


@pytest.mark.slow
@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", MAKERS)
@quick
@given(m=sizes, n=sizes, seed=seeds, factor=st.floats(-3, 3, width=32))
def test_algebra_agrees_with_dense_matrices(first: str, second: str, m: int, n: int, seed: int, factor: float) -> None:
    a, b = MAKERS[first](seed, m, n), MAKERS[second](seed + 1, m, n)
    x, y = exact(a), exact(b)
    before = [part.clone() for tau in (a, b) for part in tau.tensors().values()]
    scale = float(x.norm() + (1.0 + abs(factor)) * y.norm())
    for got, expected in (
        (a + b, x + y),
        (a - b, x - y),
        (a.plus(b, factor), x + factor * y),
        (factor * a, factor * x),
        (a * factor, factor * x),
        (a.scaled(factor), factor * x),
    ):
        assert got.shape == (m, n) == tuple(got.to_dense().shape)
        assert got.to_dense().dtype == torch.float32
        assert float((got.to_dense().double() - expected).norm()) <= 1e-5 * scale
    assert a.inner(b) == pytest.approx(float((x * y).sum()), abs=1e-5 * float(x.norm() * y.norm()))
    assert a.inner(b) == pytest.approx(b.inner(a), abs=1e-9 + 1e-6 * float(x.norm() * y.norm()))
    assert a.squared_norm() == pytest.approx(float((x * x).sum()), rel=1e-5, abs=1e-9)
    after = [part for tau in (a, b) for part in tau.tensors().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_stored_form_comes_back_bit_for_bit(kind: str) -> None:
    tau = MAKERS[kind](4, 5, 7)
    again = from_tensors(tau.tensors())
    assert type(again) is type(tau) and again.shape == tau.shape and again.is_zero == tau.is_zero
    assert torch.equal(again.to_dense(), tau.to_dense())
    assert list(again.tensors()) == ([""] if isinstance(tau, Dense) else [".up", ".down"])
    assert torch.equal(tau.to("cpu").to_dense(), tau.to_dense())


def test_scaling_by_one_costs_nothing() -> None:
    for tau in (dense(0, 3, 4), low_rank(0, 3, 4, 2)):
        assert tau.scaled(1.0) is tau


@quick
@given(m=sizes, n=sizes, ranks=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=seeds)
def test_sums_stay_factored_until_the_rank_reaches_the_shape(m: int, n: int, ranks: list[int], seed: int) -> None:
    total: TaskVector = low_rank(seed, m, n, ranks[0])
    expected = exact(total)
    for i, rank in enumerate(ranks[1:], 1):
        term = low_rank(seed + i, m, n, rank)
        total, expected = total + term, expected + exact(term)
        planned = summed_rank((m, n), list(ranks[: i + 1]))
        assert (total.rank if isinstance(total, LowRank) else None) == planned
        assert planned is None or planned == sum(ranks[: i + 1]) < min(m, n)
    assert float((total.to_dense().double() - expected).norm()) <= 1e-4 * (1.0 + float(expected.norm()))


def test_summed_rank_is_dense_after_a_dense_term_and_off_matrices() -> None:
    assert summed_rank((8, 8), [2, 3]) == 5
    assert summed_rank((8, 8), [0, 0]) == 0
    assert summed_rank((8, 8), [4, 4]) is None
    assert summed_rank((8, 8), [2, None, 0]) is None
    assert summed_rank((8,), [0, 0]) is None
    assert summed_rank((2, 8, 8), [1, 1]) is None


@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (2, 3, 4), (1, 1), (0, 4)])
def test_zero_is_neutral(shape: tuple[int, ...]) -> None:
    nothing = zero(shape)
    assert nothing.shape == shape and nothing.squared_norm() == 0.0
    assert torch.equal(nothing.to_dense(), torch.zeros(shape))
    other = dense(1, *shape)
    assert torch.equal((nothing + other).to_dense(), other.value)
    assert torch.equal((other + nothing).to_dense(), other.value)
    assert nothing.is_zero == (len(shape) == 2)
    assert not dense(1, *shape).is_zero and not Dense(torch.zeros(shape)).is_zero


BLOCKS = {
    "whole": (WHOLE, (6, 4), lambda x: x),
    "matrix": (Segment(matrix=True), (6, 4), lambda x: x),
    "vector": (WHOLE, (5,), lambda x: x),
    "transposed": (Segment(matrix=True, transposed=True), (6, 4), lambda x: x.T),
    "rows": (Segment("k", True, axis=0, ranges=((2, 4),)), (6, 4), lambda x: x[2:4]),
    "interleaved rows": (Segment("k", True, axis=0, ranges=((0, 1), (3, 4))), (6, 4), lambda x: x[[0, 3]]),
    "columns, transposed": (Segment("v", True, True, axis=1, ranges=((2, 4),)), (6, 4), lambda x: x[:, 2:4].T),
    "interleaved columns": (
        Segment("v", True, True, axis=1, ranges=((0, 1), (2, 3))),
        (6, 4),
        lambda x: x[:, [0, 2]].T,
    ),
    "expert": (Segment("experts.1", True, expert=1), (3, 6, 4), lambda x: x[1]),
    "part of an expert": (Segment("e", True, expert=2, axis=0, ranges=((0, 3),)), (3, 6, 4), lambda x: x[2, :3]),
    "part of a transposed expert": (
        Segment("e", True, True, 0, 1, ((1, 2), (3, 4))),
        (3, 6, 4),
        lambda x: x[0][:, [1, 3]].T,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_takes_puts_and_knows_its_shape(name: str) -> None:
    block, shape, wanted = BLOCKS[name]
    stored = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    expected = wanted(stored)
    assert torch.equal(block.take(stored), expected)
    assert block.shape(shape) == tuple(expected.shape)
    piece = cut(Dense(stored), block)
    assert isinstance(piece, Dense) and torch.equal(piece.value, expected) and piece.value.is_contiguous()
    target = stored.clone()
    block.put(target, -1.0 - expected)
    assert torch.equal(wanted(target), -1.0 - expected)
    assert int((target != stored).sum()) == expected.numel()
    block.put(target, expected.clone())
    assert torch.equal(target, stored)
    assert block.is_whole == (name in ("whole", "matrix", "vector"))


@pytest.mark.parametrize("name", [name for name in BLOCKS if len(BLOCKS[name][1]) == 2])
def test_cut_keeps_factors(name: str) -> None:
    block, (m, n), wanted = BLOCKS[name]
    tau = low_rank(3, m, n, 2)
    piece = cut(tau, block)
    assert isinstance(piece, LowRank) and piece.rank == 2 and piece.shape == block.shape((m, n))
    assert near(piece.to_dense(), wanted(exact(tau)), 1e-6)


def test_cut_refuses_factors_of_a_stack() -> None:
    with pytest.raises(ValueError, match="expert"):
        cut(low_rank(0, 3, 4, 1), Segment("experts.0", True, expert=0))


@pytest.mark.slow
@quick
@given(data=st.data(), m=st.integers(1, 12), n=sizes, axis=st.integers(0, 1), transposed=st.booleans(), seed=seeds)
def test_blocks_that_share_out_an_axis_rebuild_the_tensor(
    data: st.DataObject, m: int, n: int, axis: int, transposed: bool, seed: int
) -> None:
    stored = torch.randn(m, n, generator=generator(seed))
    size = stored.shape[axis]
    owners = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    rebuilt = torch.full_like(stored, torch.nan)
    factors = low_rank(seed, m, n, 2)
    total = 0.0
    for owner in range(3):
        ranges = tuple((i, i + 1) for i in range(size) if owners[i] == owner)
        if not ranges:
            continue
        block = Segment(str(owner), True, transposed, axis=axis, ranges=ranges)
        piece = block.take(stored)
        assert tuple(piece.shape) == block.shape((m, n))
        block.put(rebuilt, piece)
        total += cut(factors, block).squared_norm()
    assert torch.equal(rebuilt, stored)
    assert total == pytest.approx(factors.squared_norm(), rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 5, 1023, 1024, 1025, 3000, 100_000])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e16])
def test_squared_norm_is_as_accurate_as_it_says(count: int, scale: float) -> None:
    values = scale * torch.randn(count, generator=generator(count))
    assert squared_norm(values) == pytest.approx(float((values.double() ** 2).sum()), rel=1e-6)


def test_squared_norm_of_equal_values_stays_within_its_bound() -> None:
    for value in torch.rand(200, generator=generator(0)).tolist():
        values = torch.full((2048,), value)
        assert squared_norm(values) == pytest.approx(float((values.double() ** 2).sum()), rel=4e-6)


def test_squared_norm_takes_any_shape_and_layout() -> None:
    values = torch.randn(40, 60, generator=generator(0))
    expected = float((values.double() ** 2).sum())
    for view in (values, values.T, values.reshape(4, 10, 60), values.T.unsqueeze(0)):
        assert squared_norm(view) == pytest.approx(expected, rel=1e-6)
    assert squared_norm(torch.tensor(3.0)) == 9.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1023, 1024, 2047, 2048, 2100])
def test_squared_norm_shows_nan_and_inf(bad: float, position: int) -> None:
    values = torch.zeros(2101)
    values[position] = bad
    assert not math.isfinite(squared_norm(values))
    assert not math.isfinite(Dense(values).squared_norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", [".up", ".down"])
def test_norm_of_factors_shows_nan_and_inf(bad: float, part: str) -> None:
    tau = low_rank(0, 6, 5, 2)
    tau.tensors()[part][1, 1] = bad
    assert not math.isfinite(tau.squared_norm())


def test_norm_of_factors_that_cancel_is_not_negative() -> None:
    a = low_rank(1, 30, 20, 3)
    assert 0.0 <= (a - a).squared_norm() <= 1e-12 * a.squared_norm()


@pytest.mark.parametrize(
    ("m", "n", "k", "j"), [(30, 12, 2, 3), (12, 30, 4, 1), (9, 9, 4, 4), (20, 20, 0, 3), (6, 7, 2, 0)]
)
def test_core_keeps_every_product_of_two_factored_changes(m: int, n: int, k: int, j: int) -> None:
    a, b = low_rank(5, m, n, k), low_rank(6, m, n, j)
    x, y = exact(a), exact(b)
    core = Core.of(a, b)
    assert core.shape == (m, n) and core.first.shape == core.second.shape == (k + j, k + j)
    assert core.first.dtype == core.second.dtype == torch.float64
    assert core.left is not None and core.right is not None
    lower = torch.eye(k + j, dtype=torch.float64) if core.lower is None else core.lower
    right = torch.linalg.solve_triangular(lower, core.right, upper=False).T
    assert near(core.left @ core.first @ right.T, x, 1e-12)
    assert near(core.left @ core.second @ right.T, y, 1e-12)
    for basis in (core.left, right):
        assert torch.allclose(basis.T @ basis, torch.eye(k + j, dtype=torch.float64), atol=1e-12)
    small, large = torch.linalg.svdvals(core.first), torch.linalg.svdvals(x)
    assert torch.allclose(small[:k], large[:k], rtol=1e-10) and bool((small[k:] <= 1e-10).all())
    product = core.lift(core.first @ core.second.T @ core.first)
    assert isinstance(product, LowRank) and product.rank == k + j and product.shape == (m, n)
    assert near(product.to_dense(), x @ y.T @ x, 1e-5)


def test_core_of_what_was_lifted_and_of_what_adds_nothing_to_it() -> None:
    """Bases are extended, not made anew; a second time the same factors leave no direction to extend them by."""
    a, b, c = low_rank(5, 40, 30, 3), low_rank(6, 40, 30, 4), low_rank(7, 40, 30, 2)
    core = Core.of(a, b)
    lifted = core.lift(core.first + core.second)
    assert isinstance(lifted, LowRank) and core.lower is not None
    assert torch.allclose(lifted.up.T @ lifted.up, torch.eye(7, dtype=torch.float64), atol=1e-12)
    assert torch.equal(Core.of(lifted, c).left[:, :7], lifted.up)  # type: ignore[index]  # there are factors
    for more in (c, a, LowRank(c.up, a.down[:2]), LowRank(torch.zeros(40, 2), c.down)):
        core = Core.of(lifted, more)
        assert core.left is not None
        assert torch.allclose(core.left.T @ core.left, torch.eye(7 + more.rank, dtype=torch.float64), atol=1e-12)
        assert near(core.lift(core.first).to_dense(), exact(a) + exact(b), 1e-12)
        assert near(core.lift(core.second).to_dense(), exact(more), 1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (dense(1, 6, 8), dense(2, 6, 8)),
        (dense(1, 6, 8), low_rank(2, 6, 8, 2)),
        (low_rank(1, 6, 8, 2), dense(2, 6, 8)),
        (low_rank(1, 6, 8, 3), low_rank(2, 6, 8, 3)),
    ],
)
def test_core_of_anything_else_is_the_matrices_themselves(a: TaskVector, b: TaskVector) -> None:
    core = Core.of(a, b)
    assert core.left is None and core.right is None
    assert torch.equal(core.first, a.to_dense().double()) and torch.equal(core.second, b.to_dense().double())
    lifted = core.lift(core.first + core.second)
    assert isinstance(lifted, Dense) and lifted.value.dtype == torch.float64
    assert near(lifted.value, core.first + core.second, 1e-6)
