"""Three ways of taking an accumulator apart, over adversarial spectra, against NumPy's full decomposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hfmerge import merge
from hfmerge.errors import HfMergeError
from hfmerge.methods import spectral
from hfmerge.methods.opcm import OPCM, project
from hfmerge.methods.spectral import (
    SKETCHED,
    TRUSTED,
    cleared,
    cleared_by_gram,
    cleared_by_sketch,
    cleared_by_svd,
    gram_uncertainty,
    split,
)
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.task_vector import Dense, LowRank, zero
from tests.fixtures import tiny


VARIANTS = ("code", "code-no-diagonal", "paper")
ALPHAS = (0.0, 0.3, 0.5, 0.9, 1.0)
EPS32 = 2.0**-23


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(seed: int, m: int, n: int, singular: Sequence[float]) -> Tensor:
    """A float64 matrix whose values are float32 numbers, with nearly these singular values and random vectors."""
    k = min(m, n)
    u, v = (torch.linalg.qr(normal(seed + i, size, k))[0] for i, size in enumerate((m, n)))
    return ((u * torch.tensor(singular, dtype=torch.float64)) @ v.T).float().double()


def transcription(total: Tensor, tau: Tensor, alpha: float, variant: str) -> Tensor:
    """The masked components in the full singular bases, in NumPy."""
    u, s, vt = np.linalg.svd(total.numpy(), full_matrices=True)
    counted = s[s > s[0] * EPS32 * max(total.shape)]
    if counted.size == 0:
        return tau
    exceeds = np.flatnonzero(np.cumsum(counted) > alpha * counted.sum())
    r = int(exceeds[0]) if alpha < 1.0 and exceeds.size else counted.size
    components = u.T @ tau.numpy() @ vt.T
    if variant == "paper":
        components[:r] = 0.0
        components[:, :r] = 0.0
    components[:r, :r] = 0.0
    if variant != "code-no-diagonal":
        components[np.arange(counted.size), np.arange(counted.size)] = 0.0
    return torch.from_numpy(u @ components @ vt)


def gap(value: Tensor, expected: Tensor, tau: Tensor) -> float:
    return float((value - expected).norm() / tau.norm())


def falling(decades: float) -> Callable[[int], list[float]]:
    return lambda k: [10.0 ** (-decades * i / max(k - 1, 1)) for i in range(k)]


SPECTRA: dict[str, Callable[[int], list[float]]] = {
    "flat": lambda k: [1.0 + 0.05 * (k - i) for i in range(k)],
    "falling by 1e3": falling(3),
    "falling by 1e5": falling(5),
    "falling by 1e6": falling(6),
    "falling by 1e12": falling(12),
    "two clusters": lambda k: [(1.0 if i < k // 2 else 0.1) * (1.0 + 1e-3 * (k - i)) for i in range(k)],
    "tight clusters": lambda k: [(1.0 if i < k // 2 else 0.1) * (1.0 + 1e-5 * (k - i)) for i in range(k)],
    "a cluster far below": lambda k: [(1.0 if i < k // 2 else 1e-4) * (1.0 + 1e-3 * (k - i)) for i in range(k)],
    "one huge, many small": lambda k: [1e4 if i == 0 else 1.0 + 0.05 * (k - i) for i in range(k)],
    "one huge, the rest does not count": lambda k: [1e9 if i == 0 else 1.0 + 0.05 * (k - i) for i in range(k)],
    "rank deficient": lambda k: [1.0 + (k - i) if i < max(1, k // 3) else 0.0 for i in range(k)],
    "rank one": lambda k: [2.0 if i == 0 else 0.0 for i in range(k)],
    "zero": lambda k: [0.0] * k,
    "tiny": lambda k: [1e-18 * (1 + k - i) for i in range(k)],
    "huge": lambda k: [1e15 * (1 + k - i) for i in range(k)],
}
BEYOND_GRAM = ("falling by 1e5", "falling by 1e6", "falling by 1e12", "a cluster far below", "one huge, many small")
"""Spectra whose range the Gram matrix does not hold, where the whole of it is in use."""
SHAPES = [(48, 20), (20, 48), (30, 30), (1, 20), (20, 1), (400, 12), (120, 90)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_projection_is_that_of_the_full_decomposition(m: int, n: int, name: str) -> None:
    total, tau = with_spectrum(3, m, n, SPECTRA[name](min(m, n))), normal(4, m, n)
    for variant in VARIANTS:
        for alpha in ALPHAS:
            found = project(total, tau, (m, n), alpha, variant)  # type: ignore[arg-type]
            assert gap(found, transcription(total, tau, alpha, variant), tau) < 4e-9, (variant, alpha)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(48, 20), (30, 30), (120, 90)])
def test_both_exact_ways_agree_wherever_both_are_open(m: int, n: int, name: str) -> None:
    total, tau = with_spectrum(3, m, n, SPECTRA[name](n)), normal(4, m, n)
    closed = 0
    for variant in VARIANTS:
        for alpha in ALPHAS:
            full = cleared_by_svd(total, tau, (m, n), alpha, variant)  # type: ignore[arg-type]
            assert gap(full, transcription(total, tau, alpha, variant), tau) < 4e-9, (variant, alpha)
            quick = cleared_by_gram(total, tau, (m, n), alpha, variant)  # type: ignore[arg-type]
            if quick is None:
                closed += 1
            else:
                assert gap(quick, full, tau) < 4.0 * TRUSTED, (variant, alpha)
    assert (closed > 0) == (name in BEYOND_GRAM), closed


@pytest.mark.parametrize("decades", [4.5, 5.0, 5.5])
def test_what_is_refused_would_have_been_wrong_by_more(decades: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is no empty caution: where it refuses, differences do exceed it, within an order of magnitude."""
    total, tau = with_spectrum(5, 40, 40, falling(decades)(40)), normal(6, 40, 40)
    squares = torch.linalg.eigvalsh(total.T @ total).flip(0).clamp_min(0.0)
    r, rank = split(squares.sqrt(), (40, 40), 0.5)
    estimate = gram_uncertainty(squares, r, rank, 1600)
    assert cleared_by_gram(total, tau, (40, 40), 0.5, "code") is None and estimate > TRUSTED
    monkeypatch.setattr(spectral, "TRUSTED", 1.0)
    forced = cleared_by_gram(total, tau, (40, 40), 0.5, "code")
    assert forced is not None
    wrong = gap(forced, transcription(total, tau, 0.5, "code"), tau)
    assert 0.01 * estimate < wrong < 10.0 * estimate


