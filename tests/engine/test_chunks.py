"""Large tensors that are merged in rows: which are, and that nobody can tell from the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hfmerge
from hfmerge.checkpoint.reader import Reader, Rows
from hfmerge.engine.partition import TILE, ahead, chunks, held, pieces, visit_bytes
from hfmerge.engine.planner import make_plan
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.task_vector import squared_norm
from tests.fixtures import tiny


EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with an embedding and a head larger than a tile, an MLP larger than a chunk; an adapter of the MLP."""
    root = tmp_path_factory.mktemp("models")
    large = {"vocab_size": 4099, "hidden_size": 128, "intermediate_size": 8500, "num_hidden_layers": 1}
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", **large))
    tiny.save(base, root / "base")
    for i in (1, 2, 3, 4, 5):
        tuned = tiny.fine_tune(base, i)
        # most of the norm, so that its last bit is the sum's
        tuned.get_parameter(UP).data.mul_(40.0)
        tiny.save(tuned, root / f"m{i}")
    tiny.adapter(root / "a0", {UP.removesuffix(".weight"): (8500, 128)}, 1, rank=2)
    return root


def merge(root: Path, out: Path, names: tuple[str, ...], *flags: str) -> None:
    models = [str(root / name) for name in names]
    tiny.done("merge", *models, "--base", root / "base", "--output", out, "--quiet", *flags)


def norms(out: Path) -> list[float]:
    [entry] = [json.loads(path.read_text()) for path in sorted((out / "merge_history").glob("*.json"))[-1:]]
    return [model["squared_norm"] for model in entry["materials"]["models"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("opcm", {EMBEDDING}),
        ("gram", {EMBEDDING}),
        ("linear", {EMBEDDING, HEAD, UP}),
        ("ties", {EMBEDDING, HEAD, UP}),
    ],
)
def test_which_tensors_are_merged_in_rows(root: Path, method: str, rows: set[str]) -> None:
    models = [str(root / "m1"), str(root / "m2")]
    recipe = apply_overrides(None, models=models, base=str(root / "base"), method=method, norm="mean")
    plan = make_plan(recipe)
    cut = chunks(plan, plan.params)
    assert {chunk.param.key for chunk in cut if chunk.rows is not None} >= rows
    assert (HEAD in {chunk.param.key for chunk in cut if chunk.rows is None}) == (HEAD not in rows)
    for chunk in cut:
        if chunk.rows is None:
            continue
        for tile in chunk.tiles():
            assert tile.shape[0] * tile.shape[1] <= 4 * TILE


