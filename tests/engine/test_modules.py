"""Weights of the sentence-transformers modules that modules.json names are merged like those of the model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures import tiny


DENSE = "2_Dense/model.safetensors"


def embedder(folder: Path, seed: int, *, width: int = 8, sharded: bool = False) -> Path:
    """A sentence-transformers folder: encoder, pooling, and a dense layer with weights."""
    base = tiny.build("BertModel", tiny.config("bert"))
    model = tiny.fine_tune(base, seed) if seed else base
    tiny.save(model, folder, **({"max_shard_size": "8KB"} if sharded else {}))
    names = ("", "1_Pooling", "2_Dense")
    types = ("Transformer", "Pooling", "Dense")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(names, types, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, said in {"1_Pooling": {"pooling_mode_mean_tokens": True}, "2_Dense": {"out_features": width}}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(said))
    generator = torch.Generator().manual_seed(seed)
    dense = {"linear.weight": torch.randn(width, 16, generator=generator), "linear.bias": torch.ones(width) * seed}
    save_file(dense, folder / DENSE)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedders")
    for seed, name in enumerate(("base", "a", "b")):
        embedder(root / name, seed)
    return root


def merge(out: Path, base: Path, *models: Path, method: str = "linear", flags: tuple[str, ...] = ()) -> tiny.Run:
    return tiny.done("merge", *models, "--base", base, "--method", method, "--output", out, *flags)


def dense(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / DENSE)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_module_is_merged_like_any_matrix(root: Path, tmp_path: Path, sharded: bool) -> None:
    base = embedder(tmp_path / "base", 0, sharded=sharded)
    merge(tmp_path / "out", base, root / "a", root / "b")
    ours = dense(tmp_path / "out")
    for name, value in ours.items():
        assert torch.allclose(value, (dense(root / "a")[name] + dense(root / "b")[name]) / 2, atol=1e-6)
    assert ours.keys() == dense(base).keys()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == sharded
    assert not sharded or not any("2_Dense" in key for key in json.loads(index.read_text())["weight_map"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opcm", "task_arithmetic", "ties"])
def test_a_removal_is_exact_in_modules_too(root: Path, tmp_path: Path, method: str) -> None:
    flags = ("--state", "all", "--keep-sources")
    merge(tmp_path / "whole", root / "base", root / "a", root / "b", method=method, flags=flags)
    merge(tmp_path / "never", root / "base", root / "a", method=method, flags=flags)
    tiny.done("unmerge", tmp_path / "whole", "--remove", "b", "--output", tmp_path / "left")
    assert dense(tmp_path / "left").keys() == dense(tmp_path / "never").keys()
    for folder in ("left", "never"):
        tiny.done("verify", tmp_path / folder, "--replay")
    left, never = (tiny.files(tmp_path / folder, states=False) for folder in ("left", "never"))
    assert left == never and DENSE in left


def test_a_module_of_another_shape_is_kept_beside_the_merge(root: Path, tmp_path: Path) -> None:
    wide = embedder(tmp_path / "wide", 3, width=12)
    merge(tmp_path / "out", root / "base", root / "a", wide)
    half = (dense(root / "a")["linear.bias"] + dense(root / "base")["linear.bias"]) / 2
    assert torch.allclose(dense(tmp_path / "out")["linear.bias"], half)
    kept = load_file(tmp_path / "out" / "heads" / "wide" / "model.safetensors")
    assert torch.equal(kept["2_Dense/linear.weight"], dense(wide)["linear.weight"])


def test_a_model_without_the_module_is_said_to_lack_it(root: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(root / "a", plain)
    shutil.rmtree(plain / "2_Dense")
    (plain / "modules.json").unlink()
    run = merge(tmp_path / "out", root / "base", plain)
    assert "has no 2_Dense/linear" in run.err
    assert torch.equal(dense(tmp_path / "out")["linear.weight"], dense(root / "base")["linear.weight"])


def test_a_pickled_module_needs_consent_and_becomes_safetensors(root: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    torch.save(dense(base), base / "2_Dense" / "pytorch_model.bin")
    (base / DENSE).unlink()
    arguments = ("merge", root / "a", "--base", base, "--method", "linear", "--output", tmp_path / "out")
    run = tiny.cli(*arguments)
    assert run.code == 1 and "modules.json names 2_Dense, whose weights are pickled" in run.err
    tiny.done(*arguments, "--allow-pickle")
    assert torch.allclose(dense(tmp_path / "out")["linear.weight"], dense(root / "a")["linear.weight"], atol=1e-6)
    assert not (tmp_path / "out" / "2_Dense" / "pytorch_model.bin").exists()
