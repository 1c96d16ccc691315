"""All models at once give the bytes of one after the other; what is hashed while it is written has its digest."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfmerge.checkpoint.delta import DeltaReader, full_delta
from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.layout import Origin
from hfmerge.checkpoint.write_digests import Trail
from hfmerge.checkpoint.writer import SafetensorsWriter, Slot
from hfmerge.engine import batched_sum
from hfmerge.engine.batched_sum import ROW, Term, ThreadBuffers, merge_rows
from hfmerge.methods import AdditiveFold, Carry
from hfmerge.methods.linear import Linear, TaskArithmetic
from hfmerge.task_vector import Dense, squared_norm
from tests.fixtures import tiny


NAME = "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    return tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), folder)


def normal(seed: int, size: int, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def readers(model: Path, folder: Path, values: Sequence[Tensor]) -> list[DeltaReader]:
    """Models that hold these values, in files of their own."""
    found = []
    for i, value in enumerate(values):
        own = folder / f"m{i}"
        own.mkdir()
        (own / "config.json").write_bytes((model / "config.json").read_bytes())
        save_file({NAME: value}, own / "model.safetensors", metadata={"format": "pt"})
        found.append(DeltaReader(full_delta(describe(str(own)), {NAME: Origin((NAME,))}, {}, ())))
    return found


def terms(models: Sequence[DeltaReader], weights: Sequence[float]) -> list[Term]:
    return [Term(model, NAME, weight) for model, weight in zip(models, weights, strict=True)]


def one_by_one(
    method: AdditiveFold, base: Tensor, values: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, list[float]]:
    """Sum, read-out and squared norms as the protocol of methods gives them."""
    carry: Carry | None = None
    squares = []
    for value, weight in zip(values, weights, strict=True):
        tau = Dense(value.float() - base)
        squares.append(squared_norm(tau.value))
        carry = method.step(carry, tau, weight, matrix=False)
    assert carry is not None
    return carry["S"].to_dense(), method.emit(carry, weights, matrix=False).to_dense(), squares


def bits(value: Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()


DTYPES = {
    "bfloat16": (torch.bfloat16,) * 4,
    "float32": (torch.float32,) * 4,
    "mixed": (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16),
    "one": (torch.bfloat16,),
    "many": (torch.float16,) * 17,
}


@pytest.mark.parametrize("weights", [1.0, 0.3, None], ids=["one", "equal", "various"])
@pytest.mark.parametrize("size", [1, 1023, 5 * ROW, 70 * ROW + 13])
@pytest.mark.parametrize("title", DTYPES)
def test_the_bytes_of_one_after_the_other(
    title: str, size: int, weights: float | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With zeros of both signs, values below the grid's step, and read in several spans of several pieces."""
    monkeypatch.setattr(batched_sum, "PIECE", 32 * ROW)
    base = normal(0, size).to(torch.bfloat16).float()
    base[::7] = -0.0
    base[3::11] = 1e-13
    values = [(base + normal(i, size, 0.001)).to(dtype) for i, dtype in enumerate(DTYPES[title], 1)]
    for value in values:
        value[::5], value[1::13] = 0.0, -0.0
        value[3::11] = base[3::11].to(value.dtype)
    factors = [weights or (0.7, -1.3, 1.0, 0.1)[i % 4] for i in range(len(values))]
    for method in (Linear(), TaskArithmetic(scale=0.3), Linear(sums="float32")):
        found = merge_rows(
            method, terms(readers(model, _new(tmp_path), values), factors), base, 0, ThreadBuffers(),
            dtype=torch.float64, keep=True,
        )  # fmt: skip
        total, change, squares = one_by_one(method, base, values, factors)
        if math.fsum(abs(f) * math.sqrt(square) for f, square in zip(factors, squares, strict=True)) > method.limit:
            assert found is None and method.sums == "float32"
            continue
        assert found is not None and found.sum is not None
        assert bits(found.sum.to(total.dtype)) == bits(total) and bits(found.change) == bits(change)
        assert found.squares == squares


def _new(folder: Path) -> Path:
    own = folder / f"models-{len(list(folder.iterdir()))}"
    own.mkdir()
    return own


