"""Weight files: written to the bytes of safetensors itself, read in parts, and every way in which they break."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from hfmerge import merge
from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.reader import Reader
from hfmerge.checkpoint.writer import TORCH_NAMES, SafetensorsWriter, Slot, header_bytes, shard_names, write_index
from hfmerge.errors import CorruptFileError, HfMergeError, NonFiniteError, OutputError, RecipeError, UnsupportedError
from hfmerge.recipe.recipe import parse_recipe
from tests.fixtures import tiny


quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SHORT = {f"torch.{name}": short for short, name in TORCH_NAMES.items()}
NAMES = [
    "b.weight",
    "a.weight",
    "ä.ñ.重み",
    'quote"back\\slash',
    "line\nbreak\ttab\x01\x1f\x7f",
    "😀",
    "é",
    "e\u0301",
    "",
]


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bytes of a safetensors dtype."""
    numbers = random.Random(seed)
    kind = getattr(torch, TORCH_NAMES[dtype])
    if kind == torch.bool:
        size = torch.Size(shape).numel()
        return torch.tensor([numbers.random() < 0.5 for _ in range(size)], dtype=kind).reshape(shape)
    empty = torch.empty(shape, dtype=kind)
    raw = numbers.randbytes(empty.numel() * empty.element_size())
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if raw else empty


def slots_of(tensors: dict[str, Tensor]) -> dict[str, Slot]:
    return {name: Slot(SHORT[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()}


def written(path: Path, tensors: dict[str, Tensor], order: list[str], metadata: dict[str, str] | None = None) -> bytes:
    writer = SafetensorsWriter(path, slots_of(tensors), metadata)
    for name in order:
        writer.write(name, tensors[name])
    writer.close()
    return path.read_bytes()


# Writing


@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_each_dtype_has_the_bytes_of_safetensors(tmp_path: Path, dtype: str) -> None:
    shapes = [(), (0,), (3,), (2, 0, 4), (2, 3), (5, 1, 2)]
    tensors = {f"t{i}": random_tensor(dtype, shape, i) for i, shape in enumerate(shapes)}
    expected = save(tensors, {"format": "pt"})
    assert written(tmp_path / "a", tensors, list(tensors)) == expected
    assert written(tmp_path / "b", tensors, list(tensors)[::-1]) == expected
    assert written(tmp_path / "c", tensors, list(tensors), {}) == save(tensors)


def test_mixed_dtypes_and_odd_names_have_the_bytes_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        f"{name}{dtype}": random_tensor(dtype, (i, 3), i) for i, name in enumerate(NAMES) for dtype in TORCH_NAMES
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    order = list(tensors)
    random.Random(0).shuffle(order)
    assert written(tmp_path / "ours", tensors, order) == (tmp_path / "theirs").read_bytes()
    again = load_file(tmp_path / "ours")
    assert again.keys() == tensors.keys()


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@pytest.mark.slow
@quick
@given(
    held=st.dictionaries(text, st.tuples(st.sampled_from(list(TORCH_NAMES)), shapes), min_size=0, max_size=8),
    data=st.data(),
)
def test_any_file_has_the_bytes_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(held.items())}
    order = data.draw(st.permutations(list(tensors)))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    assert written(path, tensors, order) == save(tensors, {"format": "pt"})


def test_offsets_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
    header, offsets = header_bytes(slots_of(tensors), {"format": "pt"})
    data = written(tmp_path / "x", tensors, ["a", "b"])
    assert data.startswith(header) and len(header) % 8 == 0
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        assert data[offsets[name] : offsets[name] + len(raw)] == raw


def test_what_does_not_fit_a_slot_is_refused(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": Slot("F32", (4, 3)), "b": Slot("F32", (2,))})
    for tensor, row in (
        (torch.zeros(3, 4), None),
        (torch.zeros(4, 3, dtype=torch.float16), None),
        (torch.zeros(2, 3), None),
        (torch.zeros(2, 2), 0),
        (torch.zeros(2, 3), 3),
        (torch.zeros(5, 3), 0),
    ):
        with pytest.raises(ValueError, match="a: "):
            writer.write("a", tensor, row)
    with pytest.raises(KeyError):
        writer.write("c", torch.zeros(2))
    writer.close(complete=False)


def test_a_file_is_complete_only_when_every_slot_was_written_once(tmp_path: Path) -> None:
    slots = {"a": Slot("F32", (4, 3)), "b": Slot("BF16", (2,)), "empty": Slot("F32", (0, 5))}

    def filled(*steps: tuple[str, Tensor, int | None]) -> SafetensorsWriter:
        writer = SafetensorsWriter(tmp_path / "x", slots)
        for name, tensor, row in steps:
            writer.write(name, tensor, row)
        return writer

    b = ("b", torch.zeros(2, dtype=torch.bfloat16), None)
    for steps in (
        [],
        [b],
        [("a", torch.zeros(4, 3), None)],
        [b, ("a", torch.zeros(3, 3), 0)],
        [b, b, ("a", torch.zeros(4, 3), None)],
    ):
        with pytest.raises(ValueError, match="not written, or not once"):
            filled(*steps).close()
    writer = filled(b, ("a", torch.ones(3, 3), 1), ("a", torch.zeros(1, 3), 0))
    writer.close()
    writer.close()
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.tensor([[0.0] * 3] + [[1.0] * 3] * 3))


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(200, 30, generator=torch.Generator().manual_seed(i)) for i in range(24)}
    writer = SafetensorsWriter(tmp_path / "x", slots_of(tensors))
    steps = [(name, at) for name in tensors for at in range(0, 200, 50)]
    random.Random(1).shuffle(steps)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: writer.write(step[0], tensors[step[0]][step[1] : step[1] + 50], step[1]), steps))
    writer.close()
    assert (tmp_path / "x").read_bytes() == save(tensors, {"format": "pt"})


