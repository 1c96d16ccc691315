"""Methods that prune changes before they merge them, against transcriptions of their papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfmerge.engine import partition
from hfmerge.methods import Block, Site, registry
from hfmerge.task_vector import Dense
from tests.fixtures import reference, tiny
from tests.methods.test_methods import apply, gap, normal


WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)]
weighted = pytest.mark.parametrize("weights", WEIGHTS, ids=str)


def made(name: str, **options: Any) -> Any:
    return registry()[name](**options)


def changes(*shape: int) -> list[Tensor]:
    return [normal(20 + i, *shape) for i in range(3)]


def block(taus: Sequence[Tensor]) -> Block:
    """The block as `apply` gives it, to draw the same numbers."""
    dense = [Dense(tau) for tau in taus]
    return Block(dense, [1.0] * 3, lambda: taus[0], None, Site("a.weight", pin=lambda model: "abc"[model]))


def elected(pruned: Sequence[Tensor], weights: Sequence[float], *, average: bool = True) -> Tensor:
    if average:
        merged = reference.ties_merge([part.reshape(-1).tolist() for part in pruned], weights)
        return torch.tensor(merged, dtype=torch.float64).reshape(pruned[0].shape)
    votes = torch.stack([weight * part for weight, part in zip(weights, pruned, strict=True)])
    return torch.where(votes * votes.sum(0) > 0.0, votes, 0.0).sum(0)


@weighted
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare_is_what_the_paper_says(density: float, weights: tuple[float, ...]) -> None:
    taus = changes(14, 11)
    here = block(taus)
    kept = [reference.dare(m.tau, here.bernoulli(density, 3, m), density) for m in here.models]
    linear = sum(weight * part for weight, part in zip(weights, kept, strict=True))
    dense = [Dense(tau) for tau in taus]
    options = {"density": density, "scale": 0.7, "seed": 3}
    assert gap(apply(made("dare_linear", **options), dense, weights), 0.7 * linear) < 1e-6
    assert gap(apply(made("dare_ties", **options), dense, weights), 0.7 * elected(kept, weights)) < 1e-6
    summed = apply(made("dare_ties", average=False, **options), dense, weights)
    assert gap(summed, 0.7 * elected(kept, weights, average=False)) < 1e-6
    plain = apply(made("dare_linear", rescale=False, **options), dense, weights)
    assert gap(plain, 0.7 * density * linear) < 1e-6


@weighted
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.25), (0.9, 0.0)])
def test_della_is_what_the_paper_says(density: float, epsilon: float, weights: tuple[float, ...]) -> None:
    taus = changes(14, 11)
    here = block(taus)
    kept = [reference.magprune(m.tau, here.uniform(3, m), density, epsilon) for m in here.models]
    linear = sum(weight * part for weight, part in zip(weights, kept, strict=True))
    dense = [Dense(tau) for tau in taus]
    options = {"density": density, "epsilon": epsilon, "scale": 0.7, "seed": 3}
    assert gap(apply(made("della_linear", **options), dense, weights), 0.7 * linear) < 1e-6
    assert gap(apply(made("della", **options), dense, weights), 0.7 * elected(kept, weights)) < 1e-6


def test_della_keeps_the_large_more_often_and_the_mean_share() -> None:
    tau = normal(1, 400, 50)
    result = apply(made("della_linear", density=0.4, epsilon=0.3, rescale=False), [Dense(tau)])
    kept = (result != 0.0).float()
    assert float(kept.mean()) == pytest.approx(0.4, abs=0.02)
    ranks = tau.abs().argsort(1).argsort(1)
    for low, share in ((0, 0.1), (45, 0.7)):
        part = kept[(ranks >= low) & (ranks < low + 5)]
        assert float(part.mean()) == pytest.approx(share + 0.03 * (low == 0) - 0.03 * (low > 0), abs=0.04)


def test_della_takes_probabilities_that_reach_beyond_their_range() -> None:
    tau = normal(1, 20, 30)
    for density, epsilon in ((0.1, 0.5), (0.95, 0.5), (0.0, 0.0), (1.0, 0.0)):
        result = apply(made("della_linear", density=density, epsilon=epsilon), [Dense(tau)])
        assert bool(result.isfinite().all())
    assert torch.equal(result, tau)


@weighted
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.05), (0.5, 0.0), (0.8, 0.5), (1.0, 0.1)])
def test_breadcrumbs_is_what_the_paper_says(density: float, gamma: float, weights: tuple[float, ...]) -> None:
    taus = changes(14, 11)
    masks = [reference.breadcrumbs_mask(tau.reshape(-1).tolist(), density, gamma) for tau in taus]
    kept = [tau.double() * torch.tensor(mask).reshape(14, 11) for tau, mask in zip(taus, masks, strict=True)]
    linear = sum(weight * part for weight, part in zip(weights, kept, strict=True))
    dense, options = [Dense(tau) for tau in taus], {"density": density, "gamma": gamma, "scale": 0.7}
    assert gap(apply(made("breadcrumbs", **options), dense, weights), 0.7 * linear) < 1e-6
    assert gap(apply(made("breadcrumbs_ties", **options), dense, weights), 0.7 * elected(kept, weights)) < 1e-6


@weighted
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_is_what_the_paper_says(density: float, weights: tuple[float, ...]) -> None:
    taus = [(1.0 + i) * tau for i, tau in enumerate(changes(14, 11))]
    expected = reference.sce([tau.reshape(-1).tolist() for tau in taus], weights, density)
    result = apply(made("sce", density=density, scale=0.7), [Dense(tau) for tau in taus], weights)
    assert gap(result, 0.7 * torch.tensor(expected, dtype=torch.float64).reshape(14, 11)) < 1e-5


@weighted
def test_magmax_takes_the_largest(weights: tuple[float, ...]) -> None:
    taus = changes(14, 11)
    scaled = [(weight * tau).reshape(-1).tolist() for weight, tau in zip(weights, taus, strict=True)]
    result = apply(made("magmax", scale=0.7), [Dense(tau) for tau in taus], weights)
    assert gap(result, 0.7 * torch.tensor(reference.magmax(scaled)).reshape(14, 11)) < 1e-6
    opposite = [Dense(torch.tensor([-1.0, 2.0])), Dense(torch.tensor([1.0, -2.0]))]
    for taken in (opposite, opposite[::-1]):
        assert apply(made("magmax"), taken, matrix=False).tolist() == [1.0, 2.0]


@weighted
@pytest.mark.parametrize(("threshold", "agreement"), [(0.4, 2), (0.2, 3), (1.5, 1)])
def test_consensus_is_what_the_paper_says(threshold: float, agreement: int, weights: tuple[float, ...]) -> None:
    taus = changes(14, 11)
    scaled = [(weight * tau).reshape(-1).tolist() for weight, tau in zip(weights, taus, strict=True)]
    method = made("consensus_ta", threshold=threshold, agreement=agreement, scale=0.7)
    result = apply(method, [Dense(tau) for tau in taus], weights)
    expected = torch.tensor(reference.consensus(scaled, threshold, agreement)).reshape(14, 11)
    assert 0 < int((expected == 0.0).sum()) < expected.numel()
    assert gap(result, 0.7 * expected) < 1e-6


RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in (1, 2, 3):
        tiny.save(tiny.fine_tune(base, i), root / f"m{i}")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RANDOM, "breadcrumbs", "breadcrumbs_ties"])
def test_bytes_do_not_depend_on_how_a_tensor_is_cut_and_a_model_leaves_without_a_trace(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merged(out: str, *models: str) -> dict[str, str]:
        sources = [root / model for model in models]
        tiny.done("merge", *sources, "--base", root / "base", "--method", name, "--output", tmp_path / out, "--quiet")
        return tiny.files(tmp_path / out)

    whole = merged("whole", "m1", "m2", "m3")
    monkeypatch.setattr(partition, "TILE", 16)
    monkeypatch.setattr(partition, "_CHUNK", 16)
    cut = merged("cut", "m1", "m2", "m3")
    assert cut["model.safetensors"] == whole["model.safetensors"]
    assert "same bytes" in tiny.done("verify", tmp_path / "cut", "--replay").out
    tiny.done("unmerge", tmp_path / "cut", "--remove", "m2", "--quiet")
    never = merged("never", "m1", "m3")
    assert tiny.files(tmp_path / "cut")["model.safetensors"] == never["model.safetensors"]
