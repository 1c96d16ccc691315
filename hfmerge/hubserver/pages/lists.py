"""Routes of pages above repositories: the list with its search, namespaces, signing in, the stylesheet."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.info import listed
from hfmerge.hubserver.pages.rendering import page, page_route
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault


_PAGE = 30
_MOST = 300
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
    user, org = hub.accounts.user(name), hub.accounts.org(name)
    members = hub.accounts.members(org) if org is not None else []
    # Who sees nothing of an organisation does not learn that it exists.
    if user is None and not rows and call.user not in [member for member, _ in members]:
        raise HubFault(404, f"Nothing here is called {name}")
    lists = {"Models": [row for row in rows if row.kind == "model"]}
    lists["Data sets"] = [row for row in rows if row.kind != "model"]
    values: dict[str, Any] = {"name": user or org or rows[0].namespace, "members": members}
    values["more"] = {title: len(found) > _MOST for title, found in lists.items()}
    shown = {title: _dated(hub, found[:_MOST]) for title, found in lists.items()}
    return page(hub, call, "namespace.html.j2", lists=shown, **values)


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


def _dated(hub: Hub, rows: list[RepoRow]) -> list[tuple[RepoRow, str, str]]:
    """Rows with the time of their last commit on main, and what the model is for."""
    dated = []
    for kind in ("model", "dataset"):
        of_kind = [row for row in rows if row.kind == kind]
        found = listed(hub, kind, of_kind)
        facts = {row.rid: found[row.rid][1] for row in of_kind if row.rid in found}
        for row in of_kind:
            if (known := facts.get(row.rid)) is not None:
                dated.append((row, known["lastModified"], known.get("pipeline_tag") or ""))
    return sorted(dated, key=lambda item: rows.index(item[0]))


ROUTES = [
    page_route("/", everything),
    page_route("/models", models),
    page_route("/datasets", datasets),
    page_route("/login", sign_in),
    route("GET", "/_pages/static/hub.css", style),
    page_route("/{namespace}", namespace),
]
