"""Headers of safetensors files in the store: what tensors there are, without reading them."""

from __future__ import annotations

import math
import posixpath
from typing import Any

from hfmerge.hubserver.gitstore import Entry, GitStore
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.plain import check_plain, load_json


# The format allows headers of 100 MB; those of real models stay below 16 MiB, and so do all shards of one together.
_MOST_HEADERS = 16 << 20
_MOST_INDEX = 16 << 20
_MOST_SHARDS = 2_000
_MOST_DIMENSIONS = 16


def read_header(hub: Hub, git: GitStore, entry: Entry) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        ValueError: it is not one, or it is longer than is read here.
        HubFault: `EntryNotFound` if the file was deleted.
    """
    return _header(hub, git, entry, _MOST_HEADERS)[0]


def _header(hub: Hub, git: GitStore, entry: Entry, most: int) -> tuple[dict[str, Any], int]:
    """The header of a file, and its length."""
    length = int.from_bytes(hub.content(git, entry, length=8), "little")
    if not 0 < length <= entry.size - 8:
        raise ValueError(f"{entry.path}: not a safetensors file")
    if length > most:
        raise ValueError(f"{entry.path}: the headers of the model are longer than {_MOST_HEADERS} bytes")
    header = load_json(hub.content(git, entry, start=8, length=length))
    if not isinstance(header, dict):
        raise ValueError(f"{entry.path}: not a safetensors file")
    return header, length


def read_sharded(hub: Hub, git: GitStore, commit: str, index_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An index file and the header of each of its shards.

    Raises:
        ValueError: the index or a shard is malformed, or there is more of it than is read here.
        HubFault: `EntryNotFound` if one of them is missing.
    """
    entry = hub.file_at(git, commit, index_path)
    if entry.size > _MOST_INDEX:
        raise ValueError(f"{index_path}: longer than {_MOST_INDEX} bytes")
    index = load_json(hub.content(git, entry))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index_path}: no weight_map")
    shards = dict.fromkeys(weight_map.values())
    if len(shards) > _MOST_SHARDS:
        raise ValueError(f"{index_path}: more than {_MOST_SHARDS} shards")
    headers, left = {}, _MOST_HEADERS
    for shard in shards:
        path = posixpath.join(posixpath.dirname(index_path), shard)
        headers[shard], length = _header(hub, git, hub.file_at(git, commit, path), left)
        left -= length
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
                dtype, shape = str(tensor["dtype"]), [int(size) for size in tensor["shape"]]
                if len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
                    raise TypeError(shape)
                counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
            except (KeyError, TypeError) as error:
                raise ValueError(f"tensor {name}: malformed header") from error
    found = {"parameters": counts, "total": sum(counts.values())}
    check_plain(found)
    return found