@pytest.mark.parametrize("value", [20000.0, math.inf, math.nan])
def test_what_may_not_fit_is_looked_at_one_by_one(value: float, model: Path, tmp_path: Path) -> None:
    base, values = torch.zeros(2 * ROW), [normal(i, 2 * ROW) for i in range(2)]
    values[1][7] = value
    found = merge_rows(
        Linear(), terms(readers(model, tmp_path, values), (0.5, 0.5)), base, 0, ThreadBuffers(),
        dtype=torch.float32, keep=False,
    )  # fmt: skip
    assert found is None


def test_rows_in_the_middle_of_a_tensor(model: Path, tmp_path: Path) -> None:
    base, values = normal(0, 4 * ROW), [normal(i, 4 * ROW) for i in (1, 2)]
    part = slice(ROW + 5, 3 * ROW)
    found = merge_rows(
        Linear(), terms(readers(model, tmp_path, values), (1.0, 1.0)), base[part], part.start, ThreadBuffers(),
        dtype=torch.float64, keep=False,
    )  # fmt: skip
    assert found is not None and found.sum is None
    assert bits(found.change) == bits(one_by_one(Linear(), base[part], [v[part] for v in values], (1.0, 1.0))[1])


@pytest.mark.slow
def test_a_merge_at_once_equals_one_by_one(tmp_path: Path) -> None:
    """`add` goes on from a state, model by model; a merge of all takes them together."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        tiny.save(tiny.fine_tune(base, i) if i else base, tmp_path / name)
    call = ("--base", tmp_path / "base", "--method", "linear", "--dtype", "bfloat16", "--quiet", "--output")
    tiny.done("merge", *(tmp_path / f"m{i}" for i in (1, 2, 3)), *call, tmp_path / "all")
    tiny.done("merge", tmp_path / "m1", *call, tmp_path / "grown")
    for i in (2, 3):
        tiny.done("add", tmp_path / "grown", tmp_path / f"m{i}", "--quiet")
    assert tiny.files(tmp_path / "all") == tiny.files(tmp_path / "grown")
    assert load_file(tmp_path / "all" / "model.safetensors")[NAME].dtype == torch.bfloat16


@pytest.fixture
def writer(tmp_path: Path) -> SafetensorsWriter:
    slots = {name: Slot("F32", (1000, 10)) for name in "abcd"} | {"none": Slot("F32", (0, 3))}
    return SafetensorsWriter(tmp_path / "w.safetensors", slots)


def fill(writer: SafetensorsWriter, names: str) -> None:
    for name in names:
        writer.write(name, torch.full((500, 10), float(ord(name))), 500)
        writer.write(name, torch.full((500, 10), float(ord(name))), 0)


@pytest.mark.parametrize("order", ["abcd", "dcba", "cadb"])
def test_a_trail_follows_tensors_in_any_order(writer: SafetensorsWriter, order: str) -> None:
    with Trail({"w": writer}) as trail:
        fill(writer, order)
        found = trail.digests()
    writer.close()
    assert found == {"w": hashlib.sha256(writer.path.read_bytes()).hexdigest()}


def test_a_trail_of_a_run_that_fails_ends(writer: SafetensorsWriter) -> None:
    with pytest.raises(RuntimeError, match="of the run"), Trail({"w": writer}):
        fill(writer, "ab")
        raise RuntimeError("of the run")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hfmerge-trail")]
    writer.close(complete=False)


def fails_after(real: Callable[..., int], path: str, count: int) -> Callable[..., int]:
    """`os.preadv` that the disk of one file ends after some reads."""
    left = iter(range(count))

    def preadv(fd: int, *rest: object) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == path and next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    return preadv


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from Linux")
@pytest.mark.parametrize("method", ["linear", "opcm", "ties"])
@pytest.mark.parametrize("name", ["base", "m1"])
def test_a_disk_that_fails_in_the_middle_of_a_file(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    for i, each in enumerate(("base", "m1", "m2")):
        tiny.save(tiny.fine_tune(base, i) if i else base, tmp_path / each)
    broken = str((tmp_path / name / "model.safetensors").resolve())
    monkeypatch.setattr(os, "preadv", fails_after(os.preadv, broken, 4))
    models = [tmp_path / "m1", tmp_path / "m2"]
    run = tiny.cli("merge", *models, "--base", tmp_path / "base", "--method", method, "--output", tmp_path / "out")
    assert run.code == 1 and "Traceback" not in run.err
    (told,) = [line for line in run.err.splitlines() if line.startswith("hfmerge: ")]
    assert f"/{name}: model.safetensors: " in told and told.endswith(" cannot be read: Input/output error.")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "m1", "m2"}
