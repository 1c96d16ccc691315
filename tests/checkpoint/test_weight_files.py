"""Which weight files of a repository are read: those that transformers would load, and no two candidates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hfmerge.checkpoint.describe import describe
from hfmerge.errors import UnsupportedError
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "sharded"
    return tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), folder, max_shard_size="4KB")


def test_a_stray_single_file_beside_shards_is_refused(sharded: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(sharded, both)
    weights = tiny.tensors(sharded)
    save_file({key: torch.zeros_like(value) for key, value in weights.items()}, both / "model.safetensors")
    with pytest.raises(UnsupportedError, match="names other files; transformers would load model.safetensors alone"):
        describe(str(both))
    (both / "model.safetensors").unlink()  # what the message says
    assert describe(str(both)).shapes.keys() == weights.keys()


def test_an_index_of_the_single_file_is_no_second_candidate(sharded: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), one)
    index = {"weight_map": dict.fromkeys(tiny.tensors(one), "model.safetensors")}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {entry.file for entry in describe(str(one)).tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00099.safetensors", "model-Q4_K.gguf"])
def test_files_that_no_index_names_are_not_read(sharded: Path, tmp_path: Path, name: str) -> None:
    more = tmp_path / "more"
    shutil.copytree(sharded, more)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, more / name)
    assert describe(str(more)).shapes == describe(str(sharded)).shapes


def test_shards_without_an_index_name_the_file_that_is_needed(sharded: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(sharded, bare)
    (bare / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UnsupportedError, match=r"7 of 7 shards .* without model.safetensors.index.json, which says what is in which"
    ):
        describe(str(bare))


def test_an_adapter_has_one_weight_file_too(tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", tiny.attention(), 1)
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(UnsupportedError, match="adapter_model.safetensors.index.json, which names other files"):
        describe(str(adapter))
