"""JSON from others, as it may be stored and sent again: finite numbers, valid Unicode, a bounded depth."""

from __future__ import annotations

import json
import math
from typing import Any


# Deeper values overflow the stack of whoever reads or writes them; cards and configurations stay far below.
MOST_DEPTH = 64
# Integers beyond this are no JSON for most readers; Python needs quadratic time to print very long ones.
_MOST_INTEGER = 1 << 64


def load_json(text: bytes | str) -> Any:
    """A JSON document.

    Raises:
        ValueError: it is not JSON, or `check_plain` refuses it.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MOST_DEPTH} levels") from error
    check_plain(value)
    return value


def check_plain(value: Any, depth: int = 0) -> None:
    """Whether a value of dicts, lists and scalars can be written as JSON, and read by everybody.

    Raises:
        ValueError: too deep, NaN or infinite, an integer beyond 64 bits, or a text that UTF-8 cannot hold.
    """
    if depth > MOST_DEPTH:
        raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError("a text is not valid Unicode") from error
    elif isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, depth + 1)
            check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number is not finite")
    elif isinstance(value, int) and abs(value) >= _MOST_INTEGER:
        raise ValueError("an integer is longer than 64 bits")


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
