"""What the Hub tells about a repository: files, card, tags, configuration, parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.hubserver.cards import base_models, card_tags, load_yaml, read_card, relation_of
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, Entry, GitStore, Pointer
from hfmerge.hubserver.hub import Hub, moment
from hfmerge.hubserver.plain import load_json
from hfmerge.hubserver.safetensors import count_parameters, read_header, read_sharded
from hfmerge.hubserver.wire import HubFault


_INDEX = "model.safetensors.index.json"
# Keys of config.json that the Hub repeats.
_CONFIG_KEYS = ("architectures", "model_type", "quantization_config", "auto_map", "adapter_transformers")
# A card, configuration or result file longer than this is not looked into.
_MOST_BYTES = 2 << 20
# Results beyond this number, and files of results beyond this length, are not looked into.
_MOST_RESULTS = 100
_MOST_RESULT_BYTES = 64 << 10
# What comes from files other than the card, and what comes from the card.
_FROM_FILES = ("config", "safetensors", "evalResults")
_FROM_CARD = ("cardData", "model-index", "library_name", "pipeline_tag", "baseModels")


@dataclass(frozen=True)
class Facts:
    """What follows from one commit alone: `fields` by the names the API uses, and the files with all that is known."""

    sha: str
    fields: dict[str, Any]
    siblings: list[dict[str, Any]]


def commit_facts(hub: Hub, repo: RepoRow, git: GitStore, commit: str) -> Facts:
    """Look into the files of a commit.

    Whoever writes a repository writes what is found here, and lists show it to everybody. So each part is checked, and
    one that is malformed, too large or gone counts as empty: it spoils neither the rest nor another repository.
    """
    entries = [entry for entry in git.entries(commit, recursive=True) if not entry.is_folder]
    files = {entry.path: entry for entry in entries}
    card = _card(hub, repo, git, files)
    config = _config(hub, git, files.get("config.json"))
    quantized = "quantization_config" in config or any(path.endswith(".gguf") for path in files)
    relation = relation_of(card, adapter="adapter_config.json" in files, quantized=quantized)
    head = next(git.history(commit))
    found: dict[str, Any] = {
        "lastModified": moment(head.time),
        "tags": _tags(repo, files, config, card, relation),
        "cardData": dict(card) or None,
        "usedStorage": sum({e.lfs.oid: e.size for e in entries if e.lfs is not None}.values()),
    }
    if repo.kind == "model":
        found["config"] = {key: config[key] for key in _CONFIG_KEYS if key in config} or None
        for key in ("library_name", "pipeline_tag"):
            if isinstance(card.get(key), str):
                found[key] = card[key]
        if card.get("model-index") is not None:
            found["model-index"] = card["model-index"]
        if (parameters := _parameters(hub, git, commit, files)) is not None:
            found["safetensors"] = parameters
        if base_models(card):
            found["baseModels"] = {
                "relation": relation,
                "models": [{"_id": name, "id": name} for name in base_models(card)],
            }
        if results := _eval_results(hub, git, entries):
            found["evalResults"] = results
    return Facts(commit, found, [_sibling(entry) for entry in entries])


def tip_facts(hub: Hub, repo: RepoRow) -> Facts:
    """The facts of the newest commit of main: found out once, when it was made, and read from the database since."""
    stored = hub.database.facts_of(repo.rid)
    if stored is not None and stored[0] == hub.tip(repo):
        return Facts(stored[0], json.loads(stored[1]), json.loads(stored[2]))
    facts = _find_out(hub, repo, stored[2] if stored is not None else "")
    hub.database.put_facts([(*_texts(facts), repo.rid)])
    return facts


def listed(hub: Hub, kind: str, rows: Sequence[RepoRow]) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Of each repository by `rid`: the newest commit of main, what was found in it, and its files as JSON."""
    stored = hub.database.facts(kind)
    result = {}
    new = []
    for row in rows:
        try:
            known = stored.get(row.rid, ("", "", ""))
            if known[0] != hub.tip(row):
                known = _texts(_find_out(hub, row, known[2]))
                new.append((*known, row.rid))
        except HubFault:
            continue  # deleted since the rows were read
        sha, document, siblings = known
        result[row.rid] = (sha, json.loads(document), siblings)
    hub.database.put_facts(new)
    return result


