"""Spectral methods on an accelerator, pretended where there is none: what goes there, what comes back, what stays.

The last test runs on a real one, and is skipped without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hfmerge.engine.device import device_for
from hfmerge.errors import HfMergeError
from tests.fixtures import launching, tiny
from tests.fixtures.pretended import CODE, ON, beside


pytestmark = pytest.mark.slow
FLAGS = {
    "code": ("--method", "opcm", "--state", "all"),
    "paper": ("--method", "opcm", "--option", "variant=paper", "--norm", "none"),
    "randomized": ("--method", "opcm", "--option", "spectral=randomized"),
    "gram": ("--method", "gram", "--norm", "mean"),
    "iso_c": ("--method", "iso_c"),
    "mdm_oc_iso": ("--method", "mdm_oc_iso"),
}
FINGERPRINT = 60
"""Allocations that suffice for the fingerprint of the device's arithmetic, the first work that is done there."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in (1, 2, 3):
        tiny.save(tiny.fine_tune(base, i), root / f"m{i}")
    tiny.adapter(root / "a0", tiny.attention(), 1, rank=2)
    # large enough for a sketch
    wide = tiny.build("LlamaForCausalLM", tiny.config("llama", hidden_size=256, intermediate_size=272))
    tiny.save(wide, root / "wide-base")
    for i in (1, 2, 3):
        tiny.save(tiny.fine_tune(wide, i), root / f"wide-m{i}")
    return root


def merge(root: Path, out: Path, *flags: object, wide: bool = False) -> list[str]:
    names = [f"{'wide-' * wide}{name}" for name in ("m1", "m2", "base")]
    models = [str(root / name) for name in names[:2]]
    return ["merge", *models, "--base", str(root / names[2]), "--output", str(out), "--quiet", *map(str, flags)]


def life(root: Path, out: Path, title: str, *flags: object) -> list[list[str]]:
    """A merge, one model more, one less."""
    wide = title == "randomized"
    new, old = (root / f"{'wide-' * wide}m{i}" for i in (3, 1))
    calls = [
        merge(root, out, *FLAGS[title], *flags, wide=wide),
        ["add", str(out), str(new), "--quiet", *map(str, flags)],
        ["unmerge", str(out), "--remove", str(old), "--quiet", *map(str, flags)],
    ]
    if not wide:
        calls.insert(1, ["add", str(out), str(root / "a0"), "--quiet", *map(str, flags)])
    return calls


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "merge_history").glob("*.json"))]


