"""Subtracting a model from a fold that depends on the order: cheap, its gap told, and never called a removal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(4):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    names = [root / f"m{i}" for i in range(4)]
    tiny.done("merge", *names, "--base", root / "base", "--method", "opcm", "--output", root / "all")
    tiny.done("merge", *names[:1], *names[2:], "--base", root / "base", "--method", "opcm", "--output", root / "never")
    return root


def entry(folder: Path, step: int = 2) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_history" / f"{step:04d}.json").read_bytes())
    return found


def distance(a: Path, b: Path) -> float:
    first, second = tiny.tensors(a), tiny.tensors(b)
    return math.sqrt(sum(float((first[name].double() - second[name].double()).square().sum()) for name in first))


@pytest.mark.slow
def test_it_reads_one_model_tells_its_gap_and_can_still_be_removed(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--remove", "m1", "--mode", "subtract", "--measure", "--output", out)
    run = tiny.done("unmerge", root / "all", *flags)
    assert (
        "NOT a removal" in run.out
        and "subtract (step 2)" in run.out
        and "a part of each stays in the weights" in run.out
    )
    told = entry(out)
    assert told["action"]["type"] == "subtract"
    materials = {model["name"]: model for model in told["materials"]["models"]}
    assert list(materials) == ["m0", "m1", "m2", "m3"] and materials["m1"]["subtracted"] is True
    assert [name for name, model in materials.items() if "subtracted" in model] == ["m1"]
    scalars = told["byproducts"]["scalars"]
    true = distance(out, root / "never") / distance(root / "base", root / "never")
    assert scalars["gap"] == pytest.approx(true, rel=1e-4)
    assert 0.01 < scalars["gap"] < scalars["gap_bound"]
    assert "approximately subtracted" in (out / "README.md").read_text()
    assert tiny.done("verify", out, "--replay").code == 0
    # the state is the one of all four models, from which m1 still leaves for good
    assert tiny.states(out) == tiny.states(root / "all")
    tiny.done("unmerge", out, "--remove", "m1")
    assert tiny.files(out) == tiny.files(root / "never")
    assert entry(out, 3)["action"]["type"] == "unmerge"


def test_only_what_leaves_is_read_and_all_are_what_was_merged(root: Path, tmp_path: Path) -> None:
    """The other models' weights are not read again, but a folder that holds another model by now is refused."""
    import shutil

    for name in ("base", "all", "m0", "m1", "m2", "m3"):
        shutil.copytree(root / name, tmp_path / name)
    sources = [part for i in range(4) for part in ("--source", f"m{i}={tmp_path / f'm{i}'}")]
    sources += ["--source", f"base={tmp_path / 'base'}"]
    command = ("unmerge", tmp_path / "all", "--remove", "m1", "--mode", "subtract")
    run = tiny.done(*command, "--output", tmp_path / "out", *sources)
    assert "subtracted from the kept state after model 4" in run.err
    tiny.done("unmerge", root / "all", "--remove", "m1", "--mode", "subtract", "--output", tmp_path / "other")
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "other")
    weights = tmp_path / "m2" / "model.safetensors"
    head = weights.read_bytes()
    length = 8 + int.from_bytes(head[:8], "little")
    weights.write_bytes(head[:length] + bytes(len(head) - length))
    run = tiny.cli(*command, "--output", tmp_path / "more", *sources)
    assert run.code == 1 and "m2@" in run.err and "are not those that were merged" in run.err


@pytest.mark.slow
def test_models_can_be_added_after_a_subtraction(root: Path, tmp_path: Path) -> None:
    flags = ("--base", root / "base", "--method", "opcm")
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", root / "m1", root / "m2", *flags, "--output", out)
    tiny.done("unmerge", out, "--remove", "m1", "--mode", "subtract")
    tiny.done("add", out, root / "m3")
    tiny.done("unmerge", root / "all", "--remove", "m1", "--mode", "subtract", "--output", tmp_path / "other")
    assert tiny.files(out) == tiny.files(tmp_path / "other")
    assert tiny.done("verify", out, "--replay").code == 0


@pytest.mark.slow
def test_the_last_model_leaves_no_trace_in_direction(root: Path, tmp_path: Path) -> None:
    """Nothing was projected off it, so that only what its own projection took away is left of the gap."""
    gaps = {}
    for name in ("m0", "m3"):
        out = tmp_path / name
        tiny.done("unmerge", root / "all", "--remove", name, "--mode", "subtract", "--measure", "--output", out)
        gaps[name] = entry(out)["byproducts"]["scalars"]
    assert gaps["m3"]["gap_bound"] < gaps["m0"]["gap_bound"]
    assert gaps["m3"]["gap"] < gaps["m0"]["gap"]


@pytest.mark.parametrize(
    ("method", "said"),
    [("linear", "a removal is exact at the same cost"), ("ties", "keeps no term of a single model")],
)
def test_other_methods_say_why_not(root: Path, tmp_path: Path, method: str, said: str) -> None:
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", root / "m1", "--base", root / "base", "--method", method, "--output", out)
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "m1", "--mode", "subtract")
    assert run.code == 1 and said in run.err
    assert tiny.everything(out) == before


def test_bad_requests(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", root / "m1", "--base", root / "base", "--method", "opcm", "--output", out)
    tiny.done("unmerge", out, "--remove", "m1", "--mode", "subtract")
    for flags, said in (
        (("--remove", "m1", "--mode", "subtract"), "was subtracted before"),
        (("--remove", "m0", "--mode", "subtract"), "holds no other model"),
        (("--remove", "m9", "--mode", "subtract"), "not in this merge"),
        (("--remove", "m0", "--measure"), "no gap to measure"),
    ):
        run = tiny.cli("unmerge", out, *flags)
        assert run.code == 1 and said in run.err


def test_the_read_out_is_the_state_without_the_model(root: Path, tmp_path: Path) -> None:
    """With `norm: none` the published weights are `base + S - tau`."""
    flags = ("--base", root / "base", "--method", "opcm", "--norm", "none")
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", root / "m1", *flags, "--output", out)
    whole = tiny.tensors(out)
    tiny.done("unmerge", out, "--remove", "m0", "--mode", "subtract")
    base, model, found = tiny.tensors(root / "base"), tiny.tensors(root / "m0"), tiny.tensors(out)
    for name in base:
        torch.testing.assert_close(found[name], whole[name] - (model[name] - base[name]), rtol=1e-5, atol=1e-6)
