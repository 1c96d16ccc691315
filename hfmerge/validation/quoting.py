"""Text from elsewhere, made safe where it is shown: on a terminal, in Markdown, in a block of code.

Names, labels, licences and messages come from ledgers, cards and configurations that anybody may have written. All
that hfmerge prints goes through `say`; all that it writes as Markdown goes through `markdown`, `code`, `fenced`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from typing import IO
from urllib.parse import quote


class Markdown(str):
    """Markdown that is meant as such, in which everything from elsewhere is quoted already."""


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(
    r"[&<>\\`*\[\]|~#$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # underscores within a word mean nothing
    r"|:(?=//)|(?<=\bwww)\.|(?<=\bmailto):|(?<=\bxmpp):"  # what GitHub and the Hub turn into links by themselves
    r"|@(?![0-9a-f]{7,40}\b|sha256:)",  # mentions and mail addresses, and not the commit behind a model's name
    re.IGNORECASE,
)
_COMMENT = "<!--"
"""The markers of our own parts of a card are comments, so no text may bring one along."""


def plain(text: object) -> str:
    """One line of printable characters: control characters, line breaks and marks of direction become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def say(*lines: object, file: IO[str] | None = None) -> None:
    """Print lines, each of which stays one line, whatever is in it.

    Args:
        file: standard output by default.
    """
    for line in lines:
        print(plain(line), file=file or sys.stdout, flush=file is sys.stderr)


def tell(*lines: object) -> None:
    """`say` on standard error, for warnings, notes and progress."""
    say(*lines, file=sys.stderr)


def markdown(text: object) -> Markdown:
    """Text that Markdown shows as it is, in a sentence, a heading or the cell of a table."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), plain(text)))


def code(text: object) -> Markdown:
    """A span of code, also in the cell of a table; plain text where no span can hold it."""
    shown = plain(text)
    if not shown.strip() or "`" in shown or _COMMENT in shown:
        return markdown(shown)
    return Markdown("`{}`".format(shown.replace("|", "\\|")))


def fenced(text: str, language: str) -> Markdown:
    """A block of code that ends where it should."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [plain(line) for line in text.rstrip("\n").split("\n")]
    return Markdown("\n".join([f"{fence}{language}", *lines, fence]).replace(_COMMENT, "<\\!--"))


SITE = "https://huggingface.co"
"""The public Hub."""


def link(text: object, *path: str, site: str = SITE) -> Markdown:
    """A link to a page of a Hub.

    Args:
        path: parts of the address behind the site's, each with its own slashes.
        site: address of the Hub.
    """
    return Markdown(f"[{markdown(text)}]({site}/{'/'.join(quote(part) for part in path)})")


def python_text(text: object) -> Markdown:
    """A literal of Python, for a block of code."""
    return Markdown(json.dumps(str(text)).replace(_COMMENT, "\\u003c!--"))


def shell_word(text: object) -> Markdown:
    """One word of a shell's command, for a block of code."""
    return Markdown(shlex.quote(plain(text)).replace(_COMMENT, "<\\!--"))
