"""Routes of a repository's history: the commits of a revision, and what one of them changed."""

from __future__ import annotations

from itertools import islice
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.pages.diffs import diff_commits
from hfmerge.hubserver.pages.reading import opened
from hfmerge.hubserver.pages.rendering import page, page_route
from hfmerge.hubserver.wire import Call


_PAGE = 50


def commits(hub: Hub, call: Call) -> Response:
    """The history of a revision, a page at a time."""
    row = hub.repo(call)
    number = call.number("p", 0, 1 << 20)
    with hub.git(row) as git:
        history = git.history(hub.commit_of(git, call.args["rev"]))
        found = list(islice(history, number * _PAGE, (number + 1) * _PAGE + 1))
    values: dict[str, Any] = {"commits": found[:_PAGE], "more": len(found) > _PAGE, "number": number}
    return page(hub, call, "commits.html.j2", row=row, rev=call.args["rev"], **values)


def commit(hub: Hub, call: Call) -> Response:
    """One commit with what it changed."""
    with opened(hub, call) as (row, git):
        oid = hub.commit_of(git, call.args["rev"])
        entry, *before = islice(git.history(oid), 2)
        parent = before[0].oid if before else None
        diff = diff_commits(git, parent, oid)
    return page(hub, call, "commit.html.j2", row=row, commit=entry, parent=parent, diff=diff)


ROUTES = [
    page_route("/{web}{repo}/commits/{rev}", commits),
    page_route("/{web}{repo}/commit/{rev}", commit),
]
