"""Routes that serve files: whole or in part, with the headers by which clients cache them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import AsyncIterator
from email.utils import quote as quote_text
from pathlib import Path
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from hfmerge.hubserver.gitstore import Entry
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, entry_missing, reply


_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)

# Whatever a file holds, a browser must not run it as a page of this server.
_HARMLESS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-site",
}
# Pictures are told by their name, so that cards can show them; none of these kinds can hold a script.
_PICTURES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp"}


def resolve(hub: Hub, call: Call) -> Response:
    """A file of a revision: its content, not its LFS pointer."""
    entry, commit, data = _fetch(hub, call)
    etag = f'"{entry.lfs.oid if entry.lfs else entry.oid}"'
    headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes", **_HARMLESS}
    if entry.lfs is None:
        return _send(call, headers, len(data), data, "text/plain; charset=utf-8")
    if not entry.lfs.present:
        raise entry_missing(f"{entry.path}: this large file was deleted", commit)
    headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)}
    if hub.cdn_port is not None:
        claims: dict[str, object] = {"oid": entry.lfs.oid, "name": entry.path.rpartition("/")[2]}
        host = call.request.url.hostname or "127.0.0.1"
        token, _ = hub.signer.sign("cdn", claims, seconds=3600)
        headers["Location"] = f"http://{f'[{host}]' if ':' in host else host}:{hub.cdn_port}/cdn/{token}"
        return reply({"redirect": "cdn"}, status=302, headers=headers)
    return _send(call, headers, entry.size, hub.object_path(entry), _media_type(entry.path))


def raw(hub: Hub, call: Call) -> Response:
    """A file as git has it: for a large file, its pointer."""
    entry, commit, _ = _fetch(hub, call)
    with hub.git(hub.repo(call)) as git:
        data = git.read(entry.oid)
    headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes", **_HARMLESS}
    return _send(call, headers, len(data), data, "text/plain; charset=utf-8")


def cdn(hub: Hub, call: Call) -> Response:
    """A large object on the second port, for whoever holds a signed address."""
    return _signed(hub, call, "cdn")


def fetch(hub: Hub, call: Call) -> Response:
    """A large object for git-lfs, which holds a signed address."""
    return _signed(hub, call, "fetch")


def _signed(hub: Hub, call: Call, scope: str) -> Response:
    claims = hub.signer.check(scope, call.args["token"])
    size = hub.blobs.size(claims["oid"])
    if size is None:
        raise HubFault(404, "No such object")
    name = claims["name"]
    headers = {
        "ETag": f'"{claims["oid"]}"',
        "Accept-Ranges": "bytes",
        **_HARMLESS,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote_text(_ascii(name))}\"",
    }
    return _send(call, headers, size, hub.blobs.path(claims["oid"]), _media_type(name))


def _fetch(hub: Hub, call: Call) -> tuple[Entry, str, bytes]:
    row = hub.repo(call)
    hub.require_content(row, call)
    with hub.git(row) as git:
        commit = hub.commit_of(git, call.args["rev"])
        entry = hub.file_at(git, commit, call.args["path"].strip("/"))
        return entry, commit, b"" if entry.lfs is not None else git.read(entry.oid)


def _media_type(path: str) -> str:
    kind = _PICTURES.get(posixpath.splitext(path.lower())[1])
    return f"image/{kind}" if kind is not None else "application/octet-stream"


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def _send(call: Call, headers: dict[str, str], size: int, source: bytes | Path, media_type: str) -> Response:
    request = call.request.headers
    if headers["ETag"] in [tag.strip() for tag in request.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    wanted = request.get("range") if request.get("if-range", headers["ETag"]) == headers["ETag"] else None
    if wanted is not None and (window := _window(wanted, size)) is not None:
        start, end = window
        status = 206
        headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
    headers = {**headers, "Content-Length": str(end - start)}
    if call.request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    if isinstance(source, bytes):
        return Response(source[start:end], status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(_chunks(source, start, end), status_code=status, headers=headers, media_type=media_type)


def _window(text: str, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes a `Range` header asks for; None to send everything.

    Raises:
        HubFault: 416 if it lies behind the end.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None or match[1] == match[2] == "":
        return None  # several ranges, or not a range: a server may send the whole
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), size if match[2] == "" else min(size, int(match[2]) + 1)
        if match[2] != "" and int(match[2]) < int(match[1]):
            return None
    if start >= size or start >= end:
        raise HubFault(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


async def _chunks(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    file = await run_in_threadpool(path.open, "rb")
    try:
        file.seek(start)
        left = end - start
        while left > 0:
            data = await run_in_threadpool(file.read, min(_CHUNK, left))
            if not data:
                raise OSError(f"{path}: shorter than it was")
            left -= len(data)
            yield data
    finally:
        file.close()


ROUTES = [
    route("GET", "/{web}{repo}/resolve/{rev}/{path}", resolve),
    route("GET", "/{web}{repo}/raw/{rev}/{path}", raw),
    route("GET", "/_signed/fetch/{token}", fetch, open=True),
]
# Only these answer on the second port.
CDN_ROUTES = [route("GET", "/cdn/{token}", cdn, open=True)]
