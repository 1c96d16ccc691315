"""Colour for people: what commands print looks the same everywhere, and has colours where it goes to a terminal."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from hfmerge.validation import quoting


_LABEL = re.compile(
    r"(base|model|head|choice|method|tensors|bytes|states?|sources|stream|needs|way|first|result|branch)(?= {1,})"
)
_STYLES = (
    (re.compile(r"ok(?=  )|.*: verified$"), "green"),
    (re.compile(r"NEAR(?= )|dry run: .*"), "yellow"),
    (re.compile(r"FAIL(?= )|.*: NOT (what its ledger says|verified)$"), "bold red"),
    (re.compile(r"(written to|pushed to|published at)(?= )"), "green"),
    (_LABEL, "cyan"),
)
"""What begins a line, and how it looks; the first that fits counts."""


def coloured() -> bool:
    """Whether standard output takes colours, and its user wants them (see no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def display(*lines: object) -> None:
    """Print lines as `quoting.say` does; on a terminal with colours.

    The text is never read as markup, whoever wrote it.
    """
    if not coloured():
        quoting.say(*lines)
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(_styled(quoting.plain(line)))


def _styled(line: str) -> Any:
    from rich.text import Text

    text = Text(line)
    for pattern, style in _STYLES:
        if (found := pattern.match(line)) is not None:
            text.stylize(style, 0, found.end())
            break
    return text


def width_of(labels: list[str], usual: int) -> int:
    """Width of a column: on a terminal that of the longest label, so that the next column is aligned."""
    return max(map(len, labels), default=usual) if coloured() else usual