def test_equal_singular_values_are_left_to_the_full_decomposition() -> None:
    """Vectors inside a cluster are arbitrary, so no two ways agree on its diagonal; what was kept stays finite."""
    q = torch.linalg.qr(normal(7, 30, 12))[0]
    assert cleared_by_gram(q, normal(8, 30, 12), (30, 12), 0.0, "code") is None
    result = cleared(q, normal(8, 30, 12), (30, 12), 0.0, "code")
    assert bool(result.isfinite().all()) and float((q * result).sum()) < 1e-12


def test_a_matrix_of_a_trained_model_stays_with_the_gram_matrix() -> None:
    """Noise and a few strong directions, as differences of trained weights have; wide margins, so speed is no luck."""
    m, n = 384, 256
    strong = normal(9, m, 16) / torch.arange(1, 17) @ normal(10, 16, n)
    total = strong / strong.norm() + normal(11, m, n) / (m * n) ** 0.5
    squares = torch.linalg.eigvalsh(total.T @ total).flip(0)
    r, rank = split(squares.sqrt(), (m, n), 0.5)
    assert 0 < r < n == rank and gram_uncertainty(squares, r, rank, m * n) < TRUSTED / 30.0


# What LAPACK refuses


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[int]:
    """Make a decomposition of torch fail to converge the first `times` times; counts the calls."""
    calls: list[int] = []
    real = getattr(torch.linalg, name)

    def decompose(matrix: Tensor, **options: bool) -> object:
        calls.append(matrix.shape[0])
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, name, decompose)
    return calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_eigenvalues_that_do_not_converge_are_no_end(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    total, tau = normal(12, 30, 20), normal(13, 30, 20)
    expected = transcription(total, tau, 0.5, variant)
    eigen = failing(monkeypatch, "eigh", 1)
    assert gap(project(total, tau, (30, 20), 0.5, variant), expected, tau) < 1e-12  # type: ignore[arg-type]
    assert eigen == [20]
    monkeypatch.undo()
    failing(monkeypatch, "eigh", 1)
    full = failing(monkeypatch, "svd", 1)
    assert gap(project(total, tau, (30, 20), 0.5, variant), expected, tau) < 1e-12  # type: ignore[arg-type]
    assert full == [30, 20]


def test_singular_values_that_do_not_converge_end_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "eigh", 1)
    failing(monkeypatch, "svd", 2)
    with pytest.raises(HfMergeError, match=r"\(30, 20\) accumulator do not converge .*`exclude`"):
        project(normal(12, 30, 20), normal(13, 30, 20), (30, 20), 0.5, "code")


# The sketch


def heavy(seed: int, m: int, n: int) -> Tensor:
    """Strong shared directions over full-rank noise."""
    strong = normal(20, m, 16) / torch.arange(1, 17) @ normal(21, 16, n)
    return strong / strong.norm() + normal(seed, m, n) / (m * n) ** 0.5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("m", "n"), [(400, 300), (300, 400), (300, 300)])
def test_sketch_is_near_the_exact_projection(m: int, n: int, variant: str) -> None:
    total, tau = heavy(22, m, n), heavy(23, m, n)
    exact = project(total, tau, (m, n), 0.4, variant)  # type: ignore[arg-type]
    sketched = project(total, tau, (m, n), 0.4, variant, "randomized")  # type: ignore[arg-type]
    assert not torch.equal(sketched, exact)
    assert gap(sketched, exact, tau) < (0.02 if variant == "code-no-diagonal" else 0.08)
    block = project(total, tau, (m, n), 0.4, "paper" if variant == "paper" else "code-no-diagonal")
    if variant == "code":
        assert gap(sketched, block, tau) < 0.02


