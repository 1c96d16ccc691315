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

# What `{...}` in a route stands for. An id of one segment never names a repository here, but must find its route.
_PARTS = {
    "kind": r"(?P<kind>models|datasets)",
    "web": r"(?:(?P<kind>datasets|models)/)?(?P<repo>[^/]+(?:/[^/]+)?)",
    "repo": r"(?P<repo>[^/]+(?:/[^/]+)?)",
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
    """A method and a path; `open` routes check their caller themselves, by a signed token."""

    method: str
    pattern: re.Pattern[str]
    handler: Handler
    open: bool

    def match(self, raw_path: str) -> Match | None:
        """The decoded arguments, if the path fits."""
        found = self.pattern.fullmatch(raw_path)
        if found is None:
            return None
        groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        span = found.span("repo") if "repo" in groups else None
        return Match(self.handler, groups, span, inspect.iscoroutinefunction(self.handler), self.open)


def route(method: str, template: str, handler: Handler, *, open: bool = False) -> Route:
    """A route from a template such as `/api/{kind}/{repo}/tree/{rev}`."""
    pieces = re.split(r"\{(\w+)\}", template)
    pattern = "".join(
        re.escape(piece) if index % 2 == 0 else _PARTS.get(piece, rf"(?P<{piece}>[^/]+)")
        for index, piece in enumerate(pieces)
    )
    return Route(method, re.compile(pattern), handler, open)


def find(routes: Sequence[Route], method: str, raw_path: str) -> tuple[Match | None, list[str]]:
    """The first route that fits, and the methods of routes that fit but for the method."""
    wanted = "GET" if method == "HEAD" else method
    others: list[str] = []
    for candidate in routes:
        match = candidate.match(raw_path)
        if match is not None:
            if candidate.method == wanted:
                return match, []
            others.append(candidate.method)
    return None, others
