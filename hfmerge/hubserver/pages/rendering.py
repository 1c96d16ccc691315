"""Values into HTML: the one environment of templates, the headers of every page, addresses, sizes and dates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import Hub, moment
from hfmerge.hubserver.routing import Handler, Route, route
from hfmerge.hubserver.wire import Call, HubFault, repo_path, segment


# First segments of addresses that are for programs.
_PROGRAMS = "api|cas|cdn|_signed|_control"

# Controls, marks that turn the direction of text around, invisible tags, halves of characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with letters that nobody sees, or that reorder others, written as their code."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finalized(value: Any) -> Any:
    """What a template puts out for an expression, before it is escaped."""
    if isinstance(value, Markup):
        return value
    return visible(value) if isinstance(value, str) else value


def link(row: RepoRow, verb: str = "", revision: str = "", path: str = "") -> str:
    """The address of a page or file of a repository."""
    parts = [repo_path(row.kind, quote(row.id)), verb, segment(revision), quote(path)]
    return "/".join(part for part in parts if part)


def again(call: Call, **changes: Any) -> str:
    """The address of this page with other query parameters; None takes one away."""
    query = {key: value for key, value in call.request.query_params.items() if key not in changes}
    query |= {key: str(value) for key, value in changes.items() if value is not None}
    return "?" + urlencode(query)


def human_size(count: int) -> str:
    """Bytes as people read them."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def day(value: int | str) -> str:
    """A time, in seconds or as the API writes it, to the minute."""
    text = value if isinstance(value, str) else moment(value)
    return text[:16].replace("T", " ")


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("hfmerge.hubserver.pages", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_finalized,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"link": link, "again": again, "human_size": human_size, "day": day}


def page(hub: Hub, call: Call, template: str, **values: Any) -> Response:
    """A page for the user of a request."""
    text = _TEMPLATES.get_template(template).render(call=call, user=call.user, **values)
    return _html(hub, text, forms=template in ("list.html.j2", "namespace.html.j2"))


def fault_page(hub: Hub, request: Request, fault: HubFault) -> Response:
    """The answer for a fault: a page for a browser, JSON for a program."""
    wanted = request.method in ("GET", "HEAD") and "text/html" in request.headers.get("accept", "")
    if not wanted or fault.status < 400 or re.match(rf"/({_PROGRAMS})/", request.scope["path"]):
        return fault.response()
    # One answer for what is not there and for what may not be known.
    status = 404 if fault.code == "RepoNotFound" else fault.status
    text = _TEMPLATES.get_template("fault.html.j2").render(user=None, status=status, message=fault.message)
    headers = {**dict(fault.response().headers), **fault.headers}
    for name in ("content-length", "content-type"):
        headers.pop(name, None)
    return _html(hub, text, status=status, headers=headers)


def _html(
    hub: Hub, text: str, *, status: int = 200, forms: bool = False, headers: Mapping[str, str] | None = None
) -> Response:
    pictures = "'self'" + (f" http://127.0.0.1:{hub.cdn_port} http://localhost:{hub.cdn_port}" if hub.cdn_port else "")
    policy = f"default-src 'none'; style-src 'self'; img-src {pictures}; base-uri 'none'; frame-ancestors 'none';" + (
        " form-action 'self'" if forms else " form-action 'none'"
    )
    return Response(
        text.encode("utf-8", "backslashreplace"),
        status_code=status,
        headers={
            **(headers or {}),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "private, no-cache",
            "Vary": "Authorization",
        },
        media_type="text/html",
    )


def page_route(template: str, handler: Handler) -> Route:
    """A route to a page; addresses for programs stay what they are."""
    made = route("GET", template, handler)
    return replace(made, pattern=re.compile(f"(?!/(?:{_PROGRAMS})(?:/|$)){made.pattern.pattern}"), short=None)