def test_sketch_finds_a_block_with_a_gap_below_it() -> None:
    """40 strong directions hold 60 % of the sum and alpha asks for 59 %: the block is determined, the sketch exact."""
    m, n = 360, 300
    total = with_spectrum(24, m, n, [9.0 + 0.02 * (40 - i) if i < 40 else 0.95 for i in range(n)])
    tau = normal(25, m, n)
    share = float(torch.linalg.svdvals(total)[:40].sum() / torch.linalg.svdvals(total).sum()) + 1e-4
    exact = project(total, tau, (m, n), share, "code-no-diagonal")
    assert gap(project(total, tau, (m, n), share, "code-no-diagonal", "randomized"), exact, tau) < 1e-5


def test_sketch_depends_on_nothing_but_its_input() -> None:
    total, tau = heavy(26, 320, 280), heavy(27, 320, 280)
    state = torch.get_rng_state()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(project(total, tau, (320, 280), 0.4, "code", "randomized"))
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("total", "alpha"),
    [
        (heavy(28, 400, SKETCHED - 1), 0.4),  # small
        (heavy(28, 300, 280), 0.9),  # the block is most of it
        (heavy(28, 300, 280), 1.0),
        (heavy(28, 300, 280), 0.0),  # no block
        (torch.zeros(300, 280, dtype=torch.float64), 0.4),
        (normal(28, 300, 3) @ normal(29, 3, 280), 0.9),  # rank below the block and its surplus
    ],
    ids=["small", "most", "all", "none", "zero", "low rank"],
)
def test_where_a_sketch_gains_nothing_the_result_is_exact(total: Tensor, alpha: float) -> None:
    m, n = total.shape
    tau = normal(30, m, n)
    assert cleared_by_sketch(total, tau, (m, n), alpha, "code") is None
    exact = project(total, tau, (m, n), alpha, "code")
    assert torch.equal(project(total, tau, (m, n), alpha, "code", "randomized"), exact)


def test_deviation_is_the_measured_difference() -> None:
    total, tau = Dense(heavy(31, 300, 280)), Dense(heavy(32, 300, 280))
    exact, sketch = OPCM(alpha=0.4), OPCM(alpha=0.4, spectral="randomized")
    steps = [method.step({"S": total}, tau, 0.5, matrix=True)["S"].to_dense() for method in (exact, sketch)]
    found = sketch.deviation({"S": total}, tau, 0.5, matrix=True)
    assert found is not None and 0.0 < found < 0.1
    assert found == pytest.approx(float((steps[1] - steps[0]).norm() / (0.5 * tau.value).norm()), rel=1e-6)
    assert exact.deviation({"S": total}, tau, 0.5, matrix=True) is None
    for carry, change, matrix in (
        (None, tau, True),
        ({"S": total}, tau, False),
        ({"S": zero((300, 280))}, tau, True),
        ({"S": total}, zero((300, 280)), True),
        ({"S": total}, Dense(torch.zeros(300, 280)), True),
    ):
        assert sketch.deviation(carry, change, 1.0, matrix=matrix) is None
    factors = [LowRank(normal(33 + i, 300, 4), normal(35 + i, 4, 280)) for i in range(2)]
    assert sketch.deviation({"S": factors[0]}, factors[1], 1.0, matrix=True) == 0.0


@pytest.mark.slow
def test_a_randomized_run_reports_its_deviation_and_replays_to_the_same_bytes(tmp_path: Path) -> None:
    base = tiny.build("BertModel", tiny.config("bert", hidden_size=SKETCHED + 8, intermediate_size=SKETCHED + 8))
    models = (base, tiny.fine_tune(base, 1), tiny.fine_tune(base, 2))
    folders = [str(tiny.save(model, tmp_path / f"m{i}")) for i, model in enumerate(models)]
    scalars = {}
    for name in ("exact", "randomized"):
        method = {"name": "opcm", "alpha": 0.3, "spectral": name}
        recipe = parse_recipe({"base": folders[0], "models": folders[1:], "method": method}, "test")
        scalars[name] = merge(recipe, output=tmp_path / name).entry.scalars
    assert set(scalars["exact"].to_dict()) == {"scale", "merged_norm"}
    assert 0.0 < scalars["randomized"].deviation < 0.2
    exact, randomized = (tiny.tensors(tmp_path / name) for name in ("exact", "randomized"))
    differing = [name for name in exact if not torch.equal(exact[name], randomized[name])]
    assert len(differing) >= 12
    assert tiny.done("verify", tmp_path / "randomized", "--replay").code == 0
    options = ("--method", "opcm", "--option", "alpha=0.3", "--option", "spectral=randomized")
    told = tiny.done("merge", *folders[1:], "--base", folders[0], *options, "--output", tmp_path / "told")
    assert (
        f"greatest difference from the exact last step, in sampled parameters: {scalars['randomized'].deviation:.1e}"
        in told.out
    )
    assert tiny.tensors(tmp_path / "told").keys() == randomized.keys()
