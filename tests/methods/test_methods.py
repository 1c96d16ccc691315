"""The contract that every registered method keeps, golden numbers against transcriptions, and the trimming helpers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from hfmerge import merge
from hfmerge.checkpoint.writer import TORCH_NAMES
from hfmerge.errors import GridOverflowError
from hfmerge.methods import AdditiveFold, Carry, FoldMethod, JointMethod, MergeMethod, Site, registry
from hfmerge.methods.base import Law, Needs
from hfmerge.methods.slerp import PARALLEL
from hfmerge.methods.trimming import BITS, histogram_threshold, kept, kth_magnitude, magnitude_histogram
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.recipe.values import NORMS
from hfmerge.task_vector import Dense, LowRank, TaskVector, from_tensors, zero
from hfmerge.validation.values import typed
from tests.fixtures import reference, tiny


quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def cases() -> list[Any]:
    """Every registered method with its defaults, and once more for each further choice of an option."""
    found = []
    for name, method in registry().items():
        found.append(pytest.param(method(), id=name))
        hints = get_type_hints(method)
        for field in dataclasses.fields(method):
            # coarser sums have tests of their own
            if get_origin(hints[field.name]) is Literal and field.name != "sums":
                for choice in get_args(hints[field.name]):
                    if choice != field.default:
                        # its histograms of half a million bins take a second a test
                        marks = pytest.mark.slow if (name, choice) == ("ties", "model") else ()
                        found.append(pytest.param(method(**{field.name: choice}), id=f"{name}-{choice}", marks=marks))
    return found


each_case = pytest.mark.parametrize("method", cases())
each_method = pytest.mark.parametrize("method", [pytest.param(kind, id=name) for name, kind in registry().items()])
SHAPES = [(9, 5), (5, 9), (6, 6), (1, 7), (7, 1), (1, 1)]
OTHERS = [(7,), (), (3, 4), (4, 3, 2, 2)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(method: MergeMethod, wanted: int = 3) -> int:
    """A number of models that the method takes."""
    least, most = method.arity
    return max(least, wanted if most is None else min(wanted, most))


def known(method: MergeMethod, taus: Sequence[TaskVector]) -> list[float] | None:
    measure = method.measure(len(taus))
    if measure is None:
        return None
    for found in measure.find(taus):
        measure.add(found)
    return measure.settle()


def apply(
    method: MergeMethod,
    taus: Sequence[TaskVector],
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    *,
    matrix: bool = True,
    names: Sequence[str] = "abcdefgh",
    whole: tuple[int, ...] | None = None,
    first: int = 0,
) -> Tensor:
    """The method's merged task vector of one block, as the executor asks for it.

    Args:
        names: what pins the models.
        whole, first: shape of the tensor that the block is some rows of, and how many of its elements come before.
    """
    shape = taus[0].shape

    def beside(file: str, model: int) -> Tensor:
        """Tensors beside the weights, as Fisher information is: at least zero, of a file and a model."""
        values = normal(1000 * len(file) + ord(names[model]), *(whole or shape)).square()
        return values.reshape(-1)[first : first + math.prod(shape)].reshape(shape)

    weights = [1.0] * len(taus) if weights is None else weights
    if isinstance(method, FoldMethod):
        carry: Carry | None = None
        for tau, weight in zip(taus, weights, strict=True):
            carry = method.step(carry, tau, weight, matrix=matrix)
        assert carry is not None
        return method.emit(carry, weights, matrix=matrix).to_dense()
    assert isinstance(method, JointMethod)
    origin = normal(999, *taus[0].shape) if base is None else base
    site = Site("a.weight", shape, matrix, first, pin=lambda model: names[model], tensor=beside)
    return method.combine(taus, weights, origin.clone, known(method, taus), site).to_dense()


def gap(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


# Every method


@each_method
def test_describes_itself(method: type[MergeMethod]) -> None:
    assert registry()[method.name] is method
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert issubclass(method, FoldMethod) != issubclass(method, JointMethod)
    documented = f"{method.__doc__}{sys.modules[method.__module__].__doc__}"
    assert "Source:" in documented
    assert method.citations and method.needs in get_args(Needs) and set(method.laws) <= set(get_args(Law))
    for citation in method.citations:
        assert citation.title and citation.url.startswith("https://")
        entry = citation.bibtex
        assert entry.startswith("@") and entry.count("{") == entry.count("}") and citation.title in entry
    least, most = method.arity
    assert least >= 1 and (most is None or most >= least)
    assert method.default_norm in NORMS


@each_method
def test_options_can_be_written_in_a_recipe(method: type[MergeMethod]) -> None:
    options = dataclasses.asdict(method())
    assert json.loads(json.dumps(options)) == options
    hints = get_type_hints(method)
    for field in dataclasses.fields(method):
        assert field.metadata["help"]
        read = typed(hints[field.name], field.metadata)
        if field.default is not None:
            assert read(field.default) == field.default
    assert method(**options) == method() and hash(method()) == hash(method())
    with pytest.raises(dataclasses.FrozenInstanceError):
        method().anything = 1  # type: ignore[attr-defined]


@each_case
@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS], ids=str)
def test_shape_and_finiteness(method: MergeMethod, shape: tuple[int, ...]) -> None:
    for matrix in (True, False) if shape in SHAPES else (False,):
        for scale in (1e-12, 1.0, 1e8):
            taus = [Dense(scale * normal(i, *shape)) for i in range(count(method))]
            if scale > 1.0 and isinstance(method, AdditiveFold):
                with pytest.raises(GridOverflowError, match="`grid`"):
                    apply(method, taus, matrix=matrix)
                continue
            result = apply(method, taus, matrix=matrix)
            assert tuple(result.shape) == shape and result.dtype in (torch.float32, torch.float64)
            assert bool(result.isfinite().all())


@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_give_what_dense_matrices_give(method: MergeMethod, shape: tuple[int, int]) -> None:
    m, n = shape
    if isinstance(method, AdditiveFold):
        # options whose defaults are others for adapters
        method = method.fitted(low=False)
    for ranks in ((1, 1, 1), (2, 1, 3), (0, 1, 2), (1, 0, 1)):
        taus = [LowRank(normal(i, m, k), normal(10 + i, k, n)) for i, k in enumerate(ranks[: count(method)])]
        weights = [1.0, 0.5, 2.0][: len(taus)]
        for matrix in (True, False) if isinstance(method, FoldMethod) else (True,):
            expected = apply(method, [Dense(tau.to_dense()) for tau in taus], weights, matrix=matrix)
            for mixed in (taus, [Dense(taus[0].to_dense()), *taus[1:]]):
                assert gap(apply(method, mixed, weights, matrix=matrix), expected) < 1e-5


@each_case
def test_nothing_changed_means_nothing_merged(method: MergeMethod) -> None:
    for shape in SHAPES:
        for nothing in (zero(shape), Dense(torch.zeros(shape))):
            result = apply(method, [nothing] * count(method))
            assert float(result.abs().max()) <= 1e-6


@each_case
def test_a_model_without_a_change_is_no_fault(method: MergeMethod) -> None:
    for shape in ((9, 5), (1, 7)):
        for position in range(count(method)):
            taus: list[TaskVector] = [Dense(normal(i, *shape)) for i in range(count(method))]
            taus[position] = zero(shape)
            same = [Dense(tau.to_dense()) for tau in taus]
            assert gap(apply(method, taus), apply(method, same)) < 1e-6


@each_case
def test_identical_models_keep_their_direction(method: MergeMethod) -> None:
    """No method invents a direction out of agreement, and one that keeps a single model keeps those that agree."""
    tau = Dense(normal(1, 8, 5))
    result = apply(method, [tau] * count(method), matrix=False)
    assert bool((result * tau.value >= 0.0).all()) and bool((result != 0.0).any())
    if method.holds("identity_for_one"):
        share = torch.dot(result.reshape(-1).double(), tau.value.reshape(-1).double()) / tau.squared_norm()
        assert gap(result, float(share) * tau.value) < 1e-5


@each_case
def test_one_model_is_itself_only_where_it_is_said_to_be(method: MergeMethod) -> None:
    if method.arity[0] > 1:
        with pytest.raises(Exception, match="model"):
            parse_recipe({"base": "org/a", "models": ["org/b"], "method": method.name}, "test")
        return
    same = []
    for shape, matrix in [*((shape, True) for shape in SHAPES), *((shape, False) for shape in OTHERS)]:
        tau = normal(3, *shape)
        result = apply(method, [Dense(tau)], matrix=matrix)
        # what is rounded to a grid is off by half a step of it
        step = method.scalars().get("grid", 0.0)
        slack = 0.5 * step if not matrix or method.needs == "elements" else 1e-9 * (step > 0.0)
        off = float((result.double() - tau.double()).abs().max()) if tau.numel() else 0.0
        same.append(off <= max(slack, 2e-6 * float(tau.abs().max()) * (not method.is_fold)))
    assert all(same) == method.holds("identity_for_one")


@each_case
def test_inputs_are_left_alone(method: MergeMethod) -> None:
    taus = [Dense(normal(1, 6, 4)), LowRank(normal(2, 6, 2), normal(3, 2, 4)), Dense(normal(4, 6, 4))][: count(method)]
    base = normal(5, 6, 4)
    parts = [part for tau in taus for part in tau.tensors().values()]
    before = [part.clone() for part in parts]
    carried: Carry | None = None
    if isinstance(method, FoldMethod):
        for tau in taus:
            carried = method.step(carried, tau, 0.5, matrix=True)
        assert carried is not None
        state = {name: value.to_dense().clone() for name, value in carried.items()}
        method.emit(carried, [0.5] * len(taus), matrix=True)
        method.step(carried, taus[0], 0.5, matrix=True)
        assert all(torch.equal(state[name], value.to_dense()) for name, value in carried.items())
    apply(method, taus, base=base)
    assert all(torch.equal(old, new) for old, new in zip(before, parts, strict=True))
    assert torch.equal(base, normal(5, 6, 4))


@each_case
def test_non_contiguous_tensors_are_taken(method: MergeMethod) -> None:
    taus = [normal(i, 7, 4) for i in range(count(method))]
    base = normal(9, 7, 4)
    views = [Dense(tau.T.contiguous().T) for tau in taus]
    assert not views[0].value.is_contiguous()
    strided = apply(method, views, base=base.T.contiguous().T)
    assert gap(strided, apply(method, [Dense(tau) for tau in taus], base=base)) < 1e-6


@each_case
def test_twice_the_weights_give_twice_the_model_but_where_a_size_is_absolute(method: MergeMethod) -> None:
    """Scale equivariance in base and models together; powers of two keep rounding out of it."""
    taus, base = [normal(i, 8, 6) for i in range(count(method))], normal(9, 8, 6)
    for factor in (2.0**-6, 2.0, 2.0**10):
        result = apply(method, [Dense(factor * tau) for tau in taus], base=factor * base)
        scaled = factor * apply(method, [Dense(tau) for tau in taus], base=base)
        assert (gap(result, scaled) < 1e-5) != method.absolute


@each_case
def test_twice_the_changes_give_twice_the_change_only_where_it_is_said_to(method: MergeMethod) -> None:
    taus, base = [normal(i, 8, 6) for i in range(count(method))], normal(9, 8, 6)
    result = apply(method, [Dense(4.0 * tau) for tau in taus], base=base)
    single = 4.0 * apply(method, [Dense(tau) for tau in taus], base=base)
    assert (gap(result, single) < 1e-5) == method.holds("scale_equivariant")


@each_case
def test_order_matters_only_where_it_is_said_to(method: MergeMethod) -> None:
    models = count(method, 4)
    taus, weights, base = [normal(i, 8, 6) for i in range(models)], [0.5, 1.0, 2.0, 0.25][:models], normal(9, 8, 6)
    names = "abcd"[:models]
    plain = apply(method, [Dense(tau) for tau in taus], weights, base, names=names)
    turned = apply(method, [Dense(tau) for tau in taus[::-1]], weights[::-1], base, names=names[::-1])
    if method.additive:
        assert torch.equal(turned, plain)
    assert (gap(turned, plain) < 1e-5) == method.holds("order_free")
    assert method.holds("order_free") or gap(turned, plain) > 1e-3


@each_case
def test_weights_add_up_only_where_it_is_said_that_they_do(method: MergeMethod) -> None:
    models = count(method)
    taus, base = [Dense(normal(i, 8, 6)) for i in range(models)], normal(9, 8, 6)
    some, more = [1.0, 0.5, 2.0][:models], [0.25, 0.75, -0.5][:models]
    for matrix in (True, False):
        both = apply(method, taus, [one + other for one, other in zip(some, more, strict=True)], base, matrix=matrix)
        apart = apply(method, taus, some, base, matrix=matrix) + apply(method, taus, more, base, matrix=matrix)
        if method.holds("linear_in_weights") or matrix:
            assert (gap(both, apart) < 1e-5) == method.holds("linear_in_weights")


@each_case
def test_weights_count(method: MergeMethod) -> None:
    models = count(method)
    taus = [Dense(normal(i, 8, 6)) for i in range(models)]
    equal, unequal = apply(method, taus), apply(method, taus, [1.0, *[0.1] * (models - 1)])
    assert gap(unequal, equal) > 1e-3
    if method.normalises_weights:
        assert gap(apply(method, taus, [3.0] * models), equal) < 1e-6


@each_case
@pytest.mark.parametrize(
    "ranks", [(None, None, None), (2, 1, 3), (0, 2, 2), (0, 0, 0), (2, None, 1), (3, 3, 4)], ids=str
)
def test_carried_state_survives_a_file_and_has_the_planned_form(
    method: MergeMethod, ranks: tuple[int | None, ...]
) -> None:
    """Interrupted after any model, stored and read back, the fold goes on to the same bytes."""
    if not isinstance(method, FoldMethod):
        assert not hasattr(method, "step") and not hasattr(method, "carry_form")
        return
    m, n = 10, 8
    weights = [1.0, 0.5, 2.0]
    taus: list[TaskVector] = [
        Dense(normal(i, m, n))
        if k is None
        else zero((m, n))
        if k == 0
        else LowRank(normal(i, m, k), normal(20 + i, k, n))
        for i, k in enumerate(ranks)
    ]
    straight: Carry | None = None
    stored: Carry | None = None
    for i, tau in enumerate(taus):
        straight = method.step(straight, tau, weights[i], matrix=True)
        stored = method.step(stored, tau, weights[i], matrix=True)
        forms = method.carry_form((m, n), ranks[: i + 1], matrix=True)
        assert list(stored) == list(forms)
        for name, value in stored.items():
            assert value.shape == forms[name].shape
            assert (value.rank if isinstance(value, LowRank) else None) == forms[name].rank
        dtypes = {name: getattr(torch, TORCH_NAMES[form.dtype]) for name, form in forms.items()}
        read = load(
            save(
                {
                    f"{name}{end}": part.to(dtypes[name]).contiguous()
                    for name, value in stored.items()
                    for end, part in value.tensors().items()
                }
            )
        )
        straight = {name: value.to(dtypes[name]) for name, value in straight.items()}
        stored = {
            name: from_tensors({end: read[f"{name}{end}"] for end in ("", ".up", ".down") if f"{name}{end}" in read})
            for name in forms
        }
        for name in forms:
            assert torch.equal(stored[name].to_dense(), straight[name].to_dense())
        first = method.emit(straight, weights[: i + 1], matrix=True).to_dense()
        assert torch.equal(method.emit(stored, weights[: i + 1], matrix=True).to_dense(), first)


@each_case
def test_elementwise_methods_may_be_visited_in_slices(method: MergeMethod) -> None:
    taus, weights, base = (
        [normal(i, 40, 6) for i in range(count(method))],
        [0.3, 1.0, 2.0][: count(method)],
        normal(9, 40, 6),
    )
    whole = apply(method, [Dense(tau) for tau in taus], weights, base, matrix=False)
    parts = [
        apply(
            method, [Dense(tau[at : at + 16]) for tau in taus], weights, base[at : at + 16],
            matrix=False, whole=(40, 6), first=6 * at,
        )
        for at in range(0, 40, 16)
    ]  # fmt: skip
    if method.needs == "elements":
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(apply(method, [Dense(tau) for tau in taus], weights, base, matrix=True), whole)


@pytest.mark.slow
@each_case
@quick
@given(m=st.integers(1, 7), n=st.integers(1, 7), seed=st.integers(0, 2**31), matrix=st.booleans())
def test_any_finite_input_gives_a_finite_result(method: MergeMethod, m: int, n: int, seed: int, matrix: bool) -> None:
    numbers = torch.Generator().manual_seed(seed)
    taus = []
    for _ in range(count(method)):
        sparse = torch.randn(m, n, generator=numbers) * (torch.rand(m, n, generator=numbers) > 0.5)
        taus.append(Dense(sparse * 10.0 ** float(torch.randint(-20, 8, (), generator=numbers))))
    if isinstance(method, AdditiveFold):
        # sums as large as these tasks' are in range on a grid that is wide enough
        method = dataclasses.replace(method, grid=8)
    assert bool(apply(method, taus, matrix=matrix).isfinite().all())


# What holds for single methods beyond the contract


@pytest.mark.parametrize("name", ["opcm", "mdm_oc", "mdm_oc_subspace"])
def test_one_model_is_itself_to_the_bit(name: str) -> None:
    for shape, matrix in [*((shape, True) for shape in SHAPES), *((shape, False) for shape in OTHERS)]:
        tau = normal(3, *shape)
        assert torch.equal(apply(registry()[name](), [Dense(tau)], matrix=matrix), tau)


@pytest.mark.parametrize("name", ["iso_c", "mdm_oc_iso"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_matrix_becomes_isotropic(name: str, shape: tuple[int, int]) -> None:
    tau = normal(3, *shape)
    spectrum = torch.linalg.svdvals(apply(registry()[name](), [Dense(tau)]).double())
    torch.testing.assert_close(spectrum, torch.linalg.svdvals(tau.double()).mean().expand_as(spectrum))


@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS], ids=str)
def test_ties_of_one_model_is_its_largest_changes(shape: tuple[int, ...]) -> None:
    tau = normal(3, *shape)
    result = apply(registry()["ties"](), [Dense(tau)])
    assert bool(((result == 0.0) | ((result - tau).abs() <= 1e-6 * tau.abs())).all())
    assert result.numel() == 0 or int((result != 0.0).sum()) >= kept(tau.numel(), 0.2)


@pytest.mark.parametrize("name", ["ties", "iso_c", "mdm_oc_iso"])
def test_what_is_kept_of_identical_models_is_a_multiple_of_their_change(name: str) -> None:
    tau = normal(1, 8, 5)
    result = apply(registry()[name](), [Dense(tau)] * 3, matrix=False)
    agreeing = tau[result != 0.0]
    assert agreeing.numel() == tau.numel() or name == "ties"
    share = torch.dot(result[result != 0.0].double(), agreeing.double()) / agreeing.double().square().sum()
    assert float(share) > 0.0 and gap(result[result != 0.0], float(share) * agreeing) < 1e-5


# Golden numbers


def fine_tunes(seed: int, models: int, *shape: int) -> tuple[Tensor, list[Tensor]]:
    base = normal(seed, *shape)
    return base, [base + 0.3 * normal(seed + 1 + i, *shape) for i in range(models)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.7, 1.5), (2.0, -0.5, 1.0)])
def test_linear_is_the_average_of_models(weights: tuple[float, ...]) -> None:
    base, models = fine_tunes(1, 3, 12, 7)
    change = apply(registry()["linear"](), [Dense(model - base) for model in models], weights)
    assert gap(base + change, reference.linear(models, weights)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_task_arithmetic_is_the_scaled_sum(scale: float) -> None:
    base, models = fine_tunes(2, 3, 12, 7)
    weights = (0.5, 1.0, -2.0)
    method = registry()["task_arithmetic"](scale=scale)  # type: ignore[call-arg]
    change = apply(method, [Dense(model - base) for model in models], weights)
    assert gap(base + change, reference.task_arithmetic(base, models, weights, scale)) < 1e-6


def slerp(
    first: Tensor, second: Tensor, base: Tensor, t: float | None, weights: Sequence[float] = (1.0, 1.0)
) -> Tensor:
    method = registry()["slerp"](t=t)  # type: ignore[call-arg]
    return base + apply(method, [Dense(first - base), Dense(second - base)], weights, base)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_follows_the_great_circle(t: float) -> None:
    base, (first, second) = fine_tunes(3, 2, 9, 6)
    assert gap(slerp(first, second, base, t), reference.slerp(first, second, t)) < 1e-5
    far = -first + 0.5 * second
    assert gap(slerp(first, far, base, t), reference.slerp(first, far, t)) < 1e-5


def test_slerp_takes_its_share_from_the_weights() -> None:
    base, (first, second) = fine_tunes(4, 2, 9, 6)
    assert gap(slerp(first, second, base, None, (3.0, 1.0)), reference.slerp(first, second, 0.25)) < 1e-5


def test_slerp_ends_at_its_models() -> None:
    base, (first, second) = fine_tunes(5, 2, 9, 6)
    assert gap(slerp(first, second, base, 0.0), first) < 1e-6
    assert gap(slerp(first, second, base, 1.0), second) < 1e-6


def test_slerp_keeps_the_norm_of_unit_vectors() -> None:
    base, (first, second) = torch.zeros(30), (normal(6, 30), normal(7, 30))
    first, second = first / first.norm(), second / second.norm()
    for t in (0.1, 0.5, 0.8):
        assert float(slerp(first, second, base, t).norm()) == pytest.approx(1.0, abs=1e-6)


def test_slerp_is_straight_where_the_circle_is_undetermined() -> None:
    first, base = normal(8, 40), torch.zeros(40)
    for second in (2.0 * first, -1.5 * first, torch.zeros(40), first + 1e-3 * normal(9, 40)):
        straight = 0.7 * first + 0.3 * second
        assert gap(slerp(first, second, base, 0.3), straight) < 1e-5
        assert gap(slerp(second, first, base, 0.7), straight) < 1e-5
    off = first / first.norm()
    side = normal(10, 40)
    side = side - torch.dot(side, off) * off
    for cosine in (PARALLEL - 1e-4, PARALLEL + 1e-4):
        second = cosine * off + math.sqrt(1.0 - cosine**2) * side / side.norm()
        assert gap(slerp(off, second, base, 0.4), reference.slerp(off, second, 0.4)) < 1e-5


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)])
def test_ties_by_tensor_is_algorithm_1(density: float, weights: tuple[float, ...]) -> None:
    taus = [normal(20 + i, 14, 11) for i in range(3)]
    method = registry()["ties"](density=density, scale=0.7)  # type: ignore[call-arg]
    trimmed = [reference.ties_trim(tau.reshape(-1).tolist(), density) for tau in taus]
    expected = 0.7 * torch.tensor(reference.ties_merge(trimmed, weights), dtype=torch.float64).reshape(14, 11)
    result = apply(method, [Dense(tau) for tau in taus], weights)
    assert gap(result, expected) < 1e-6
    assert torch.equal(result == 0.0, expected == 0.0)


def test_ties_by_hand() -> None:
    taus = [torch.tensor(row) for row in ([3.0, 1.0, -2.0, 0.5], [1.0, -4.0, -2.0, 0.1], [-2.0, 2.0, 2.0, 0.2])]
    method = registry()["ties"](density=0.75)  # type: ignore[call-arg]
    expected = torch.tensor([2.0, -4.0, -2.0, 0.0])
    assert torch.equal(apply(method, [Dense(tau) for tau in taus], matrix=False), expected)


def test_ties_leaves_a_perfect_conflict_at_the_base() -> None:
    taus = [Dense(torch.tensor([1.0, 2.0])), Dense(torch.tensor([-1.0, 2.0]))]
    result = apply(registry()["ties"](density=1.0), taus, matrix=False)  # type: ignore[call-arg]
    assert torch.equal(result, torch.tensor([0.0, 2.0]))


def bin_edge(magnitude: float) -> float:
    """A normal number cut to 12 bits of fraction: the threshold that a histogram by leading bits can name."""
    fraction, exponent = math.frexp(magnitude)
    return math.ldexp(math.floor(fraction * 2.0**13) / 2.0**13, exponent)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("language")
    base = tiny.build("BertModel", tiny.config("bert"))
    models = [base, *(tiny.fine_tune(base, seed, 0.02 * seed) for seed in (1, 2, 3))]
    return [tiny.save(model, root / f"m{i}") for i, model in enumerate(models)]


def merged(folders: Sequence[Path], output: Path, **method: Any) -> dict[str, Tensor]:
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": method}
    merge(parse_recipe(recipe, "test"), output=output)
    return tiny.tensors(output)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_scopes_on_whole_models(language: list[Path], tmp_path: Path, scope: str) -> None:
    """Over the whole model the trimmed share is the paper's; a tensor with small changes may then lose all of them."""
    base, *models = map(tiny.tensors, language)
    out = merged(language, tmp_path / "out", name="ties", density=0.3, scope=scope)
    limits: list[dict[str, float]] = []
    for model in models:
        groups = [list(base)] if scope == "model" else [[name] for name in base]
        limits.append({})
        for names in groups:
            values = torch.cat([(model[name] - base[name]).reshape(-1) for name in names]).abs()
            border = float(values.sort(descending=True).values[kept(values.numel(), 0.3) - 1])
            limits[-1] |= dict.fromkeys(names, bin_edge(border) if scope == "model" else border)
    for name, origin in base.items():
        trimmed = []
        for model, limit in zip(models, limits, strict=True):
            tau = (model[name] - origin).reshape(-1)
            trimmed.append(torch.where(tau.abs() >= limit[name], tau, 0.0).tolist())
        expected = torch.tensor(reference.ties_merge(trimmed, [1.0] * 3)).reshape(origin.shape)
        torch.testing.assert_close(out[name] - origin, expected, rtol=1e-4, atol=2e-6)


