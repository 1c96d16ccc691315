"""Routes of pages above repositories: the list with its search, namespaces, signing in, the stylesheet."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.pages.rendering import page, page_route
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault


_PAGE = 30
_STYLE = (files(__package__) / "static" / "hub.css").read_bytes()


def everything(hub: Hub, call: Call) -> Response:
    """All repositories the viewer may see."""
    return _listed(hub, call, None, "Repositories")


def models(hub: Hub, call: Call) -> Response:
    """All models."""
    return _listed(hub, call, "model", "Models")


def datasets(hub: Hub, call: Call) -> Response:
    """All data sets."""
    return _listed(hub, call, "dataset", "Data sets")


def namespace(hub: Hub, call: Call) -> Response:
    """What a user or an organisation has."""
    name = call.args["namespace"]
    rows = [row for row in _seen(hub, call, None) if row.namespace.lower() == name.lower()]
    members = _members(hub, name, rows)
    if not rows and not members:
        raise HubFault(404, f"Nothing here is called {name}")
    shown = rows[0].namespace if rows else members[0]
    lists = {"Models": [row for row in rows if row.kind == "model"]}
    lists["Data sets"] = [row for row in rows if row.kind != "model"]
    values: dict[str, Any] = {"name": shown, "members": members}
    return page(hub, call, "namespace.html.j2", lists={k: _dated(hub, v) for k, v in lists.items()}, **values)


def sign_in(hub: Hub, call: Call) -> Response:
    """Make a browser ask for a name and a token, which it then sends along by itself."""
    if call.user is None:
        raise HubFault(
            401,
            "Sign in with your user name, and one of your tokens as the password.",
            headers={"WWW-Authenticate": 'Basic realm="Hub", charset="UTF-8"'},
        )
    return Response(status_code=303, headers={"Location": "/", "Cache-Control": "no-store"})


def style(hub: Hub, call: Call) -> Response:
    """The one stylesheet."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=600"}
    return Response(_STYLE, headers=headers, media_type="text/css")


def _listed(hub: Hub, call: Call, kind: str | None, title: str) -> Response:
    search = (call.query("search") or "").strip()
    rows = [row for row in _seen(hub, call, kind) if search.lower() in row.id.lower()]
    number = call.number("p", 0, 1 << 20)
    shown = rows[number * _PAGE : (number + 1) * _PAGE]
    more = (number + 1) * _PAGE < len(rows)
    values: dict[str, Any] = {"title": title, "search": search, "count": len(rows), "number": number, "more": more}
    return page(hub, call, "list.html.j2", rows=_dated(hub, shown), **values)


def _seen(hub: Hub, call: Call, kind: str | None) -> list[RepoRow]:
    return [row for row in hub.database.repos(kind) if hub.may_see(row, call.user)]


def _dated(hub: Hub, rows: list[RepoRow]) -> list[tuple[RepoRow, int, str]]:
    """Rows with the time and the title of their last commit on main."""
    dated = []
    for row in rows:
        with hub.git(row) as git:
            head = next(git.history(hub.commit_of(git, DEFAULT_BRANCH)))
        dated.append((row, head.time, head.title))
    return dated


def _members(hub: Hub, name: str, rows: list[RepoRow]) -> list[str]:
    """The user of that name, or who has repositories in the organisation."""
    users = [user for user in hub.users if user.lower() == name.lower()]
    return users or sorted({row.owner for row in rows})


ROUTES = [
    page_route("/", everything),
    page_route("/models", models),
    page_route("/datasets", datasets),
    page_route("/login", sign_in),
    route("GET", "/_pages/static/hub.css", style),
    page_route("/{namespace}", namespace),
]