def test_two_writers_may_share_a_file(tmp_path: Path) -> None:
    """As two processes do: opening the file again leaves alone what the first has written."""
    tensors = {"a": torch.arange(12.0), "b": torch.arange(5.0)}
    (tmp_path / "x").write_bytes(b"something older and longer" * 100)
    first = SafetensorsWriter(tmp_path / "x", slots_of(tensors))
    first.write("a", tensors["a"])
    second = SafetensorsWriter(tmp_path / "x", slots_of(tensors))
    second.write("b", tensors["b"])
    first.close(complete=False)
    second.close(complete=False)
    assert (tmp_path / "x").read_bytes() == save(tensors, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "BOOL", "U16"])
def test_what_was_written_reads_back(tmp_path: Path, dtype: str) -> None:
    shapes = {"m": (6, 5), "v": (7,), "s": (), "z": (0, 3), "t": (4, 2, 3)}
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, shape) in enumerate(shapes.items())}
    writer = SafetensorsWriter(tmp_path / "x", slots_of(tensors))
    for name, tensor in tensors.items():
        writer.write(name, tensor.T.contiguous().T if tensor.dim() == 2 else tensor)
    for name, tensor in tensors.items():
        assert same_bytes(writer.read(name), tensor)
    assert same_bytes(writer.read("m", (2, 5)), tensors["m"][2:5])
    assert same_bytes(writer.read("t", (1, 2)), tensors["t"][1:2])
    os.truncate(tmp_path / "x", 40)
    with pytest.raises(OutputError, match="cannot be read back"):
        writer.read("m")
    writer.close(complete=False)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal down to the payload of NaNs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def test_names_of_shards_and_their_index(tmp_path: Path) -> None:
    assert shard_names(["pytorch_model.bin"]) == {"pytorch_model.bin": "model.safetensors"}
    assert shard_names(["b", "a"]) == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    write_index(tmp_path, {"z": "f2", "ä": "f1"}, 24)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 24}, "weight_map": {"z": "f2", "ä": "f1"}}


