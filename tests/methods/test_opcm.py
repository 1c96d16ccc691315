"""OPCM: variants against a plain full decomposition, faults of other implementations, whole models as published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ViTModel

from hfmerge import MergeResult, merge
from hfmerge.checkpoint.reader import Reader
from hfmerge.engine.tasks import Visit
from hfmerge.methods.opcm import OPCM, project
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.task_vector import Dense, LowRank, TaskVector, zero
from tests.fixtures import reference, tiny


VARIANTS = ("code", "code-no-diagonal", "paper")
ALPHAS = (0.0, 0.3, 0.5, 0.9, 1.0)
SHAPES = ((48, 20), (20, 48), (30, 30), (1, 20), (20, 1), (1, 1), (2, 3), (130, 7))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(seed: int, m: int, n: int, singular: Sequence[float]) -> Tensor:
    """A float32 matrix with these singular values (as float32 keeps them) and random singular vectors."""
    k = min(m, n)
    u, v = (torch.linalg.qr(normal(seed + i, size, k).double())[0] for i, size in enumerate((m, n)))
    return ((u * torch.tensor(singular, dtype=torch.float64)) @ v.T).float()


def fold(method: OPCM, taus: Sequence[TaskVector], matrix: bool = True) -> TaskVector:
    carry = None
    for tau in taus:
        carry = method.step(carry, tau, 1.0, matrix=matrix)
    assert carry is not None
    return method.emit(carry, [1.0] * len(taus), matrix=True)


def added(total: Tensor, tau: Tensor, alpha: float, variant: str) -> Tensor:
    """P(tau) in float64."""
    return project(total.double(), tau.double(), (total.shape[0], total.shape[1]), alpha, variant)  # type: ignore[arg-type]


def gap(value: Tensor, expected: Tensor, scale: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / scale.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_projection_is_the_masked_full_decomposition(m: int, n: int, variant: str) -> None:
    total, tau = normal(1, m, n), normal(2, m, n)
    for alpha in ALPHAS:
        assert (
            gap(added(total, tau, alpha, variant), reference.opcm_projection(total, tau, alpha, variant), tau) < 1e-11
        )


def test_r_is_the_first_index_whose_share_exceeds_alpha() -> None:
    """Counted from 0, so that r directions lie before it; a share of exactly alpha does not exceed it."""
    total, tau = torch.diag(torch.tensor([4.0, 2.0, 1.5, 0.5])), torch.ones(4, 4)
    for alpha, r in ((0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.99, 3), (1.0, 4)):
        cleared = added(total, tau, alpha, "code-no-diagonal").abs() < 1e-12
        assert int(cleared.sum()) == r * r and bool(cleared[:r, :r].all()), alpha


def test_equal_singular_values_have_one_block() -> None:
    """Inside a cluster of equal values the vectors are arbitrary, but the space they span, so the block, is not."""
    total, tau = with_spectrum(5, 24, 16, [2.0] * 6 + [1.0] * 10), normal(6, 24, 16)
    u, _, vt = torch.linalg.svd(total.double(), full_matrices=False)
    inside = u[:, :6] @ (u[:, :6].T @ tau.double() @ vt[:6].T) @ vt[:6]
    r_six = 12.0 / 22.0 + 1e-3
    assert gap(added(total, tau, r_six, "code-no-diagonal"), tau - inside, tau) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_models_match_the_plain_sum(variant: str) -> None:
    for m, n in ((40, 24), (24, 40), (16, 16)):
        for alpha in (0.3, 0.5, 1.0):
            taus = [normal(10 + i, m, n) for i in range(4)]
            result = fold(OPCM(alpha, variant), [Dense(tau) for tau in taus]).to_dense()  # type: ignore[arg-type]
            assert gap(result, reference.opcm_sum(taus, alpha, variant), result) < 3e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [(3, 2, 4, 1), (3, 0, 2), (0, 0, 3), (1, 1), (9, 9, 9, 9), (4, 30)])
def test_factors_give_what_dense_matrices_give(ranks: tuple[int, ...], variant: str) -> None:
    m, n = 36, 28
    factored = [LowRank(normal(20 + i, m, k), normal(30 + i, k, n)) for i, k in enumerate(ranks)]
    for alpha in (0.3, 0.5, 1.0):
        method = OPCM(alpha, variant)  # type: ignore[arg-type]
        small, large = fold(method, factored), fold(method, [Dense(tau.to_dense()) for tau in factored])
        rank = sum(ranks) if sum(ranks) < n else None
        assert (small.rank if isinstance(small, LowRank) else None) == rank
        assert gap(small.to_dense(), large.to_dense(), large.to_dense()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_models_add_only_what_the_variant_keeps(variant: str) -> None:
    tau = normal(40, 20, 14)
    u, s, vt = torch.linalg.svd(tau.double(), full_matrices=False)
    r = reference.split_rank(s, 0.5, 14)
    tail = u[:, r:] @ torch.diag(s[r:]) @ vt[r:]
    expected = tau.double() + (tail if variant == "code-no-diagonal" else 0.0)
    assert gap(fold(OPCM(0.5, variant), [Dense(tau), Dense(tau)]).to_dense(), expected, tau) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_is_disjoint_from_the_leading_directions(variant: str) -> None:
    total, tau = normal(41, 18, 26), normal(42, 18, 26)
    u, s, vt = torch.linalg.svd(total.double(), full_matrices=False)
    r = reference.split_rank(s, 0.5, 18)
    components = u.T @ added(total, tau, 0.5, variant) @ vt.T
    assert float(components[:r, :r].abs().max()) < 1e-12
    diagonal = components.diagonal()[r:].abs().max()
    assert (float(diagonal) < 1e-12) == (variant != "code-no-diagonal")
    assert (float(components[:r, r:].abs().max()) < 1e-12) == (variant == "paper")
    again = added(total, added(total, tau, 0.5, variant).float(), 0.5, variant)
    assert gap(again, added(total, tau, 0.5, variant), tau) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_projection_never_lengthens(variant: str) -> None:
    for seed in range(20):
        total, tau = normal(seed, 12, 9), normal(100 + seed, 12, 9)
        for alpha in ALPHAS:
            assert float(added(total, tau, alpha, variant).norm()) <= float(tau.double().norm()) * (1.0 + 1e-12)


# Faults of the reference implementation, and that they are not here


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 5, 12])
def test_alpha_one_clears_the_whole_block_every_time(size: int, variant: str) -> None:
    """There, round-off decides whether the cumulative share ever exceeds 1, and so between all and nothing."""
    for seed in range(25):
        total, tau = normal(seed, size, size) + 2 * torch.eye(size), normal(50 + seed, size, size)
        assert float(added(total, tau, 1.0, variant).norm()) < 1e-9 * float(tau.norm())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_zero_accumulator_leaves_the_change_alone(alpha: float, variant: str) -> None:
    """There, arbitrary singular vectors of a zero matrix take the incoming diagonal away."""
    tau = normal(60, 10, 7)
    method = OPCM(alpha, variant)  # type: ignore[arg-type]
    for nothing in (zero((10, 7)), Dense(torch.zeros(10, 7)), LowRank(torch.zeros(10, 2), torch.zeros(2, 7))):
        assert gap(fold(method, [nothing, Dense(tau)]).to_dense(), tau, tau) < 1e-6
        assert gap(fold(method, [Dense(tau), nothing]).to_dense(), tau, tau) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_bases_of_the_null_space_do_not_matter(alpha: float, variant: str) -> None:
    """There, the diagonal is cleared over vectors of the null space too, which every library chooses as it likes."""
    m, n = 22, 17
    total, tau = normal(61, m, 4) @ normal(62, 4, n), normal(63, m, n)
    plain = added(total, tau, alpha, variant)
    left, right = (torch.linalg.qr(normal(64 + i, size, size).double())[0] for i, size in enumerate((m, n)))
    turned = project(left @ total.double() @ right, left @ tau.double() @ right, (m, n), alpha, variant)  # type: ignore[arg-type]
    assert gap(left.T @ turned @ right.T, plain, tau) < 1e-9
    padded = torch.zeros(m + 9, n + 5)
    larger, incoming = padded.clone(), padded.clone()
    larger[:m, :n], incoming[:m, :n] = total, tau
    assert gap(added(larger, incoming, alpha, variant)[:m, :n], plain, tau) < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_off_in_the_accumulator_is_no_direction(variant: str) -> None:
    """A sum of adapters held densely has singular values of rounding size where the factored one has none."""
    m, n = 200, 60
    total = (normal(65, m, 3) @ normal(66, 3, n)).float()
    tau = normal(67, m, n)
    noisy = total + 1e-8 * float(total.abs().max()) * normal(68, m, n)
    assert gap(added(noisy, tau, 1.0, variant), added(total, tau, 1.0, variant), tau) < 1e-5


@pytest.mark.parametrize("shape", [(9,), (4, 6), (2, 3, 2, 2), ()])
def test_what_is_no_matrix_is_summed(shape: tuple[int, ...]) -> None:
    taus = [normal(70 + i, *shape) for i in range(3)]
    result = fold(OPCM(), [Dense(tau) for tau in taus], matrix=False).to_dense()
    assert gap(result, taus[0] + taus[1] + taus[2], result) < 1e-6


# Whole models


def merged(folder: Path, base: Path, models: Sequence[Path], **method: object) -> MergeResult:
    recipe = {"base": str(base), "models": [str(model) for model in models], "method": {"name": "opcm", **method}}
    return merge(parse_recipe(recipe, "test"), output=folder)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of different strength, of a model with parameters outside any leaf module."""
    root = tmp_path_factory.mktemp("vision")
    base = tiny.build("ViTModel", tiny.config("vit"))
    models = [base, *(tiny.fine_tune(base, seed, 0.02 * seed) for seed in (1, 2, 3))]
    return [tiny.save(model, root / f"m{i}") for i, model in enumerate(models)]


