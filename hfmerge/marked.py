"""Marked parts of a card beside the one that the ledger gives: found, replaced, taken out; all other text stays."""

from __future__ import annotations

import re

from hfmerge.card import END
from hfmerge.source import is_path


def part(text: str, name: str) -> str | None:
    """What stands between a part's markers, or None."""
    found = _pattern(name).search(text)
    return found.group(1).strip() if found else None


def with_part(text: str, name: str, body: str | None) -> str:
    """The card with a part replaced, added behind the ledger's block, or taken out where `body` is None."""
    whole = "" if body is None else f"\n{_begin(name)}\n{body.strip()}\n{_end(name)}\n"
    if _pattern(name).search(text):
        return _pattern(name).sub(lambda _: whole, text, count=1)
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


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(f"\n?{re.escape(_begin(name))}(.*?){re.escape(_end(name))}\n?", re.DOTALL)
