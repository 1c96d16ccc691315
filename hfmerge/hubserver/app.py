"""The ASGI application: finds the route, knows the user, turns faults into answers, writes the request log."""

from __future__ import annotations

import json
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hfmerge.hubserver import (
    control,
    discussions,
    download,
    gitserve,
    lfs,
    lfsfiles,
    listing,
    organizations,
    pages,
    repos,
    upload,
    xet,
)
from hfmerge.hubserver.basic import caller
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.routing import Match, find
from hfmerge.hubserver.wire import Call, HubFault, forbidden, not_implemented


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_HOST = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?", re.ASCII)

_REQUEST_ID = re.compile(r"[\w.:;=+/-]{1,200}", re.ASCII)

_ROUTES = [
    *organizations.ROUTES,
    *repos.ROUTES,
    *listing.ROUTES,
    *discussions.ROUTES,
    *upload.ROUTES,
    *xet.ROUTES,
    *control.ROUTES,
    *gitserve.ROUTES,
    *lfs.ROUTES,
    *lfsfiles.ROUTES,
    *download.ROUTES,
]

# First segments (after `/api/`, if there is one) of routes that the Hub has and this server leaves out.
_ABSENT = (
    *("spaces", "kernels", "buckets", "collections", "jobs", "scheduled-jobs", "papers", "daily_papers"),
    *("settings", "users", "organizations", "oauth", "models-tags-by-type", "datasets-tags-by-type"),
)


class RequestLog:
    """One JSON object a line: what was asked, by whom, and what was sent."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, at once readable by others."""
        with self._lock:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()


class HubApp:
    """The application; requests on the second port are answered as by a CDN that knows nothing else."""

    def __init__(self, hub: Hub, log: RequestLog | None = None):
        self._hub = hub
        self._log = log

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        record: dict[str, Any] = {
            "method": request.method,
            "path": scope["raw_path"].decode("latin-1"),
            "query": scope["query_string"].decode("latin-1"),
            "status": 0,
            "bytes": 0,
            "range": request.headers.get("range"),
            "port": scope["server"][1],
            "user": None,
            "authorization": "authorization" in request.headers,
            "id": _request_id(request),
        }
        logged = False

        async def logging_send(message: Message) -> None:
            nonlocal logged
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record["id"].encode())]
            elif message["type"] == "http.response.body":
                record["bytes"] += len(message.get("body", b"")) if request.method != "HEAD" else 0
                if not message.get("more_body", False):
                    # Before the last bytes leave: whoever has the answer finds it in the log.
                    logged = True
                    self._write(record)
            await send(message)

        try:
            try:
                match = self._match(request)
                user, role = None, "write"
                if not match.route.open:
                    known = caller(self._hub, request)
                    user, role = known if known is not None else (None, role)
                record["user"] = user
                response = await self._answer(request, match, user, role)
            except HubFault as fault:
                response = pages.fault_page(self._hub, request, fault)
            except ClientDisconnect:
                raise
            except Exception:  # a fault of the server: shown in its log, answered with 500, fatal to no other request
                traceback.print_exc(file=sys.stderr)
                response = HubFault(500, f"Internal error, request id {record['id']}").response()
            await response(scope, receive, logging_send)
        except ClientDisconnect:
            return  # nobody is left to answer
        finally:
            if not logged:
                self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(record)

    def _match(self, request: Request) -> Match:
        if not _HOST.fullmatch(request.headers.get("host", "localhost")):
            raise HubFault(400, "Malformed Host header")
        path = request.scope["raw_path"].decode("latin-1")
        is_cdn = request.scope["server"][1] == self._hub.cdn_port
        match, methods = find(download.CDN_ROUTES if is_cdn else _ROUTES, request.method, path)
        if match is not None:
            return match
        if methods:
            raise HubFault(405, f"{request.method} is not allowed here", headers={"Allow": ", ".join(methods)})
        first = path.removeprefix("/api/").strip("/").split("/")[0]
        if first in _ABSENT and not is_cdn:
            raise not_implemented(first)
        if not is_cdn and (match := find(pages.ROUTES, request.method, path)[0]) is not None:
            return match
        raise HubFault(404, f"No such route: {request.method} {path}")

    async def _answer(self, request: Request, match: Match, user: str | None, role: str) -> Response:
        route = match.route
        if role == "read" and not route.reads:
            raise forbidden("This token may only read; use one with the role `write`")
        host, port = request.scope["server"]
        origin = f"{request.scope['scheme']}://{request.headers.get('host') or f'{host}:{port}'}"
        call = Call(request, match.arguments, match.repo_span, user, origin, b"", role)
        if match.streams:
            return await cast(Awaitable[Response], route.handler(self._hub, call))
        if route.most:
            # Who may not do this learns it before sending much, and before anything of theirs takes memory.
            if route.check is not None:
                await run_in_threadpool(route.check, self._hub, call)
            call = replace(call, body=await _body(request, route.most))
        return cast(Response, await run_in_threadpool(route.handler, self._hub, call))


def _request_id(request: Request) -> str:
    """The name that the client gave its request, so that its errors and the log agree; a new one if it gave none."""
    given = request.headers.get("x-request-id") or request.headers.get("x-amzn-trace-id") or ""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _body(request: Request, most: int) -> bytes:
    too_long = HubFault(413, f"The body is longer than {most} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > most:
        raise too_long
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > most:
            raise too_long
    return bytes(body)