@pytest.mark.slow
@pytest.mark.parametrize(("method", "times"), [("ties", 1), ("mdm_oc", 1), ("opcm", 0)])
def test_rows_that_are_surveyed_are_read_once_if_there_is_room(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> None:
    """And the plan knows what is kept of them; either way the bytes are the same."""
    models = [str(root / "m1"), str(root / "m2")]
    recipe = apply_overrides(None, models=models, base=str(root / "base"), method=method)
    plan = make_plan(recipe)
    [chunk] = [chunk for chunk in chunks(plan, plan.params) if chunk.param.key == UP]
    stored, read = Reader.stored, {"rows": 0}

    def counted(reader: Reader, key: str, rows: Rows | None = None) -> torch.Tensor:
        if key == UP and reader.source.snapshot.name != "base":
            read["rows"] += 8500 if rows is None else rows[1] - rows[0]
        return stored(reader, key, rows)

    monkeypatch.setattr(Reader, "stored", counted)
    kept = held(plan, chunk)
    hfmerge.merge(recipe, output=tmp_path / "kept")
    once, read["rows"] = read["rows"], 0
    monkeypatch.setattr("hfmerge.engine.partition.REMEMBERED", 0)
    assert kept - held(plan, chunk) == times * 4 * 3 * 8500 * 128
    hfmerge.merge(recipe, output=tmp_path / "again")
    assert 2 * 8500 <= once < 2 * 8500 * 1.2
    assert read["rows"] - once == times * 2 * 8500
    assert tiny.files(tmp_path / "kept") == tiny.files(tmp_path / "again")


@pytest.mark.parametrize(
    ("method", "model", "larger"), [("opcm", "m1", 1), ("gram", "m1", 34), ("gram", "a1", 1 / 34)]
)
def test_the_estimate_knows_which_square_matrix_a_method_makes(
    root: Path, tmp_path: Path, method: str, model: str, larger: float
) -> None:
    """Of (8500, 128) and (128, 8500): the smaller one; `gram` that of the inputs, for adapters of the outputs."""
    tiny.adapter(root / "a1", {UP.removesuffix(".weight"): (8500, 128), DOWN.removesuffix(".weight"): (128, 8500)}, 1)
    plan = make_plan(apply_overrides(None, models=[str(root / model)], base=str(root / "base"), method=method))
    params = {param.key: param for param in plan.params}
    tall, wide = (visit_bytes(params[key], params[key].slot.shape, plan.method) for key in (UP, DOWN))
    assert wide / tall == pytest.approx(larger, rel=0.1)


@pytest.mark.parametrize(
    ("method", "model", "more"), [("opcm", "m1", 0), ("gram", "m1", 0), ("opcm", "a0", 1), ("linear", "m1", 1)]
)
def test_nothing_is_read_ahead_of_dense_matrices(root: Path, method: str, model: str, more: int) -> None:
    plan = make_plan(apply_overrides(None, models=[str(root / model)], base=str(root / "base"), method=method))
    assert ahead(plan) == more


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "opcm", "ties", "task_arithmetic"])
def test_a_model_that_cannot_be_read_in_rows_leaves_no_trace(root: Path, tmp_path: Path, method: str) -> None:
    """With the adapter the MLP is visited whole; norms, and what follows from them, are those of the rows."""
    # last bits of a sum may agree by chance; not those of five
    flags, others = ("--method", method, "--norm", "mean"), ("m3", "m4", "m5")
    merge(root, tmp_path / "left", ("m1", "a0", "m2", *others), *flags)
    tiny.done("unmerge", tmp_path / "left", "--remove", root / "a0", "--quiet")
    merge(root, tmp_path / "never", ("m1", "m2", *others), *flags)
    assert tiny.files(tmp_path / "left", states=False) == tiny.files(tmp_path / "never", states=False)
    assert norms(tmp_path / "left") == norms(tmp_path / "never")


@pytest.mark.slow
def test_the_embedding_is_summed_whatever_opcm_does_to_matrices(root: Path, tmp_path: Path) -> None:
    merge(root, tmp_path / "out", ("m1", "m2"), "--method", "opcm")
    base, *models = (tiny.tensors(root / name) for name in ("base", "m1", "m2"))
    entry: dict[str, Any] = json.loads((tmp_path / "out" / "merge_history" / "0001.json").read_text())
    summed = sum(model[EMBEDDING].double() - base[EMBEDDING].double() for model in models)
    expected = base[EMBEDDING].double() + entry["byproducts"]["scalars"]["scale"] * summed
    torch.testing.assert_close(tiny.tensors(tmp_path / "out")[EMBEDDING].double(), expected, rtol=0, atol=1e-7)
    exact = [sum(float((m[k].double() - base[k].double()).square().sum()) for k in base) for m in models]
    assert norms(tmp_path / "out") == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 3, 7, 16])
def test_where_a_piece_lies_does_not_show_in_its_norm(offset: int) -> None:
    values = torch.randn(300_000 + offset, generator=torch.Generator().manual_seed(1))
    assert squared_norm(values[offset:]) == squared_norm(values[offset:].clone())


def test_pieces_cover_a_tensor_once(root: Path) -> None:
    models = [str(root / "m1"), str(root / "a0")]
    plan = make_plan(apply_overrides(None, models=models, base=str(root / "base"), method="linear", norm="mean"))
    [whole] = [chunk for chunk in chunks(plan, plan.params) if chunk.param.key == UP]
    rows = pieces(plan, whole)
    assert whole.rows is None and len(rows) > 0
    assert [row for first, last in rows for row in range(first, last)] == list(range(8500))
