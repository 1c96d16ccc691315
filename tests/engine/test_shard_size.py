"""`out_shard_size`: the output in files of another size than the base's, with all that holds of any merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import hfmerge
from hfmerge.checkpoint.headers import read_header
from hfmerge.checkpoint.writer import Slot, split_slots
from hfmerge.recipe.values import shard_size
from tests.fixtures import tiny


SIZE = 5_000
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in one file, the same in two, and two tunes of it."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", tie_word_embeddings=True))
    tiny.save(base, root / "base")
    tiny.save(base, root / "sharded" / "base", max_shard_size="8KB")
    for i, name in enumerate(("a", "b"), 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    return root


def merge(root: Path, out: Path, *flags: object, base: str = "base") -> Path:
    given = ("--method", "opcm", "--state", "all", "--output", out)
    tiny.done("merge", root / "a", root / "b", "--base", root / base, *given, *flags)
    return out


def shards(folder: Path) -> dict[str, list[str]]:
    """Weight file -> its tensors, as the headers and the index say alike."""
    files = sorted(folder.glob("*.safetensors"))
    held = {file.name: list(read_header(file, file.name).entries) for file in files}
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == {key: file for file, keys in held.items() for key in keys}
    sizes = [entry.nbytes for file in files for entry in read_header(file, file.name).entries.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    return held


@pytest.mark.slow
@pytest.mark.parametrize("base", ["base", "sharded/base"])
def test_files_have_the_size_that_is_asked_for(root: Path, base: str, tmp_path: Path) -> None:
    plain = merge(root, tmp_path / "plain", base=base)
    out = merge(root, tmp_path / "out", "--out-shard-size", "5KB", base=base)
    held = shards(out)
    assert len(held) > 2
    for file, keys in held.items():
        size = sum(entry.nbytes for entry in read_header(out / file, file).entries.values())
        assert size <= SIZE or len(keys) == 1
    wanted, found = tiny.tensors(plain), tiny.tensors(out)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    model, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, found["model.embed_tokens.weight"])
    tiny.done("verify", out, "--replay")
    entry = json.loads((out / "merge_history" / "0001.json").read_text())
    assert entry["settings"]["out_shard_size"] == SIZE
    assert "out_shard_size" not in json.loads((plain / "merge_history" / "0001.json").read_text())["settings"]


@pytest.mark.slow
def test_a_change_keeps_the_files(root: Path, tmp_path: Path) -> None:
    whole = merge(root, tmp_path / "whole", "--out-shard-size", SIZE)
    tiny.done("unmerge", whole, "--remove", "b", "--output", tmp_path / "less")
    given = ("--method", "opcm", "--state", "all", "--out-shard-size", "5 kB", "--output", tmp_path / "alone")
    tiny.done("merge", root / "a", "--base", root / "base", *given)
    weights = {name: sha for name, sha in tiny.files(tmp_path / "less").items() if name.startswith("model")}
    assert weights == {name: sha for name, sha in tiny.files(tmp_path / "alone").items() if name.startswith("model")}
    assert shards(tmp_path / "less") == shards(whole)
    tiny.done("add", tmp_path / "less", root / "b", "--output", tmp_path / "again")
    again = tiny.files(tmp_path / "again")
    assert all(again[name] == sha for name, sha in tiny.files(whole).items() if name.startswith("model"))


@pytest.mark.slow
def test_files_are_joined_as_well(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", "--out-shard-size", "1GB", base="sharded/base")
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
    tiny.done("verify", out, "--replay")


def test_the_plan_knows_the_files(root: Path) -> None:
    plan = hfmerge.plan(base=root / "base", models=[root / "a"], method="linear", out_shard_size="5KB")
    files = plan.slots()
    count = len(files)
    assert count > 2 and list(files) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert plan.estimate.output == sum(slot.nbytes for slots in files.values() for slot in slots.values())


def test_too_many_files_are_refused_early(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfmerge.engine.planner.MOST_SHARDS", 5)
    run = tiny.cli("plan", root / "a", "--base", root / "base", "--method", "linear", "--out-shard-size", "100")
    assert run.code == 1 and "a model may have 5; choose more than" in run.err
    least = run.err.rpartition("more than ")[2].split()[0]
    command = ("plan", root / "a", "--base", root / "base", "--method", "linear", "--out-shard-size")
    assert tiny.cli(*command, int(least) * 2).code == 0


def test_files_are_divided_as_save_pretrained_divides_them() -> None:
    slots = {name: Slot("F32", (n,)) for name, n in (("a", 10), ("b", 20), ("c", 200), ("d", 1), ("e", 0))}
    one, two, three = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert split_slots(slots, 100) == {"a": one, "c": two, "b": three, "d": three, "e": three}
    assert split_slots(slots, 10_000) == dict.fromkeys("abcde", "model.safetensors")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7, 7), ("200KB", 200_000)])
def test_sizes(text: str | int, size: int) -> None:
    assert shard_size(text) == size


@pytest.mark.parametrize("value", ["5", "GB", "-1GB", "0GB", 0, -5, True, 1.5, "5GiB", "1e9GB", "infGB", None, 2**70])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match='must be a size such as "5GB"'):
        shard_size(value)
