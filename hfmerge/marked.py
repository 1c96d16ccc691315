"""Marked parts of a card beside the one that the ledger gives: found, replaced, taken out; all other text stays."""

from __future__ import annotations

import re

from hfmerge.card import END
from hfmerge.hub.reference import is_path


def part(text: str, name: str) -> str | None:
    """What stands between a part's markers, or None."""
    place = _place(text, name)
    return text[place[0] + len(_begin(name)) : place[1] - len(_end(name))].strip() if place else None


def with_part(text: str, name: str, body: str | None) -> str:
    """The card with a part replaced, added behind the ledger's block, or taken out where `body` is None."""
    whole = "" if body is None else f"\n{_begin(name)}\n{body.strip()}\n{_end(name)}\n"
    if place := _place(text, name):
        return text[: place[0]].removesuffix("\n") + whole + text[place[1] :].removeprefix("\n")
    if not whole:
        return text
    before, marker, after = text.partition(f"{END}\n")
    return f"{before}{marker}{whole}{after}" if marker else f"{text.rstrip()}\n{whole}"


def files_in(body: str | None, folder: str) -> list[str]:
    """Files of a folder of the repository that a part links to."""
    return [name for name in re.findall(rf"\(({re.escape(folder)}/[\w.-]+)\)", body or "") if is_path(name)]


def _begin(name: str) -> str:
    return f"<!-- hfmerge:{name}:begin -->"


def _end(name: str) -> str:
    return f"<!-- hfmerge:{name}:end -->"


def _place(text: str, name: str) -> tuple[int, int] | None:
    """Where a part's first marker begins and its last one ends; a card may hold many that have no end."""
    start = text.find(_begin(name))
    stop = text.find(_end(name), start + len(_begin(name))) if start >= 0 else -1
    return (start, stop + len(_end(name))) if stop >= 0 else None
