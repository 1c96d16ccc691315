"""Routes over the raw path: clients percent-encode slashes inside a segment, so paths are split before decoding."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.responses import Response

from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.wire import Call


Handler = Callable[[Hub, Call], "Response | Awaitable[Response]"]

_TWO, _ONE = r"(?P<repo>[^/]+/[^/]+)", r"(?P<repo>[^/]+)"

# What `{...}` in a route stands for, beside `{repo}`; anything else is one segment.
_PARTS = {
    "kind": r"(?P<kind>models|datasets)",
    "web": r"(?:(?P<kind>datasets|models)/)?",
    "rev": r"(?P<rev>refs/(?:pr|convert|heads|tags)/[^/]+|[^/]+)",
    "path": r"(?P<path>.+)",
    "num": r"(?P<num>[0-9]{1,9})",
}


@dataclass(frozen=True)
class Match:
    """A route that fits a path: its handler, the decoded arguments, where the repository's id stands."""

    handler: Handler
    arguments: dict[str, str]
    repo_span: tuple[int, int] | None
    streams: bool
    open: bool


@dataclass(frozen=True)
class Route:
    """A method and a path; `open` routes check their caller themselves, by a signed token.

    An id of one segment (`gpt2`) never names a repository here, but must find its route to be told so; `short` is the
    pattern for it. Such ids come last, or a repository called `org/tree` could not be reached.
    """

    method: str
    pattern: re.Pattern[str]
    short: re.Pattern[str] | None
    handler: Handler
    open: bool

    def match(self, raw_path: str, *, short: bool) -> Match | None:
        """The decoded arguments, if the path fits."""
        pattern = self.short if short else self.pattern
        found = pattern.fullmatch(raw_path) if pattern is not None else None
        if found is None:
            return None
        groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        span = found.span("repo") if "repo" in groups else None
        return Match(self.handler, groups, span, inspect.iscoroutinefunction(self.handler), self.open)


def route(method: str, template: str, handler: Handler, *, open: bool = False) -> Route:
    """A route from a template such as `/api/{kind}/{repo}/tree/{rev}`."""

    def compiled(repo: str) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", template)
        parts = {**_PARTS, "repo": repo}
        return re.compile(
            "".join(
                re.escape(piece) if index % 2 == 0 else parts.get(piece, rf"(?P<{piece}>[^/]+)")
                for index, piece in enumerate(pieces)
            )
        )

    return Route(method, compiled(_TWO), compiled(_ONE) if "{repo}" in template else None, handler, open)


def find(routes: Sequence[Route], method: str, raw_path: str) -> tuple[Match | None, list[str]]:
    """The first route that fits, and the methods of routes that fit but for the method."""
    wanted = "GET" if method == "HEAD" else method
    others: list[str] = []
    for short in (False, True):
        for candidate in routes:
            match = candidate.match(raw_path, short=short)
            if match is not None:
                if candidate.method == wanted:
                    return match, []
                others.append(candidate.method)
    return None, others
