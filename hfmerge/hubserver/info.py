"""What the Hub tells about a repository: files, card, tags, configuration, parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hfmerge.hubserver.cards import base_models, card_tags, load_yaml, read_card, relation_of
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, Entry, GitStore
from hfmerge.hubserver.hub import Hub, moment
from hfmerge.hubserver.safetensors import count_parameters, read_header, read_sharded
from hfmerge.hubserver.wire import HubFault


_INDEX = "model.safetensors.index.json"
# Keys of config.json that the Hub repeats.
_CONFIG_KEYS = ("architectures", "model_type", "quantization_config", "auto_map", "adapter_transformers")
# A card, configuration or result file longer than this is not looked into.
_MOST_BYTES = 4 << 20


def repo_facts(hub: Hub, repo: RepoRow, git: GitStore, commit: str, *, blobs: bool = False) -> dict[str, Any]:
    """All properties of a repository at a commit, by the names the API uses."""
    entries = [entry for entry in git.entries(commit, recursive=True) if not entry.is_folder]
    files = {entry.path: entry for entry in entries}
    card = read_card(_text(hub, git, files.get("README.md")), repo.kind).data
    config = _json(hub, git, files.get("config.json"))
    quantized = "quantization_config" in config or any(path.endswith(".gguf") for path in files)
    relation = relation_of(card, adapter="adapter_config.json" in files, quantized=quantized)
    head = next(git.history(commit))
    facts: dict[str, Any] = {
        "_id": repo.rid[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit,
        "lastModified": moment(head.time),
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated or False,
        "disabled": False,
        "downloads": 0,
        "downloadsAllTime": 0,
        "likes": 0,
        "trendingScore": 0,
        "tags": _tags(repo, files, config, card, relation),
        "cardData": dict(card) or None,
        "siblings": [_sibling(entry, blobs) for entry in entries],
        "usedStorage": sum({e.lfs.oid: e.size for e in entries if e.lfs is not None}.values()),
    }
    if repo.kind == "model":
        facts["modelId"] = repo.id
        facts["config"] = {key: config[key] for key in _CONFIG_KEYS if key in config} or None
        facts["spaces"] = []
        for key in ("library_name", "pipeline_tag"):
            if isinstance(card.get(key), str):
                facts[key] = card[key]
        if card.get("model-index") is not None:
            facts["model-index"] = card["model-index"]
        if (parameters := _parameters(hub, git, commit, files)) is not None:
            facts["safetensors"] = parameters
        if base_models(card):
            facts["baseModels"] = {
                "relation": relation,
                "models": [{"_id": name, "id": name} for name in base_models(card)],
            }
        if results := _eval_results(hub, git, entries):
            facts["evalResults"] = results
    return facts


def main_facts(hub: Hub, repo: RepoRow) -> dict[str, Any]:
    """The properties of a repository on its main branch."""
    with hub.git(repo) as git:
        return repo_facts(hub, repo, git, hub.commit_of(git, DEFAULT_BRANCH))


def children_count(hub: Hub, repo: RepoRow) -> int:
    """How many public models name this one as their base."""
    wanted = f"base_model:{repo.id}".lower()
    others = [row for row in hub.database.repos("model") if not row.private]
    return sum(wanted in [tag.lower() for tag in main_facts(hub, row)["tags"]] for row in others)


def _sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs is not None:
            sibling["lfs"] = {"sha256": entry.lfs.oid, "size": entry.size, "pointerSize": entry.lfs.pointer_size}
    return sibling


def _tags(
    repo: RepoRow, files: dict[str, Entry], config: dict[str, Any], card: Any, relation: str | None
) -> list[str]:
    tags = card_tags(card, repo.kind, relation)
    if repo.kind == "model":
        if any(path.endswith(".safetensors") for path in files):
            tags.append("safetensors")
        if isinstance(config.get("model_type"), str):
            tags.append(config["model_type"])
    return list(dict.fromkeys([*tags, "region:us"]))


def _parameters(hub: Hub, git: GitStore, commit: str, files: dict[str, Entry]) -> dict[str, Any] | None:
    # A file that only calls itself safetensors is no reason to refuse to tell about the repository.
    try:
        if "model.safetensors" in files:
            return count_parameters([read_header(hub, git, files["model.safetensors"])])
        if _INDEX in files:
            return count_parameters(list(read_sharded(hub, git, commit, _INDEX)[1].values()))
    except (ValueError, HubFault):
        return None
    return None


def _eval_results(hub: Hub, git: GitStore, entries: Sequence[Entry]) -> list[Any]:
    results: list[Any] = []
    for entry in entries:
        if entry.path.startswith(".eval_results/") and entry.path.endswith((".yaml", ".yml")):
            name = entry.path.rpartition("/")[2]
            try:
                document = load_yaml(_text(hub, git, entry))
            except ValueError as error:
                results.append({"filename": name, "error": str(error)})
                continue
            for item in document if isinstance(document, list) else [document]:
                dataset = item.get("dataset") if isinstance(item, dict) else None
                if isinstance(dataset, dict) and {"id", "task_id"} <= dataset.keys() and "value" in item:
                    results.append({"filename": name, "data": item})
                else:
                    results.append({"filename": name, "error": "dataset.id, dataset.task_id and value are required"})
    return results


def _text(hub: Hub, git: GitStore, entry: Entry | None) -> str:
    if entry is None or entry.size > _MOST_BYTES:
        return ""
    return hub.content(git, entry).decode("utf-8", "replace")


def _json(hub: Hub, git: GitStore, entry: Entry | None) -> dict[str, Any]:
    try:
        value = json.loads(_text(hub, git, entry) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