def close(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("title", FLAGS)
def test_it_computes_there_what_the_cpu_would(root: Path, tmp_path: Path, title: str) -> None:
    run, saw = beside(tmp_path, life(root, tmp_path / "there", title, *ON))
    assert run.code == 0, run.err
    for call in life(root, tmp_path / "here", title):
        tiny.done(*call)
    if title == "randomized":
        # float32 products of transposed matrices are not rounded alike in both
        close(tmp_path / "there", tmp_path / "here")
    else:
        assert tiny.files(tmp_path / "there") == tiny.files(tmp_path / "here")
    # matrices are taken apart there, and nowhere else
    kernels = {"gram": "aten::linalg_cholesky_ex", "randomized": "aten::linalg_qr"}
    kernel = kernels.get(title, "aten::_linalg_eigh")
    assert saw["done"][kernel] > 4 and saw["together"][kernel] > 20, "those of equal shape in one call"
    assert saw["left"] == 0 < saw["most"], "all memory is given back"
    assert saw["places"] == ["pretend:0"]
    assert saw["precisions"] == ["highest"] and saw["after"] == "high", "no TF32, and only for the time of a run"
    assert {entry["environment"]["device"] for entry in entries(tmp_path / "there")} == {"Pretended 1"}
    assert {entry["environment"]["device"] for entry in entries(tmp_path / "here")} == {"cpu"}


def test_replay_asks_for_bytes_of_the_same_device_only(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run, _ = beside(tmp_path, [merge(root, out, *FLAGS["code"], *ON)])
    assert run.code == 0, run.err

    def turn_one_bit(tensors: dict[str, torch.Tensor]) -> None:
        value = tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32)
        value[0, 0] ^= 1

    # as another device might have made it, with a ledger that says so
    tiny.edit(out, turn_one_bit)
    [path] = (out / "merge_history").glob("*.json")
    entry = json.loads(path.read_text())
    entry["products"]["model.safetensors"] = tiny.files(out)["model.safetensors"]

    def replay(run: tiny.Run) -> dict[str, Any]:
        return next(check for check in run.json["checks"] if check["what"] == "replay")

    # the pretended device computes as the CPU does: its name alone is no reason for other bytes
    path.write_text(json.dumps(entry, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    there, _ = beside(tmp_path, [["verify", str(out), "--replay", *ON, "--json"]])
    for check in map(replay, (there, tiny.cli("verify", out, "--replay", "--json"))):
        assert check["verdict"] == "failed" and "the replay gives model.safetensors other bytes" in check["detail"]
    entry["environment"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(entry, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    off = replay(tiny.cli("verify", out, "--replay", "--json"))
    assert off["verdict"] == "approximate" and "device Pretended 1, here cpu" in off["detail"]


def test_a_matrix_larger_than_the_device_is_computed_on_the_cpu(root: Path, tmp_path: Path) -> None:
    # attention has matrices of 16 x 16, which fit; what is larger does not
    run, saw = beside(tmp_path, [merge(root, tmp_path / "there", *FLAGS["code"], *ON)], memory=80_000)
    assert run.code == 0, run.err
    tiny.done(*merge(root, tmp_path / "here", *FLAGS["code"]))
    assert tiny.files(tmp_path / "there") == tiny.files(tmp_path / "here")
    said = [line for line in run.err.splitlines() if "computed on the CPU" in line]
    assert said and all("one matrix has 0.00 GB of Pretended 1" in line for line in said), run.err
    assert saw["done"]["aten::_linalg_eigh"] > 3, "the smaller ones are computed there, and not the fingerprint alone"
    # the same on every run of such a device
    assert entries(tmp_path / "there")[0]["environment"]["device"] == "Pretended 1"


def test_a_device_that_others_fill_is_done_without_and_the_ledger_says_so(root: Path, tmp_path: Path) -> None:
    run, _ = beside(tmp_path, [merge(root, tmp_path / "there", *FLAGS["code"], *ON)], free=12_000)
    assert run.code == 0, run.err
    tiny.done(*merge(root, tmp_path / "here", *FLAGS["code"]))
    assert tiny.files(tmp_path / "there") == tiny.files(tmp_path / "here")
    assert "found no room in the memory of Pretended 1; computed on the CPU." in run.err
    assert entries(tmp_path / "there")[0]["environment"]["device"] == "Pretended 1, in part cpu"


def test_that_is_known_after_the_process_was_killed(root: Path, tmp_path: Path) -> None:
    call = merge(root, tmp_path / "there", *FLAGS["code"], *ON)
    # the fingerprint of its arithmetic still finds room
    _, saw = beside(tmp_path, [merge(root, tmp_path / "whole", *FLAGS["code"], *ON)], free=4_000, late=FINGERPRINT)
    run, _ = beside(tmp_path, [call], free=4_000, late=FINGERPRINT, die=(saw["times"] + FINGERPRINT) // 2)
    assert run.code == -9 and "found no room" in run.err
    run, _ = beside(tmp_path, [call])
    assert run.code == 0 and "resuming" in run.err and "found no room" not in run.err
    assert entries(tmp_path / "there")[0]["environment"]["device"] == "Pretended 1, in part cpu"
    tiny.done(*merge(root, tmp_path / "here", *FLAGS["code"]))
    assert tiny.files(tmp_path / "there") == tiny.files(tmp_path / "here")


def test_another_device_is_other_work(root: Path, tmp_path: Path) -> None:
    run, _ = beside(tmp_path, [merge(root, tmp_path / "out", *FLAGS["code"], *ON)], die=300)
    assert run.code == -9
    run = tiny.cli(*merge(root, tmp_path / "out", *FLAGS["code"], "--resume"))
    assert run.code == 1 and "environment" in run.err


def test_going_on_where_other_arithmetic_began_is_said(root: Path, tmp_path: Path) -> None:
    said = "the kept state was made with device cpu, here Pretended 1"
    for method, told in (("opcm", True), ("linear", False)):
        out = tmp_path / method
        here = tiny.done(*merge(root, out, "--method", method), "--state", "all")
        run, _ = beside(tmp_path, [["add", str(out), str(root / "m3"), "--quiet", *ON]])
        assert run.code == 0 and (said in run.err) is told, run.err
        again = tiny.done("unmerge", out, "--remove", root / "m3", "--quiet")
        assert "the kept state was made" not in here.err + again.err


def test_what_goes_into_one_call_does_not_depend_on_processes_or_on_a_kill(root: Path, tmp_path: Path) -> None:
    """On a device whose results show it."""
    run, saw = beside(tmp_path, [merge(root, tmp_path / "plain", *FLAGS["code"], *ON)], company=1)
    assert run.code == 0 and saw["together"]["aten::_linalg_eigh"] > 10
    tiny.done(*merge(root, tmp_path / "here", *FLAGS["code"]))
    assert tiny.files(tmp_path / "plain") != tiny.files(tmp_path / "here"), "the device does not show it"
    killed = merge(root, tmp_path / "killed", *FLAGS["code"], *ON)
    run, _ = beside(tmp_path, [killed], company=1, die=600)
    assert run.code == -9, run.err
    [journal] = tmp_path.glob(".killed.hfmerge-journal/*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"model.layers.0.mlp.down_proj.weight"' not in line]
    assert len(kept) < len(lines)
    # of two matrices in one call one was not finished
    journal.write_bytes(b"".join(kept))
    run, _ = beside(tmp_path, [killed], company=1)
    assert run.code == 0 and "resuming" in run.err
    calls = [merge(root, tmp_path / "two", *FLAGS["code"], *ON)]
    launching.succeed(launching.crew(2, "-c", CODE, str(tmp_path / "of-two"), "company=1", "--", json.dumps(calls)))
    for name in ("killed", "two"):
        assert tiny.files(tmp_path / name) == tiny.files(tmp_path / "plain"), name


def test_each_process_of_a_machine_takes_its_own(root: Path, tmp_path: Path) -> None:
    calls = [merge(root, tmp_path / "there", *FLAGS["code"], *ON)]
    launching.succeed(launching.crew(2, "-c", CODE, str(tmp_path / "report"), "--", json.dumps(calls)))
    saw = [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in (0, 1)]
    assert [each["places"] for each in saw] == [["pretend:0"], ["pretend:1"]]
    tiny.done(*merge(root, tmp_path / "here", *FLAGS["code"]))
    assert tiny.files(tmp_path / "there") == tiny.files(tmp_path / "here")


def test_what_is_bound_by_reading_stays_on_the_cpu(root: Path, tmp_path: Path) -> None:
    run, saw = beside(tmp_path, [merge(root, tmp_path / "out", "--method", "ties", *ON)])
    assert run.code == 0 and "bound by reading and writing" in run.err
    assert "aten::mm" not in saw["done"]
    assert entries(tmp_path / "out")[0]["environment"]["device"] == "cpu"


@pytest.mark.parametrize("device", ["cuda:7", "mps", "nonsense", "meta", "cpu:0:1"])
def test_a_device_that_cannot_is_refused_before_anything_is_read(root: Path, tmp_path: Path, device: str) -> None:
    run = tiny.cli(*merge(root, tmp_path / "out", *FLAGS["code"], "--device", device))
    assert run.code == 1 and f"--device {device}: " in run.err and "leave it out" in run.err
    assert len(run.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_auto_without_an_accelerator_is_the_cpu() -> None:
    assert device_for("auto", spectral=True).place == "cpu"
    assert device_for(None, spectral=True).name == "cpu"
    with pytest.raises(HfMergeError, match="`device='cuda'`: "):
        device_for("cuda", spectral=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("title", FLAGS)
def test_cuda_gives_the_cpu_s_weights_but_for_round_off(root: Path, tmp_path: Path, title: str) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    calls = zip(life(root, there, title, "--device", "cuda"), life(root, here, title), strict=True)
    for one, other in calls:
        tiny.done(*one)
        tiny.done(*other)
    close(there, here)
    assert entries(there)[0]["environment"]["device"] == torch.cuda.get_device_name()
    again = tiny.done("verify", there, "--replay", "--device", "cuda")
    assert "files with the same bytes" in again.out
