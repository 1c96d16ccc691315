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
# Raises what is to be answered if the caller may not do this, or if what the path names may not be seen.
Check = Callable[[Hub, Call], object]

# The longest body of a request that says in JSON what to do.
MOST_JSON = 4 << 20

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
    """A route that fits a path, the decoded arguments, where the repository's id stands."""

    route: Route
    arguments: dict[str, str]
    repo_span: tuple[int, int] | None

    @property
    def streams(self) -> bool:
        """Whether the handler reads the body itself."""
        return inspect.iscoroutinefunction(self.route.handler)


@dataclass(frozen=True)
class Route:
    """A method and a path. `check` comes before the body, of which at most `most` bytes are read; of a `GET` none is.

    `open` routes know their caller by a signed token. `reads` says that a `POST` changes nothing, so that a token that
    may only read is enough.

    An id of one segment (`gpt2`) never names a repository here, but must find its route to be told so; `short` is the
    pattern for it. Such ids come last, or a repository called `org/tree` could not be reached.
    """

    method: str
    pattern: re.Pattern[str]
    short: re.Pattern[str] | None
    handler: Handler
    check: Check | None
    most: int
    open: bool
    reads: bool

    def match(self, raw_path: str, *, short: bool) -> Match | None:
        """The decoded arguments, if the path fits."""
        pattern = self.short if short else self.pattern
        found = pattern.fullmatch(raw_path) if pattern is not None else None
        if found is None:
            return None
        groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        span = found.span("repo") if "repo" in groups else None
        return Match(self, groups, span)


def route(
    method: str,
    template: str,
    handler: Handler,
    *,
    check: Check | None = None,
    most: int = MOST_JSON,
    open: bool = False,
    reads: bool = False,
) -> Route:
    """A route from a template such as `/api/{kind}/{repo}/tree/{rev}`; a repository in it must be visible."""

    def compiled(repo: str) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", template)
        parts = {**_PARTS, "repo": repo}
        return re.compile(
            "".join(
                re.escape(piece) if index % 2 == 0 else parts.get(piece, rf"(?P<{piece}>[^/]+)")
                for index, piece in enumerate(pieces)
            )
        )

    names_repo = "{repo}" in template
    return Route(
        *(method, compiled(_TWO), compiled(_ONE) if names_repo else None, handler),
        check=check or (Hub.repo if names_repo else None),
        most=0 if method == "GET" else most,
        open=open,
        reads=reads or method == "GET",
    )


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
