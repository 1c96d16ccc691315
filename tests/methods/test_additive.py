"""Exact sums: any order of models, and any coming and going, gives the bytes of the set that is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from hfmerge.errors import GridOverflowError
from hfmerge.methods import AdditiveFold, Carry, registry
from hfmerge.methods.exact_sum import staying
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero
from tests.fixtures import tiny


FOLDS = [name for name, method in registry().items() if issubclass(method, AdditiveFold)]
SHAPE = (6, 5)
WEIGHTS = (1.0, 0.5, -0.3, 2.0, 0.1, 1.0, 3.0)


def method_of(name: str, sums: str = "float64") -> AdditiveFold:
    method = registry()[name](sums=sums)  # type: ignore[call-arg]
    assert isinstance(method, AdditiveFold)
    return method


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(index: int) -> TaskVector:
    """Full fine-tunes, adapters, and one that does not touch the block, of magnitudes that do not add up exactly."""
    size = 10.0 ** (index % 4 - 3)
    if index % 3 == 1:
        return LowRank(size * normal(index, SHAPE[0], 2), normal(50 + index, 2, SHAPE[1]))
    return zero(SHAPE) if index == 6 else Dense(size * normal(index, *SHAPE))


def rank(index: int) -> int | None:
    tau = model(index)
    return tau.rank if isinstance(tau, LowRank) else None


def through_a_file(carry: Carry) -> Carry:
    """The state as a file gives it back."""
    stored = {f"{name}{end}": part for name, value in carry.items() for end, part in value.tensors().items()}
    read = load(save({name: part.contiguous() for name, part in stored.items()}))

    def back(name: str) -> TaskVector:
        return Dense(read[name]) if name in read else LowRank(read[f"{name}.up"], read[f"{name}.down"])

    return {name: back(name) for name in carry}


def straight(method: AdditiveFold, models: Sequence[int], *, matrix: bool) -> Carry:
    carry: Carry | None = None
    for index in models:
        carry = method.step(carry, model(index), WEIGHTS[index], matrix=matrix)
    assert carry is not None
    return carry


def without(method: AdditiveFold, carry: Carry, held: Sequence[int], gone: int, *, matrix: bool) -> Carry | None:
    """What the executor does when a model leaves: subtract what is dense, drop factors, drop empty sums."""
    ranks = [rank(index) for index in held]
    at = held.index(gone)
    if ranks[at] is None:
        carry = method.unstep(carry, model(gone), WEIGHTS[gone], matrix=matrix)
    left = [i for i in range(len(held)) if i != at]
    form = method.carry_form(SHAPE, [ranks[i] for i in left], matrix=matrix)
    carry = staying(carry, ranks, left)
    return {name: carry.get(name, zero(SHAPE)) for name in form} if left else None


def same(a: Carry, b: Carry) -> bool:
    pairs = [(x, y) for name in a for x, y in zip(a[name].tensors().values(), b[name].tensors().values(), strict=True)]
    return list(a) == list(b) and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


actions = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=14)


@pytest.mark.slow
@pytest.mark.parametrize("sums", ["float64", "float32"])
@pytest.mark.parametrize("name", FOLDS)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(sequence=actions, matrix=st.booleans(), order=st.randoms(use_true_random=False))
def test_any_coming_and_going_gives_the_bytes_of_what_is_left(
    name: str, sums: str, sequence: list[tuple[bool, int]], matrix: bool, order: object
) -> None:
    """80 sequences for each of 8 cases; the state is also stored and read back in between."""
    method = method_of(name, sums)
    held: list[int] = []
    carry: Carry | None = None
    for comes, index in sequence:
        if comes and index not in held:
            carry = method.step(carry, model(index), WEIGHTS[index], matrix=matrix)
            held.append(index)
        elif not comes and index in held:
            assert carry is not None
            carry = without(method, carry, held, index, matrix=matrix)
            held.remove(index)
        if carry is not None:
            carry = through_a_file(carry)
    if not held:
        return
    assert carry is not None
    never = straight(method, held, matrix=matrix)
    assert same(carry, never)
    shuffled = list(held)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    other = straight(method, shuffled, matrix=matrix)
    weights = [WEIGHTS[index] for index in held]
    if abs(sum(weights)) > 1e-9:
        results = [method.emit(one, weights, matrix=matrix).to_dense() for one in (carry, never, other)]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert not bool((torch.signbit(results[0]) & (results[0] == 0)).any()) or name in (
            *("gram", "iso_c", "linear", "mdm_oc_iso"),
        )


@pytest.mark.parametrize("sums", ["float64", "float32"])
def test_a_sum_is_off_by_half_a_step_a_model_at_most(sums: str) -> None:
    method = method_of("task_arithmetic", sums)
    taus = [1e-3 * normal(i, 50, 40) for i in range(20)]
    carry: Carry | None = None
    for tau in taus:
        carry = method.step(carry, Dense(tau), 1.0, matrix=True)
    assert carry is not None
    exact = sum(tau.double() for tau in taus)
    assert float((carry["S"].to_dense().double() - exact).abs().max()) <= 20 * 0.5 * method.step_size
    assert method.step_size == {"float64": 2.0**-40, "float32": 2.0**-20}[sums]


def test_a_plain_float32_sum_could_not_be_left() -> None:
    """What the grid is for: without it the same coming and going leaves other bytes behind."""
    first, second = 1e-3 * normal(1, *SHAPE), 10.0 * normal(2, *SHAPE)
    assert not torch.equal((first + second) - second, first)


@pytest.mark.parametrize("name", FOLDS)
def test_a_sum_that_would_not_be_exact_is_refused(name: str) -> None:
    method = method_of(name)
    with pytest.raises(GridOverflowError, match="`grid` to") as error:
        straight_carry = method.step(None, Dense(torch.full(SHAPE, 3e4)), 1.0, matrix=False)
        method.step(straight_carry, Dense(torch.full(SHAPE, 3e4)), 1.0, matrix=False)
    wide = int(str(error.value).partition("`grid` to ")[2].partition(",")[0])
    wider = dataclasses.replace(method, grid=wide)
    assert wider.step(None, Dense(torch.full(SHAPE, 6e4)), 1.0, matrix=False)


def test_gram_by_its_formula() -> None:
    taus = [normal(i, 7, 5).double() for i in range(3)]
    for side in ("right", "left"):
        turned = [tau.T if side == "left" else tau for tau in taus]
        size = turned[0].shape[1]
        gram, total = torch.zeros(size, size, dtype=torch.float64), torch.zeros_like(turned[0])
        for tau in turned:
            c = tau.T @ tau / tau.square().sum() + 0.3 / size * torch.eye(size, dtype=torch.float64)
            gram, total = gram + c, total + tau @ c
        expected = torch.linalg.solve(gram, total.T).T
        method = registry()["gram"](beta=0.3, side=side)  # type: ignore[call-arg]
        assert isinstance(method, AdditiveFold)
        carry: Carry | None = None
        for tau in taus:
            carry = method.step(carry, Dense(tau.float()), 1.0, matrix=True)
        assert carry is not None
        found = method.emit(carry, [1.0] * 3, matrix=True).to_dense()
        torch.testing.assert_close(found, expected.T if side == "left" else expected, rtol=1e-5, atol=1e-6)


def test_gram_between_interference_free_and_average() -> None:
    """Task vectors of different inputs are all kept as they are for beta -> 0, and averaged for beta -> infinity."""
    first, second = torch.zeros(4, 6), torch.zeros(4, 6)
    first[:, :3], second[:, 3:] = normal(1, 4, 3), normal(2, 4, 3)
    for beta, expected in ((1e-6, first + second), (1e4, (first + second) / 2)):
        method = registry()["gram"](beta=beta, side="right")  # type: ignore[call-arg]
        assert isinstance(method, AdditiveFold)
        carry = method.step(method.step(None, Dense(first), 1.0, matrix=True), Dense(second), 1.0, matrix=True)
        found = method.emit(carry, [1.0, 1.0], matrix=True).to_dense().float()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_iso_c_makes_all_directions_equally_strong() -> None:
    taus = [normal(i, 7, 5) for i in range(3)]
    u, s, vt = torch.linalg.svd(sum(tau.double() for tau in taus), full_matrices=False)
    method = registry()["iso_c"]()
    assert isinstance(method, AdditiveFold)
    carry: Carry | None = None
    for tau in taus:
        carry = method.step(carry, Dense(tau), 1.0, matrix=True)
    assert carry is not None
    torch.testing.assert_close(method.emit(carry, [1.0] * 3, matrix=True).to_dense(), s.mean() * (u @ vt))


def test_the_plan_says_what_gram_takes(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "full")
    tiny.adapter(tmp_path / "low", tiny.attention(), 1, rank=2)
    for model, line in (
        ("full", "side right, beta 0.1"),
        ("low", "that adapters alone change: side left, beta 100"),
    ):
        run = tiny.done("plan", tmp_path / model, "--base", tmp_path / "base", "--method", "gram")
        assert line in run.out
    run = tiny.done("plan", tmp_path / "low", "--base", tmp_path / "base", "--method", "gram", "--option", "beta=1",
                    "--option", "side=right")  # fmt: skip
    assert "choice" not in run.out


@pytest.mark.slow
def test_the_step_of_the_sums_is_in_the_ledger(tmp_path: Path) -> None:
    from hfmerge import merge
    from hfmerge.recipe.recipe import parse_recipe

    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "a")
    data = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    for option, step in (({}, 2.0**-40), ({"sums": "float32"}, 2.0**-20), ({"grid": 30}, 2.0**-30)):
        recipe = parse_recipe({**data, "method": {"name": "linear", **option}}, "test")
        result = merge(recipe, output=tmp_path / f"out-{step}")
        assert result.entry.scalars.grid == step
    large = parse_recipe({**data, "method": {"name": "linear", "grid": 52}}, "test")
    with pytest.raises(GridOverflowError, match=r"model\.|lm_head"):
        tiny.edit(tmp_path / "a", lambda tensors: tensors["model.norm.weight"].add_(100.0))
        merge(large, output=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
