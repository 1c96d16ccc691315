"""Requests and answers as the handlers see them: the call, the faults with their headers, JSON replies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from hfmerge.hubserver.plain import load_json


class HubFault(Exception):
    """An answer that is not a success: status, `X-Error-Code`, `X-Error-Message`, and the JSON body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def response(self) -> Response:
        """The fault as HTTP: the client chooses its exception from the code header, not from the status."""
        # A header holds one Latin-1 line without control characters; the body keeps the text as it is.
        line = "".join(letter if 31 < ord(letter) < 127 or 159 < ord(letter) < 256 else "?" for letter in self.message)
        headers = {"X-Error-Message": line.strip(), **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return reply({"error": self.message, **self.extra}, status=self.status, headers=headers)


@dataclass(frozen=True)
class Call:
    """One request: its path arguments (decoded), who makes it, and its body (empty for streaming handlers).

    `repo_span` is where the repository's id stands in the raw path, None if the path names none. `role` is what the
    user's token may do, `read` or `write`.
    """

    request: Request
    args: Mapping[str, str]
    repo_span: tuple[int, int] | None
    user: str | None
    origin: str
    body: bytes
    role: str = "write"

    @property
    def kind(self) -> str:
        """`model` or `dataset`."""
        return self.args.get("kind", "models")[:-1]

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty object.

        Raises:
            HubFault: 400 if the body is something else.
        """
        try:
            value = load_json(self.body) if self.body.strip() else {}
        except ValueError as error:
            raise HubFault(400, f"The request body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise HubFault(400, "The request body must be a JSON object")
        return value

    def query(self, name: str) -> str | None:
        """The value of a query parameter, the last one if it is repeated."""
        return self.request.query_params.get(name)

    def queries(self, *names: str) -> list[str]:
        """All values of a repeatable query parameter, under any of its names."""
        return [value for key, value in self.request.query_params.multi_items() if key in names]

    def flag(self, name: str) -> bool:
        """A query parameter that is on or off."""
        return truthy(self.query(name))

    def number(self, name: str, default: int, most: int) -> int:
        """A non-negative whole query parameter, capped at `most`."""
        text = self.query(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit():
            raise HubFault(400, f'Query parameter "{name}" must be a whole number, got "{text}"')
        return min(int(text), most)


def truthy(text: str | None) -> bool:
    """What the clients send for true: `True`, `true`, `1`."""
    return text is not None and text.lower() in ("1", "true", "yes")


def reply(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return Response(body, status_code=status, headers=dict(headers or {}), media_type="application/json")


def text_field(body: Mapping[str, Any], name: str, *, required: bool = True) -> str:
    """A text of a JSON body, stripped.

    Raises:
        HubFault: 400 if it is not a text, or is empty though required.
    """
    value = body.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value.strip()):
        raise HubFault(400, f'"{name}" must be a text' + (" that is not empty" if required else ""))
    return value.strip()


def forbidden(message: str) -> HubFault:
    """403 without a code: known, but not allowed."""
    return HubFault(403, message)


def login_needed() -> HubFault:
    """401 for something only a user may do."""
    return HubFault(401, "Invalid username or password.", headers={"WWW-Authenticate": "Bearer"})


def repo_missing(user: str | None) -> HubFault:
    """A repository that does not exist or may not be seen: the same answer for both."""
    if user is None:
        return HubFault(401, "Repository not found", "RepoNotFound")
    return HubFault(404, "Repository not found", "RepoNotFound")


def revision_missing(revision: str) -> HubFault:
    """A branch, tag or commit that does not exist."""
    return HubFault(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_missing(message: str, commit: str) -> HubFault:
    """A file or folder that the commit does not have; the client caches that for this commit."""
    return HubFault(404, message, "EntryNotFound", headers={"X-Repo-Commit": commit})


def not_implemented(what: str) -> HubFault:
    """A known route of the Hub that this server leaves out."""
    return HubFault(501, f"This server does not implement {what}", "NotImplemented")


def repo_path(kind: str, repo_id: str) -> str:
    """The path of a repository's page: `/org/name` or `/datasets/org/name`."""
    return f"/{repo_id}" if kind == "model" else f"/{kind}s/{repo_id}"


def segment(text: str) -> str:
    """A text as one percent-encoded path segment."""
    return quote(text, safe="")
