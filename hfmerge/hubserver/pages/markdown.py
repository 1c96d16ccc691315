"""Markdown of strangers into HTML that can do nothing: no raw HTML, no foreign pictures, no address that runs."""

from __future__ import annotations

import posixpath
import re
from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup

from hfmerge.hubserver.pages.rendering import visible


MOST_BYTES = 256 << 10
"""Of a longer text only the beginning is shown."""

# Beyond these a text is shown as it was written: a parser takes seconds for marks that nobody would write so often.
_MOST_LETTERS = 128 << 10
_MOST_LINES = 5000
_MOST_MARKS = 8000
_MARK = re.compile(r"[\[*_~`<&\\]")

_WEB = re.compile(r"https?://[^/\\?#\s]", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_COMMENTS = re.compile(r"\s*(?:<!--(?:(?!-->).)*-->\s*)+", re.DOTALL)


def render(text: str, base: str) -> Markup:
    """A card or a comment as HTML.

    Args:
        text: Markdown.
        base: what relative addresses belong to, `/org/name` and a revision as one segment: `/org/name main`.
    """
    if len(text) > _MOST_LETTERS or text.count("\n") > _MOST_LINES or len(_MARK.findall(text)) > _MOST_MARKS:
        return plain(text)
    return _rendered(text, base)


def plain(text: str) -> Markup:
    """The beginning of a text as it was written."""
    return Markup("<pre>{}</pre>").format(visible(text[:MOST_BYTES]))


@lru_cache(maxsize=64)
def _rendered(text: str, base: str) -> Markup:
    return Markup(visible(_PARSER.render(text, {"base": base})))  # the renderer escapes every text


def _allowed(url: str) -> bool:
    """Whether an address may be a link: on the web, or relative; anything else stays the text that was written."""
    return bool(_WEB.match(url)) or _is_relative(url)


def _is_relative(url: str) -> bool:
    return not (_SCHEME.match(url) or url.startswith("//") or _ODD.search(unquote(url)) or url == "")


def _local(url: str, base: str, verb: str) -> str | None:
    """A relative address on this server; None if it leads out of the repository."""
    path, mark, fragment = url.partition("#")
    path = unquote(path.partition("?")[0])
    if not path:
        return f"#{quote(unquote(fragment))}" if mark else None
    if path.startswith("/"):
        # Of this server; two slashes would name another one.
        return "/" + quote(path.lstrip("/")) if verb == "blob" else None
    path = posixpath.normpath(path)
    if path == ".." or path.startswith("../"):
        return None
    repo, _, revision = base.rpartition(" ")
    return f"{repo}/{verb}/{revision}/{quote(path)}"


class _Renderer(RendererHTML):
    """Like the standard one, but for what has an address or a language."""

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        """A link: elsewhere without telling from where, or to a file of the repository."""
        url = str(tokens[idx].attrGet("href") or "")
        title = f' title="{escapeHtml(str(tokens[idx].attrGet("title")))}"' if tokens[idx].attrGet("title") else ""
        if _WEB.match(url):
            return f'<a href="{escapeHtml(url)}" rel="nofollow noopener noreferrer"{title}>'
        local = _local(url, env["base"], "blob") if _is_relative(url) else None
        return f'<a href="{escapeHtml(local)}"{title}>' if local is not None else "<a>"

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        """A picture of the same repository; of any other only the words that stand for it."""
        url = str(tokens[idx].attrGet("src") or "")
        words = self.renderInlineAsText(tokens[idx].children or [], options, env)
        local = _local(url, env["base"], "resolve") if _is_relative(url) and not url.startswith("#") else None
        if local is None:
            return f"[picture: {escapeHtml(words or url)}]"
        return f'<img src="{escapeHtml(local)}" alt="{escapeHtml(words)}" loading="lazy">'

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        """Code, whatever language it says it is in."""
        return f"<pre><code>{escapeHtml(tokens[idx].content)}</code></pre>\n"

    code_block = fence


def _drop_comments(state: StateCore) -> None:
    """Comments stand in cards as marks for programs; a paragraph of nothing else is not shown."""
    kept: list[Token] = []
    tokens = iter(state.tokens)
    for token in tokens:
        if token.type == "paragraph_open":
            inline, close = next(tokens), next(tokens)
            if _COMMENTS.fullmatch(inline.content) is None:
                kept += [token, inline, close]
        else:
            kept.append(token)
    state.tokens = kept


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}, renderer_cls=_Renderer)
    parser.enable(["table", "strikethrough"])
    parser.validateLink = _allowed  # type: ignore[method-assign]  # as its documentation says to do
    parser.core.ruler.before("inline", "comments", _drop_comments)
    return parser


_PARSER = _parser()
