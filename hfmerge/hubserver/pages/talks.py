"""Routes of discussions and pull requests, to read."""

from __future__ import annotations

from itertools import islice
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.database import DiscussionRow, RepoRow
from hfmerge.hubserver.gitstore import GitStore
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.pages.diffs import Diff, diff_commits
from hfmerge.hubserver.pages.markdown import plain, render
from hfmerge.hubserver.pages.reading import refusal
from hfmerge.hubserver.pages.rendering import page, page_route
from hfmerge.hubserver.wire import Call, HubFault, repo_path


_PAGE = 50
_MOST_EVENTS = 300
# Letters of comments that are rendered, and that are shown at all.
_MOST_RENDERED = 64 << 10
_MOST_LETTERS = 1 << 20


def talks(hub: Hub, call: Call) -> Response:
    """Discussions and pull requests, the newest first."""
    row = hub.repo(call)
    number = call.number("p", 0, 1 << 20)
    found = list(reversed(hub.database.discussions(row.rid)))
    values: dict[str, Any] = {"talks": found[number * _PAGE : (number + 1) * _PAGE], "number": number}
    return page(hub, call, "talks.html.j2", row=row, more=(number + 1) * _PAGE < len(found), **values)


def talk(hub: Hub, call: Call) -> Response:
    """One discussion; of a pull request also what it changes, for those who may read the files."""
    row = hub.repo(call)
    found = hub.database.discussion(row.rid, int(call.args["num"]))
    if found is None:
        raise HubFault(404, f"No discussion {call.args['num']} in {row.id}")
    refused = refusal(hub, row, call)
    events = hub.database.events(row.rid, found.num)
    said: list[dict[str, Any]] = []
    letters = 0
    for event in events[:_MOST_EVENTS]:
        letters += len(event["data"]["latest"]["raw"]) if event["type"] == "comment" else 0
        if letters > _MOST_LETTERS and said:
            break
        said.append(_told(event, row, as_it_is=letters > _MOST_RENDERED))
    diff = None
    if found.pull and refused is None:
        with hub.git(row) as git:
            diff = _diff(git, found)
    values: dict[str, Any] = {"talk": found, "events": said, "more": len(events) > len(said), "diff": diff}
    return page(hub, call, "talk.html.j2", row=row, refused=refused, **values)


def _diff(git: GitStore, talk: DiscussionRow) -> Diff | None:
    if talk.merged is not None:
        before = [entry.oid for entry in islice(git.history(talk.merged), 2)][1:]
        return diff_commits(git, before[0] if before else None, talk.merged)
    base, head = git.ref(talk.base), git.ref(f"refs/pr/{talk.num}")
    if base is None or head is None:
        return None
    return diff_commits(git, git.common_ancestor(base, head), head)


def _told(event: dict[str, Any], row: RepoRow, *, as_it_is: bool) -> dict[str, Any]:
    """What an event says: a comment as HTML, anything else as one line of text."""
    data = event["data"]
    told: dict[str, Any] = {"author": event["author"]["name"], "time": event["createdAt"], "html": None, "oid": None}
    if event["type"] == "comment":
        told["line"] = "hid a comment" if data["hidden"] else "wrote" + (" (edited)" if data["edited"] else "")
        if not data["hidden"]:
            raw = data["latest"]["raw"]
            told["html"] = plain(raw) if as_it_is else render(raw, f"{repo_path(row.kind, row.id)} main")
    elif event["type"] == "commit":
        told |= {"line": f"made the commit “{data['subject']}”", "oid": data["oid"]}
    elif event["type"] == "title-change":
        told["line"] = f"changed the title from “{data['from']}” to “{data['to']}”"
    elif event["type"] == "status-change":
        told["line"] = f"set the status to {data['status']}"
    else:
        told["line"] = str(event["type"])
    return told


ROUTES = [
    page_route("/{web}{repo}/discussions", talks),
    page_route("/{web}{repo}/discussions/{num}", talk),
]
