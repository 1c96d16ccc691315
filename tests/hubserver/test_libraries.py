"""The libraries people use with the Hub, unchanged: transformers, datasets, fsspec, cards, safetensors headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hubserver.harness import Client, Hub


pytestmark = pytest.mark.slow


def test_transformers(client: Client, hub: Hub) -> None:
    start = len(hub.log())
    client.run("""
import torch
from transformers import BertConfig, BertForSequenceClassification, AutoModelForSequenceClassification, AutoConfig
torch.manual_seed(0)
torch.set_num_threads(1)
config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
model = BertForSequenceClassification(config).eval()
one = model.push_to_hub("acme/tiny", commit_message="whole")
api.create_tag("acme/tiny", tag="whole")
model.push_to_hub("acme/tiny-sharded", max_shard_size="20KB", private=True)

def same(other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)

for name, options in (("acme/tiny", {}), ("acme/tiny", {"revision": "whole"}), ("acme/tiny", {"revision": one.oid}),
                      ("acme/tiny-sharded", {})):
    same(AutoModelForSequenceClassification.from_pretrained(name, **options))
assert AutoConfig.from_pretrained("acme/tiny").hidden_size == 32
info = api.model_info("acme/tiny")
total = sum(p.numel() for p in model.parameters())
assert info.safetensors.total == total and info.safetensors.parameters == {"F32": total}
assert {"safetensors", "bert"} <= set(info.tags)
assert api.model_info("acme/tiny-sharded").safetensors.total == total and api.model_info("acme/tiny-sharded").private

# Headers alone, by ranges and in one request.
plain = get_safetensors_metadata("acme/tiny")
sharded = get_safetensors_metadata("acme/tiny-sharded")
at_once = api.get_sharded_safetensors_metadata("acme/tiny-sharded")
assert not plain.sharded and sharded.sharded and len(sharded.files_metadata) > 2
assert sharded.weight_map == at_once.weight_map and sharded.files_metadata == at_once.files_metadata
assert set(sharded.weight_map) == set(plain.weight_map) and sharded.parameter_count == plain.parameter_count
""")
    log = hub.log()[start:]
    heads = [r for r in log if "safetensors-metadata" in r["path"]]
    assert len(heads) == 1 and any(r["status"] == 206 and r["range"] == "bytes=0-100000" for r in log)


def test_datasets(client: Client, hub: Hub) -> None:
    client.run("""