# A disk that refuses


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def failing(code: int, after: int = 0) -> Callable[..., Any]:
    """A system call that raises from its `after`-th call on."""
    calls = [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(code, os.strerror(code))
        return arguments[2] if len(arguments) > 2 else len(arguments[1])

    return call


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("posix_fallocate", errno.ENOSPC, "the disk is full; free some space or choose another `output`"),
        ("posix_fallocate", errno.EDQUOT, "the disk is full"),
        ("posix_fallocate", errno.EIO, "cannot be written: Input/output error"),
        ("ftruncate", errno.EFBIG, "cannot be written: File too large"),
        ("pwrite", errno.ENOSPC, "the disk is full"),
        ("open", errno.EACCES, "cannot be written: Permission denied"),
        ("open", errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_file_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(OutputError, match=f"x: {words}") as caught:
            SafetensorsWriter(tmp_path / "x", {"a": Slot("F32", (100,))})
    assert isinstance(caught.value.__cause__, OSError)
    assert open_files() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        SafetensorsWriter(tmp_path / "missing" / "x", {"a": Slot("F32", (1,))})


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_preallocation_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    tensors = {"a": torch.arange(10.0)}
    assert written(tmp_path / "x", tensors, ["a"]) == save(tensors, {"format": "pt"})


@pytest.mark.parametrize(("call", "words"), [("pwrite", "the disk is full"), ("fsync", "the disk is full")])
def test_a_disk_that_fills_up_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, words: str) -> None:
    before = open_files()
    writer = SafetensorsWriter(tmp_path / "x", {"a": Slot("F32", (100,))})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(OutputError, match=words):
            writer.write("a", torch.zeros(100))
            writer.close()
    writer.close(complete=False)
    assert open_files() == before


def test_a_size_limit_of_the_system_shows_before_any_work(tmp_path: Path) -> None:
    with file_size_limit(10_000), pytest.raises(OutputError, match="cannot be written: File too large"):
        SafetensorsWriter(tmp_path / "x", {"a": Slot("F32", (5000,))})


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[: max(1, len(data) // 3)], at))
    tensors = {"a": torch.arange(1000.0)}
    assert written(tmp_path / "x", tensors, ["a"]) == save(tensors, {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert"))
    return [
        tiny.save(base, root / "base"),
        tiny.save(tiny.fine_tune(base, 1), root / "one"),
        tiny.save(tiny.fine_tune(base, 2), root / "two"),
    ]


def merged(folders: list[Path], output: Path, **keys: Any) -> None:
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "opcm", **keys}
    merge(parse_recipe(recipe, "test"), output=output)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3, 30, 70])
def test_a_full_disk_leaves_no_half_written_model(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    held = open_files()
    whole, calls = os.pwrite, [0]

    def filling(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(OutputError, match=r"safetensors: the disk is full|scratch: the disk is full"):
            merged(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.rglob("*") if path.stat().st_size or path.is_dir()] == []
    assert open_files() == held
    merged(models, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_size_limit_leaves_no_half_written_model(models: list[Path], tmp_path: Path) -> None:
    held = open_files()
    with file_size_limit(20_000), pytest.raises(OutputError, match="cannot be written: File too large"):
        merged(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert open_files() == held


# Reading


TENSORS = {
    "m.weight": torch.arange(12.0).reshape(4, 3),
    "m.bias": torch.arange(4.0).to(torch.bfloat16),
    "ids": torch.arange(3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 2),
}


def folder_with(folder: Path, data: bytes | dict[str, Tensor], name: str = "model.safetensors") -> Path:
    """A model folder whose weight file has these bytes or tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / name).write_bytes(data if isinstance(data, bytes) else save(data, {"format": "pt"}))
    return folder


def test_tensors_and_rows_of_them(tmp_path: Path) -> None:
    source = describe(str(folder_with(tmp_path / "m", TENSORS)))
    with Reader(source) as reader:
        for key, tensor in TENSORS.items():
            assert same_bytes(reader.stored(key), tensor)
            assert reader.value(key).dtype == torch.float32
            assert torch.equal(reader.value(key), tensor.float())
        assert torch.equal(reader.stored("m.weight", (1, 3)), TENSORS["m.weight"][1:3])
        assert torch.equal(reader.value("m.bias", (2, 4)), torch.tensor([2.0, 3.0]))
        reader.value("m.weight").zero_()
        assert torch.equal(reader.value("m.weight"), TENSORS["m.weight"])


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((50, 40), float(i)) for i in range(40)}
    source = describe(str(folder_with(tmp_path / "m", tensors)))
    before = open_files()
    with Reader(source) as reader, ThreadPoolExecutor(8) as pool:
        for i, value in enumerate(pool.map(lambda i: reader.value(f"t{i % 40}"), range(400))):
            assert float(value.min()) == float(value.max()) == i % 40
        assert before == 0 or open_files() == before + 1
    assert open_files() == before


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"a": torch.ones(2)}, "x-1.safetensors")
    folder_with(folder, {"b": torch.zeros(3), "unlisted": torch.zeros(1)}, "x-2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "x-2.safetensors", "a": "x-1.safetensors"}}))
    source = describe(str(folder))
    assert sorted(source.tensors) == ["a", "b"]
    with Reader(source) as reader:
        assert torch.equal(reader.value("b"), torch.zeros(3)) and torch.equal(reader.value("a"), torch.ones(2))
    index.write_text(json.dumps({"weight_map": {"lost": "x-1.safetensors"}}))
    with pytest.raises(CorruptFileError, match=r"x-1.safetensors lacks lost, which .*index.json promises"):
        describe(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "x-3.safetensors"}}))
    with pytest.raises(CorruptFileError, match="names x-3.safetensors, which is not there"):
        describe(str(folder))


GOOD = save(TENSORS, {"format": "pt"})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(GOOD[:-1], "truncated", id="one byte short"),
        pytest.param(GOOD[: len(GOOD) // 2], "truncated", id="half"),
        pytest.param(GOOD[:100], "truncated", id="inside the header"),
        pytest.param(GOOD[:5], "truncated", id="inside the length"),
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(GOOD + b"\0", "overlong", id="one byte more"),
        pytest.param(POINTER, "Git-LFS pointer.*git lfs pull", id="pointer"),
        pytest.param(b"<!doctype html><html>Not found</html>" * 20, "not a safetensors file", id="web page"),
        pytest.param(GOOD[:8] + b"[" + GOOD[9:], "broken safetensors header", id="not JSON"),
        pytest.param(GOOD.replace(b'"F32"', b'"F3x"', 1), "F3x", id="unknown dtype"),
        pytest.param(
            GOOD.replace(b"data_offsets", b"data_0ffsets", 1), "broken safetensors header", id="lost offsets"
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    folder = folder_with(tmp_path / "m", data)
    with pytest.raises((CorruptFileError, UnsupportedError), match=words) as caught:
        describe(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    """One flipped bit anywhere in the header: refused, or read as safetensors itself reads it."""
    length = 8 + int.from_bytes(GOOD[:8], "little")
    numbers = random.Random(0)
    for at in range(length):
        data = bytearray(GOOD)
        data[at] ^= 1 << numbers.randrange(8)
        try:
            theirs = load(bytes(data))
        except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError, UnicodeDecodeError):
            theirs = None
        folder = folder_with(tmp_path / "m", bytes(data))
        try:
            source = describe(str(folder))
            with Reader(source) as reader:
                ours = {key: reader.stored(key) for key in source.tensors}
        except HfMergeError:
            continue
        assert theirs is not None, (at, bytes(data[:length]))
        assert ours.keys() == theirs.keys() and all(same_bytes(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "later",
    [
        {"m.weight": torch.zeros(2, 3)},
        {"m.weight": torch.zeros(3, 4)},
        {"m.weight": torch.zeros(4, 3, dtype=torch.float16)},
        {"m.weight": torch.zeros(4, 3, dtype=torch.int32)},
        {"other": torch.zeros(4, 3)},
        GOOD[:-10],
        POINTER,
    ],
    ids=["shape", "transposed", "dtype", "integers", "name", "truncated", "pointer"],
)
def test_a_file_that_changed_since_it_was_described(tmp_path: Path, later: bytes | dict[str, Tensor]) -> None:
    source = describe(str(folder_with(tmp_path / "m", TENSORS)))
    folder_with(tmp_path / "m", later)
    with Reader(source) as reader, pytest.raises(CorruptFileError):
        reader.stored("m.weight")


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    source = describe(str(folder_with(tmp_path / "m", TENSORS)))
    with Reader(source) as reader:
        reader.stored("m.bias")
        os.truncate(tmp_path / "m" / "model.safetensors", len(GOOD) - 60)
        with pytest.raises(CorruptFileError, match="ends before the tensor does"):
            for key in TENSORS:
                reader.stored(key)


def test_a_file_that_is_gone_since_it_was_described(tmp_path: Path) -> None:
    source = describe(str(folder_with(tmp_path / "m", TENSORS)))
    (tmp_path / "m" / "model.safetensors").unlink()
    with Reader(source) as reader, pytest.raises(CorruptFileError, match="model.safetensors cannot be read: No such"):
        reader.stored("m.weight")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read, which Linux has")
def test_a_disk_that_fails_under_way(tmp_path: Path) -> None:
    """The descriptor becomes one whose reads fail with EIO, as those of a broken disk do."""
    source = describe(str(folder_with(tmp_path / "m", TENSORS)))
    with Reader(source) as reader:
        reader.stored("m.bias")
        held = reader._open["model.safetensors"]
        assert not isinstance(held, dict) and isinstance(held.file, int)
        broken = os.open("/proc/self/mem", os.O_RDONLY)
        os.dup2(broken, held.file)
        os.close(broken)
        with pytest.raises(CorruptFileError, match="model.safetensors: m.weight cannot be read: Input/output error"):
            reader.stored("m.weight")


# NaN and Inf


def poisoned(folder: Path, output: Path, key: str, bad: float, file: str = "model.safetensors") -> Path:
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    tiny.edit(output, lambda held: held[key].view(-1)[3:5].fill_(bad), file)
    return output


KEY = "encoder.layer.1.output.dense.weight"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opcm", "linear", "ties"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whose", [0, 2])
def test_nan_and_inf_are_refused_by_name(
    models: list[Path], tmp_path: Path, whose: int, bad: float, method: str
) -> None:
    folders = list(models)
    folders[whose] = poisoned(models[whose], tmp_path / "bad", KEY, bad)
    with pytest.raises(NonFiniteError, match=rf"bad: model.safetensors: {KEY} holds 2 NaN or Inf of 512 values"):
        merged(folders, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nan_is_let_through_where_asked(models: list[Path], tmp_path: Path) -> None:
    folders = [*models[:2], poisoned(models[2], tmp_path / "bad", KEY, float("nan"))]
    merged(folders, tmp_path / "out", method="linear", allow_nonfinite=True)
    out, plain = tiny.tensors(tmp_path / "out"), tiny.tensors(models[1])
    assert int(out[KEY].isnan().sum()) == 2
    assert all(bool(out[key].isfinite().all()) for key in plain if key != KEY)
    with pytest.raises(NonFiniteError, match=f"{KEY} holds NaN or Inf, and opcm cannot take such a matrix apart"):
        merged(folders, tmp_path / "taken apart", method="opcm", allow_nonfinite=True)


@pytest.mark.slow
def test_nan_left_out_is_no_fault(models: list[Path], tmp_path: Path) -> None:
    folders = [*models[:2], poisoned(models[2], tmp_path / "bad", KEY, float("nan"))]
    merged(folders, tmp_path / "out", exclude=[KEY])
    assert torch.equal(tiny.tensors(tmp_path / "out")[KEY], tiny.tensors(models[0])[KEY])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_nan_in_an_adapter_is_refused_by_name(models: list[Path], tmp_path: Path, part: str) -> None:
    plain = tiny.adapter(tmp_path / "plain", {"encoder.layer.0.output.dense": (16, 32)}, 1)
    key = f"base_model.model.encoder.layer.0.output.dense.{part}.weight"
    bad = poisoned(plain, tmp_path / "bad", key, float("nan"), "adapter_model.safetensors")
    for method in ("opcm", "task_arithmetic"):
        with pytest.raises(NonFiniteError, match=f"{key} holds 2 NaN or Inf"):
            merged([models[0], bad], tmp_path / "out", method=method)


def test_values_beyond_the_output_are_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="do not fit float16"):
        merged(models, tmp_path / "out", method={"name": "task_arithmetic", "scale": 1e7}, dtype="float16")


# Pickles


class Payload:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(folder: Path, output: Path, value: Any = None) -> Path:
    output.mkdir()
    (output / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(value if value is not None else tiny.tensors(folder), output / "pytorch_model.bin")
    return output


@pytest.mark.slow
def test_pickled_weights_need_permission(models: list[Path], tmp_path: Path) -> None:
    folders = [pickled(folder, tmp_path / folder.name) for folder in models]
    with pytest.raises(RecipeError, match="only pickled weights.*to safetensors, or pass `allow_pickle=True` if you"):
        merged(folders, tmp_path / "out")
    merged(folders, tmp_path / "out", allow_pickle=True)
    merged(models, tmp_path / "plain")
    out, plain = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "plain")
    assert out.keys() == plain.keys() and all(torch.equal(out[key], plain[key]) for key in out)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin")) == []


@pytest.mark.slow
def test_safetensors_win_over_pickles(models: list[Path], tmp_path: Path) -> None:
    both = pickled(models[1], tmp_path / "one", {"nothing": Payload(tmp_path / "harm")})
    (both / "model.safetensors").write_bytes((models[1] / "model.safetensors").read_bytes())
    merged([models[0], both], tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("where", ["value", "beside"])
def test_malicious_pickles_are_refused_unexecuted(models: list[Path], tmp_path: Path, where: str) -> None:
    harm = tmp_path / "harm"
    value = Payload(harm) if where == "value" else {**tiny.tensors(models[1]), "extra": Payload(harm)}
    bad = pickled(models[1], tmp_path / "bad", value)
    for allow in (False, True):
        with pytest.raises(RecipeError, match="bad: (pytorch_model.bin: cannot be unpickled|only pickled weights)"):
            merged([models[0], bad], tmp_path / "out", allow_pickle=allow)
    assert not harm.exists()
    torch.load(bad / "pytorch_model.bin", weights_only=False)
    assert harm.exists()


@pytest.mark.parametrize("value", [[torch.zeros(2)], {"a": 1.0}, {"state_dict": {"a": torch.zeros(2)}}])
def test_pickles_of_something_else_are_refused(models: list[Path], tmp_path: Path, value: Any) -> None:
    bad = pickled(models[1], tmp_path / "bad", value)
    with pytest.raises(RecipeError, match="not a plain dictionary of tensors"):
        merged([models[0], bad], tmp_path / "out", allow_pickle=True)


def test_a_truncated_pickle_is_refused(models: list[Path], tmp_path: Path) -> None:
    bad = pickled(models[1], tmp_path / "bad")
    os.truncate(bad / "pytorch_model.bin", 3000)
    with pytest.raises(RecipeError, match="cannot be unpickled as plain weights"):
        merged([models[0], bad], tmp_path / "out", allow_pickle=True)
