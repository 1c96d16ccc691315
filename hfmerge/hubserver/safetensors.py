"""Headers of safetensors files in the store: what tensors there are, without reading them."""

from __future__ import annotations

import json
import math
import posixpath
from typing import Any

from hfmerge.hubserver.gitstore import Entry, GitStore
from hfmerge.hubserver.hub import Hub


# The format's own limit on a header.
_MOST_HEADER = 100_000_000


def read_header(hub: Hub, git: GitStore, entry: Entry) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        ValueError: it is not one.
    """
    length = int.from_bytes(hub.content(git, entry, length=8), "little")
    if not 0 < length <= min(_MOST_HEADER, entry.size - 8):
        raise ValueError(f"{entry.path}: not a safetensors file")
    header = json.loads(hub.content(git, entry, start=8, length=length))
    if not isinstance(header, dict):
        raise ValueError(f"{entry.path}: not a safetensors file")
    return header


def read_sharded(hub: Hub, git: GitStore, commit: str, index_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An index file and the header of each of its shards.

    Raises:
        ValueError: the index or a shard is malformed.
        HubFault: `EntryNotFound` if one of them is missing.
    """
    index = json.loads(hub.content(git, hub.file_at(git, commit, index_path)))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index_path}: no weight_map")
    headers = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = posixpath.join(posixpath.dirname(index_path), shard)
        headers[shard] = read_header(hub, git, hub.file_at(git, commit, path))
    return index, headers


def count_parameters(headers: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers by data type, as `model_info` shows them.

    Raises:
        ValueError: a header is malformed.
    """
    counts: dict[str, int] = {}
    for header in headers:
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            try:
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"tensor {name}: malformed header") from error
    return {"parameters": counts, "total": sum(counts.values())}