def matrices(weights: reference.Params) -> list[str]:
    return [name for name, value in weights.items() if value.dim() == 2 and "embeddings" not in name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_models_match_the_published_recursion(vision: list[Path], tmp_path: Path, variant: str) -> None:
    base, *models = map(tiny.tensors, vision)
    expected = reference.opcm_model(base, models, matrices(base), 0.5, variant)
    result = merged(tmp_path / "out", vision[0], vision[1:], variant=variant)
    out = tiny.tensors(tmp_path / "out")
    assert list(out) == list(base) and len(matrices(base)) == 13
    for name in base:
        assert gap(out[name].double() - base[name], expected[name] - base[name], expected[name] - base[name]) < 2e-5, (
            name
        )
    norms = [reference.model_norm(reference.difference(model, base)) for model in models]
    assert reference.model_norm(reference.difference(out, base)) == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert result.entry.scalars.merged_norm == pytest.approx(sum(norms) / 3, rel=1e-6)
    for material, norm in zip(result.entry.models, norms, strict=True):
        assert math.sqrt(material.squared_norm or 0.0) == pytest.approx(norm, rel=1e-6)


def test_parameters_outside_leaf_modules_are_merged(vision: list[Path], tmp_path: Path) -> None:
    """There, modules are walked and not parameters, so class tokens and position embeddings stay the base's."""
    merged(tmp_path / "out", vision[0], vision[1:], norm="none")
    base, *models = map(tiny.tensors, vision)
    out = tiny.tensors(tmp_path / "out")
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        change = torch.stack([model[name] - base[name] for model in models]).sum(0)
        assert gap(out[name] - base[name], change, change) < 1e-5


def test_one_model_is_itself(vision: list[Path], tmp_path: Path) -> None:
    for variant in VARIANTS:
        result = merged(tmp_path / variant, vision[0], vision[2:3], variant=variant)
        assert result.entry.scalars.scale == pytest.approx(1.0, abs=1e-7)
        out, model = tiny.tensors(tmp_path / variant), tiny.tensors(vision[2])
        for name in model:
            torch.testing.assert_close(out[name], model[name], rtol=0.0, atol=2e-7)


@pytest.mark.slow
def test_models_are_taken_in_the_order_given(vision: list[Path], tmp_path: Path) -> None:
    """There, the order is shuffled unless one asks otherwise."""
    base, *models = map(tiny.tensors, vision)
    names = matrices(base)
    for label, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        result = merged(tmp_path / label, vision[0], [vision[1 + i] for i in order])
        assert [material.name for material in result.entry.models] == [f"m{1 + i}" for i in order]
        expected = reference.opcm_model(base, [models[i] for i in order], names, 0.5, "code")
        out = tiny.tensors(tmp_path / label)
        assert all(
            gap(out[name] - base[name], expected[name] - base[name], out[name] - base[name]) < 2e-5 for name in names
        )
    first, second = tiny.tensors(tmp_path / "a"), tiny.tensors(tmp_path / "b")
    assert any(gap(first[name], second[name], first[name] - base[name]) > 1e-2 for name in names)


def test_sources_are_never_written(vision: list[Path], tmp_path: Path) -> None:
    """There, one execution path adds into the base model's own weights."""
    before = [tiny.everything(folder) for folder in vision]
    merged(tmp_path / "out", vision[0], vision[1:])
    assert [tiny.everything(folder) for folder in vision] == before
    total, tau = Dense(normal(80, 8, 6)), Dense(normal(81, 8, 6))
    kept = [total.value.clone(), tau.value.clone()]
    fold(OPCM(), [total, tau, tau])
    assert torch.equal(total.value, kept[0]) and torch.equal(tau.value, kept[1])


@pytest.mark.slow
def test_half_precision_is_merged_in_float(vision: list[Path], tmp_path: Path) -> None:
    """There, bfloat16 stops in the decomposition."""
    half = [ViTModel.from_pretrained(folder, dtype=torch.bfloat16) for folder in vision]
    folders = [tiny.save(model, tmp_path / f"m{i}") for i, model in enumerate(half)]
    base, *models = map(tiny.tensors, folders)
    expected = reference.opcm_model(base, models, matrices(base), 0.5, "code")
    merged(tmp_path / "out", folders[0], folders[1:])
    out = tiny.tensors(tmp_path / "out")
    for name, value in out.items():
        assert value.dtype == torch.bfloat16
        assert bool(((value.double() - expected[name]).abs() <= 2.0**-8 * expected[name].abs() + 1e-5).all()), name


@pytest.mark.slow
@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_tensors_count_once(tmp_path: Path, stored_twice: bool) -> None:
    """There, a tied pair is merged twice, so that the last model weighs half as much again, and counts twice."""
    base = tiny.build("BertForMaskedLM", tiny.config("bert"))
    models = [base, *(tiny.fine_tune(base, seed) for seed in (1, 2))]
    folders = [tiny.save(model, tmp_path / f"m{i}") for i, model in enumerate(models)]
    owner = "bert.embeddings.word_embeddings.weight"
    copies = {"cls.predictions.decoder.weight": owner, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    plain = [tiny.tensors(folder) for folder in folders]
    if stored_twice:
        for folder in folders:
            tiny.edit(folder, lambda held: held.update({copy: held[of].clone() for copy, of in copies.items()}))
    names = [name for name in matrices(plain[0]) if name not in copies]
    expected = reference.opcm_model(plain[0], plain[1:], names, 0.5, "code")
    merged(tmp_path / "out", folders[0], folders[1:])
    out = tiny.tensors(tmp_path / "out")
    assert sorted(out) == sorted(tiny.tensors(folders[0]))
    for name in plain[0]:
        change = expected[name] - plain[0][name]
        assert gap(out[name] - plain[0][name], change, change) < 2e-5, name
    if stored_twice:
        assert all(torch.equal(out[copy], out[of]) for copy, of in copies.items())


def test_adapters_are_folded_without_reading_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is carried and added comes from the factors alone; the base is read where base + change is written."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    folder = tiny.save(base, tmp_path / "base")
    adapters = [tiny.adapter(tmp_path / f"a{i}", tiny.attention(), i, rank=2) for i in (1, 2)]
    events: list[str] = []
    read, rescale = Reader.stored, Visit.rescale

    def reading(self: Reader, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        events.append(f"{Path(self.source.snapshot.label).name}: {key}")
        return read(self, key, rows)

    def writing(self: Visit, scale: float) -> None:
        events.append("second pass")
        rescale(self, scale)

    monkeypatch.setattr(Reader, "stored", reading)
    monkeypatch.setattr(Visit, "rescale", writing)
    result = merged(tmp_path / "out", folder, adapters)
    first = events[: events.index("second pass")]
    assert len(first) == 2 * 2 * len(tiny.attention()) and all(event.startswith("a") for event in first)
    assert any(event.startswith("base: ") for event in events[len(first) :])
    assert len(list((tmp_path / "out" / "merge_state").glob("*.safetensors"))) == len(result.entry.states) == 1