GOLDEN: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "linear": lambda base, models: reference.linear(models, [1.0] * len(models)),
    "task_arithmetic": lambda base, models: reference.task_arithmetic(base, models, [1.0] * len(models), 1.0),
    "slerp": lambda base, models: reference.slerp(models[0], models[1], 0.5),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_whole_models_tensor_by_tensor(language: list[Path], tmp_path: Path, name: str) -> None:
    folders = language[:3] if name == "slerp" else language
    base, *models = map(tiny.tensors, folders)
    out = merged(folders, tmp_path / "out", name=name)
    for key, origin in base.items():
        expected = GOLDEN[name](origin, [model[key] for model in models])
        torch.testing.assert_close(out[key].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "slerp"])
def test_norm_mean_is_one_scale_for_the_whole_model(language: list[Path], tmp_path: Path, name: str) -> None:
    folders = language[:3] if name == "slerp" else language
    base, *models = map(tiny.tensors, folders)
    free = reference.difference(merged(folders, tmp_path / "free", name=name), base)
    held = reference.difference(merged(folders, tmp_path / "held", name=name, norm="mean"), base)
    mean = sum(reference.model_norm(reference.difference(model, base)) for model in models) / len(models)
    assert reference.model_norm(held) == pytest.approx(mean, rel=1e-5)
    scale = mean / reference.model_norm(free)
    for key in base:
        torch.testing.assert_close(held[key], scale * free[key], rtol=1e-4, atol=2e-6)


