"""JSON of strangers, read strictly: bounded bytes, values and depth, no repeated key, no number that is none.

All JSON files of models and merges are read here. The text of the ValueError is the problem; the caller adds the
file's name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from hfmerge.validation.limits import JSON_BYTES, JSON_DEPTH, JSON_VALUES, Limit


STEP = 1 << 20
"""Bytes read at a time."""


def read_json(data: bytes, limit: Limit = JSON_BYTES, *, values: Limit = JSON_VALUES, finite: bool = True) -> Any:
    """The value of one JSON text.

    Args:
        data: UTF-8, with or without a byte order mark.
        limit: of its bytes.
        values: of the values in it.
        finite: refuse NaN and infinities, which are no JSON; transformers writes some into config.json.

    Raises:
        ValueError: beyond a limit, not JSON, a repeated key, a number that is not finite, half a surrogate pair.
    """
    limit.check(len(data))
    # a value is the first of the file, the first of a container, or comes after a comma; texts are counted too
    values.check(1 + data.count(b",") + data.count(b"[") + data.count(b"{"))
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_not_finite if finite else None,
            parse_float=_finite if finite else None,
        )  # fmt: skip
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"has too many levels of nesting; the limit is {JSON_DEPTH.most}") from error
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        _check_encodable(value)
    return value


def read_json_file(path: Path, limit: Limit = JSON_BYTES, *, values: Limit = JSON_VALUES, finite: bool = True) -> Any:
    """`read_json` of a file, which is not read where it is too long. Raises ValueError, OSError."""
    return read_json(read_limited(path, limit), limit, values=values, finite=finite)


def read_limited(path: Path, limit: Limit) -> bytes:
    """The bytes of a regular file, if it has no more than the limit allows. Raises ValueError, OSError."""
    limit.check(path.stat().st_size)
    with open(path, "rb") as file:
        return read_limited_stream(file, limit)  # it may grow meanwhile, or have no size, as a pipe


def read_limited_stream(stream: BinaryIO, limit: Limit) -> bytes:
    """The bytes of a stream from where it is, if it has no more than the limit allows. Raises ValueError, OSError.

    `read(n)` takes memory for n bytes before it reads, so a limit is no length to ask for.
    """
    pieces, length = [], 0
    while piece := stream.read(STEP):
        length += len(piece)
        limit.check(length)
        pieces.append(piece)
    return b"".join(pieces)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"holds the key {json.dumps(twice[:60])} twice")
    return found


def _not_finite(text: str) -> float:
    raise ValueError(f"holds {text}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {text[:40]}, which is too large")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        JSON_DEPTH.check(depth)
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]


def _check_encodable(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair, which is no text") from error