def _find_out(hub: Hub, repo: RepoRow, before: str) -> Facts:
    """Look into the newest commit of main; `before` is the JSON of the files of an earlier one."""
    with hub.git(repo) as git:
        git.recall([_entry(sibling) for sibling in json.loads(before or "[]")])
        return commit_facts(hub, repo, git, hub.commit_of(git, DEFAULT_BRANCH))


def _texts(facts: Facts) -> tuple[str, str, str]:
    document, siblings = (json.dumps(part, allow_nan=False) for part in (facts.fields, facts.siblings))
    return facts.sha, document, siblings


def properties(hub: Hub, repo: RepoRow, user: str | None, sha: str, fields: dict[str, Any]) -> dict[str, Any]:
    """All properties of a repository but its files, as a user may see them.

    Of a gated repository the card of main is open, because it says how to ask; what comes from other files, or from
    another commit, is for those who were let in.
    """
    if not hub.may_read(repo, user):
        fields = {key: value for key, value in fields.items() if key not in _FROM_FILES}
        if sha != hub.tip(repo):
            fields = {key: value for key, value in fields.items() if key not in _FROM_CARD} | {"tags": []}
    return {
        "_id": repo.rid[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": sha,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated or False,
        "disabled": False,
        "downloads": 0,
        "downloadsAllTime": 0,
        "likes": 0,
        "trendingScore": 0,
        **({"modelId": repo.id, "spaces": []} if repo.kind == "model" else {}),
        **fields,
    }


def plain_siblings(siblings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files by name alone."""
    return [{"rfilename": sibling["rfilename"]} for sibling in siblings]


def children_count(hub: Hub, repo: RepoRow) -> int:
    """How many public models name this one as their base."""
    wanted = f"base_model:{repo.id}".lower()
    others = [row for row in hub.database.repos("model") if not row.private]
    found = [facts for _, facts, _ in listed(hub, "model", others).values()]
    return sum(wanted in [tag.lower() for tag in facts["tags"]] for facts in found)


def _sibling(entry: Entry) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": entry.path, "size": entry.size, "blobId": entry.oid}
    if entry.lfs is not None:
        sibling["lfs"] = {"sha256": entry.lfs.oid, "size": entry.size, "pointerSize": entry.lfs.pointer_size}
    return sibling


def _entry(sibling: dict[str, Any]) -> Entry:
    lfs = sibling.get("lfs")
    pointer = Pointer(lfs["sha256"], lfs["size"], lfs["pointerSize"]) if lfs is not None else None
    return Entry(sibling["rfilename"], sibling["blobId"], False, sibling["size"], pointer)


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
        if len(results) < _MOST_RESULTS and _is_result(entry.path):
            name = entry.path.rpartition("/")[2]
            try:
                document = load_yaml(_text(hub, git, entry, _MOST_RESULT_BYTES))
            except (ValueError, HubFault) as error:
                results.append({"filename": name, "error": str(error)})
                continue
            for item in document if isinstance(document, list) else [document]:
                dataset = item.get("dataset") if isinstance(item, dict) else None
                if isinstance(dataset, dict) and {"id", "task_id"} <= dataset.keys() and "value" in item:
                    results.append({"filename": name, "data": item})
                else:
                    results.append({"filename": name, "error": "dataset.id, dataset.task_id and value are required"})
    return results[:_MOST_RESULTS]


def _is_result(path: str) -> bool:
    return path.startswith(".eval_results/") and path.endswith((".yaml", ".yml"))


def _card(hub: Hub, repo: RepoRow, git: GitStore, files: dict[str, Entry]) -> Mapping[str, Any]:
    try:
        return read_card(_text(hub, git, files.get("README.md")), repo.kind).data
    except HubFault:
        return {}  # the card is a large file that was deleted


def _config(hub: Hub, git: GitStore, entry: Entry | None) -> dict[str, Any]:
    try:
        value = load_json(_text(hub, git, entry) or "{}")
    except (ValueError, HubFault):
        return {}
    return value if isinstance(value, dict) else {}


def _text(hub: Hub, git: GitStore, entry: Entry | None, most: int = _MOST_BYTES) -> str:
    if entry is None or entry.size > most:
        return ""
    return hub.content(git, entry).decode("utf-8", "replace")