import datasets
datasets.disable_progress_bars()
table = {"text": [f"row {n}" for n in range(30)], "label": [n % 2 for n in range(30)]}
made = datasets.Dataset.from_dict(table)
datasets.DatasetDict({"train": made, "test": made.select(range(5))}).push_to_hub("acme/table")
loaded = datasets.load_dataset("acme/table")
assert loaded["train"].to_dict() == table and loaded["test"].num_rows == 5
assert datasets.load_dataset("acme/table", split="train[:3]", revision="main").num_rows == 3
streamed = datasets.load_dataset("acme/table", split="train", streaming=True)
assert [row["text"] for row in streamed.take(2)] == ["row 0", "row 1"]
api.create_repo("acme/csv", repo_type="dataset")
for name, rows in (("train", 4), ("validation", 2)):
    text = "a,b\\n" + "".join(f"{n},x{n}\\n" for n in range(rows))
    where = {"path_in_repo": f"data/{name}.csv", "repo_id": "acme/csv", "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=text.encode(), **where)
csv = datasets.load_dataset("acme/csv")
assert {k: v.num_rows for k, v in csv.items()} == {"train": 4, "validation": 2}
assert csv["train"][3] == {"a": 3, "b": "x3"}
assert datasets.get_dataset_config_names("acme/csv") == ["default"]
""")


def test_file_system(client: Client, hub: Hub) -> None:
    client.run("""
api.create_repo("acme/fs")
data = bytes(range(256)) * 40_000
api.upload_file(path_or_fileobj=data, path_in_repo="sub/large.bin", repo_id="acme/fs")
""")
    start = len(hub.log())
    client.run("""
fs = HfFileSystem()
assert sorted(fs.ls("acme/fs", detail=False)) == ["acme/fs/.gitattributes", "acme/fs/sub"]
assert fs.info("acme/fs/sub/large.bin")["size"] == 10_240_000
assert fs.isdir("acme/fs/sub") and not fs.exists("acme/fs/no")
with fs.open("acme/fs/sub/large.bin", cache_type="none") as file:
    file.seek(5_000_003)
    part = file.read(1234)
assert part == (bytes(range(256)) * 40_000)[5_000_003 : 5_000_003 + 1234]
""")
    reads = [r for r in hub.log()[start:] if r["range"]]
    assert sum(r["bytes"] for r in reads) == 1234 and all(r["status"] == 206 for r in reads)
    client.run("""
fs = HfFileSystem()
with fs.open("acme/fs/new.txt", "w") as file:
    file.write("written")
assert fs.read_text("acme/fs/new.txt") == "written" and fs.glob("acme/fs/*.txt") == ["acme/fs/new.txt"]
fs.cp_file("acme/fs/new.txt", "acme/fs/copy.txt")
fs.rm("acme/fs/new.txt")
fs.invalidate_cache()
assert fs.exists("acme/fs/copy.txt") and not fs.exists("acme/fs/new.txt")
# A commit made while somebody reads from a fixed one.
sha = api.model_info("acme/fs").sha
api.delete_file("copy.txt", "acme/fs")
assert fs.read_text(f"acme/fs@{sha}/copy.txt") == "written"
""")


def test_cards(client: Client) -> None:
    client.run("""
import warnings
data = ModelCardData(base_model=["acme/a", "acme/b"], base_model_relation="merge", license="mit", tags=["hfmerge"],
    model_name="m", hfmerge={"version": 1},
    eval_results=[EvalResult(task_type="text-classification", dataset_type="acme/table", dataset_name="Table",
                             metric_type="accuracy", metric_value=0.5)])
card = ModelCard("---\\n" + data.to_yaml() + "\\n---\\n# A merge\\n")
card.validate()
api.create_repo("acme/card")
card.push_to_hub("acme/card", commit_message="card")
back = ModelCard.load("acme/card")
assert back.data.to_dict() == data.to_dict() and back.data.eval_results[0].metric_value == 0.5
assert "base_model:merge:acme/a" in api.model_info("acme/card").tags
pull = card.push_to_hub("acme/card", create_pr=True)
metadata_update("acme/card", {"library_name": "hfmerge", "tags": ["hfmerge", "more"]}, overwrite=True)
assert set(api.model_info("acme/card").card_data.tags) == {"hfmerge", "more"}
error = fails(ValueError, ModelCard("---\\nbase_model: /models/here\\n---\\n").validate)
assert "Invalid metadata" in str(error) and "/models/here" in str(error)
error = fails(ValueError, api.upload_file, path_or_fileobj=b"---\\nlicense: {a: b}\\n---\\n", path_in_repo="README.md",
    repo_id="acme/card")
assert "Invalid metadata in README.md" in str(error) and '"license" must be' in str(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    api.upload_file(path_or_fileobj=b"no metadata", path_in_repo="README.md", repo_id="acme/card")
assert any("empty or missing yaml metadata" in str(w.message) for w in caught)
api.create_repo("acme/carded", repo_type="dataset")
DatasetCard("---\\nlicense: mit\\nsize_categories: [n<1K]\\n---\\n").push_to_hub("acme/carded", repo_type="dataset")
assert "size_categories:n<1K" in api.dataset_info("acme/carded").tags
""")


def test_offline_copy_of_what_was_fetched(client: Client, hub: Hub, tmp_path: Path) -> None:
    client.run("""
api.create_repo("acme/cached")
api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="acme/cached")
path = hf_hub_download("acme/cached", "c.txt")
assert hf_hub_download("acme/cached", "c.txt", local_files_only=True) == path
assert try_to_load_from_cache("acme/cached", "c.txt") == path
fails(RemoteEntryNotFoundError, hf_hub_download, "acme/cached", "missing.txt")
assert try_to_load_from_cache("acme/cached", "missing.txt") is not None  # remembered for this commit
""")
    before = len(hub.log())
    client.run('sha = api.model_info("acme/cached").sha; hf_hub_download("acme/cached", "c.txt", revision=sha)')
    assert [r["path"] for r in hub.log()[before:]] == ["/api/models/acme/cached"]