# Trimming


def test_kept_counts() -> None:
    assert [kept(10, density) for density in (0.0, 0.04, 0.2, 0.26, 0.999, 1.0)] == [1, 1, 2, 3, 10, 10]
    assert kept(0, 0.5) == 0 and kept(1, 0.0) == 1 and kept(3, 1.0) == 3


@quick
@given(size=st.integers(1, 300), density=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_kth_magnitude_keeps_that_many(size: int, density: float, seed: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    limit = kth_magnitude(values, density)
    assert int((values.abs() >= limit).sum()) == kept(size, density)
    assert kth_magnitude(values.reshape(1, -1).T, density) == limit


def test_kth_magnitude_of_special_tensors() -> None:
    assert kth_magnitude(torch.zeros(0), 0.5) == 0.0
    assert kth_magnitude(torch.zeros(9), 0.5) == 0.0
    assert kth_magnitude(torch.tensor([2.0, -2.0, 2.0, 1.0]), 0.25) == 2.0
    assert kth_magnitude(torch.tensor([3.0, -1.0]), 1.0) == 0.0


@pytest.mark.slow
@quick
@given(
    size=st.integers(1, 400),
    density=st.floats(0.0, 1.0),
    exponent=st.integers(-36, 36),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_histogram_threshold_lies_within_its_bound(
    size: int, density: float, exponent: int, spread: int, seed: int
) -> None:
    """At most a relative 2^-12 below the exact border, so nothing that should stay is trimmed."""
    numbers = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=numbers) * 10.0 ** (
        exponent / 2 - spread * torch.rand(size, generator=numbers)
    )
    border = float(values.abs().sort(descending=True).values[kept(size, density) - 1])
    limit = histogram_threshold(magnitude_histogram(values), density)
    assert limit <= border <= limit * (1.0 + 2.0**-12)
    assert int((values.abs() >= limit).sum()) >= kept(size, density)


def test_histograms_add_up_over_parts_in_any_order() -> None:
    values = normal(50, 60, 30) * 10.0 ** normal(51, 60, 30)
    whole = magnitude_histogram(values)
    assert whole.dtype == torch.int64 and whole.shape == (1 << BITS,) and int(whole.sum()) == 1800
    parts = [magnitude_histogram(part) for part in (values[40:], values[:7].T, values[7:40])]
    assert torch.equal(parts[0] + parts[1] + parts[2], whole)
    assert torch.equal(magnitude_histogram(-values), whole)


def test_histogram_threshold_with_zeros() -> None:
    values = torch.cat([torch.zeros(90), torch.tensor([1.0, -2.0] * 5)])
    counts = magnitude_histogram(values)
    assert histogram_threshold(counts, 0.05) == 2.0
    assert histogram_threshold(counts, 0.1) == 1.0
    assert histogram_threshold(counts, 0.2) == 0.0
