"""Routes of git itself: clone and fetch over HTTP by dulwich's own server; a push is refused in words git shows.

A clone with `--depth` works; to bring it up to date it needs `git fetch --unshallow` first, which dulwich understands.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

from dulwich.errors import GitProtocolError
from dulwich.repo import Repo
from dulwich.server import Backend
from dulwich.web import HTTPGitApplication
from starlette.responses import Response, StreamingResponse

from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault


_UPLOAD = "git-upload-pack"
_READ_ONLY = "This Hub takes no pushes over git. Upload with `hf upload`, or with huggingface_hub."
# What a client wants and has, before and after it is unpacked.
_MOST_REQUEST = 8 << 20
_MOST_UNPACKED = 32 << 20
_CHUNK = 1 << 20

CHALLENGE = {"WWW-Authenticate": 'Basic realm="Hub", charset="UTF-8"'}


def readable(hub: Hub, call: Call) -> RepoRow:
    """The repository of a request, whose files its user may have; a 401 has git ask for a name and a token."""
    try:
        row = hub.repo(call)
        hub.require_content(row, call)
    except HubFault as fault:
        if fault.status == 401:
            fault.headers |= CHALLENGE
        raise
    return row


def advertise(hub: Hub, call: Call) -> Response:
    """The references of a repository: the first thing git asks for."""
    try:
        row = readable(hub, call)
        if call.query("service") == "git-receive-pack":
            raise HubFault(403, _READ_ONLY)
        if call.query("service") != _UPLOAD:
            raise HubFault(403, "This Hub speaks smart HTTP only; use git 1.6.6 or newer.")
        return _served(hub, row, "GET", "/info/refs", f"service={_UPLOAD}", b"")
    except HubFault as fault:
        if fault.status < 400:
            raise
        # git shows an answer of this type to its user, and no other.
        headers = {name: value for name, value in fault.response().headers.items() if not name.startswith("content-")}
        return Response(f"{fault.message}\n", fault.status, headers, "text/plain")


def send_pack(hub: Hub, call: Call) -> Response:
    """The objects that a client wants and does not have."""
    row = readable(hub, call)
    body = call.body
    if call.request.headers.get("content-encoding") == "gzip":
        body = _unpacked(body)
    return _served(hub, row, "POST", f"/{_UPLOAD}", "", body, call.request.headers.get("content-type", ""))


def take_pack(hub: Hub, call: Call) -> Response:
    """A push that goes on though it was told not to."""
    readable(hub, call)
    raise HubFault(403, _READ_ONLY)


class _One(Backend):
    """The one repository a request is about, whatever path dulwich makes of its address."""

    def __init__(self, repo: Repo):
        self._repo = repo

    def open_repository(self, path: str) -> Repo:
        return self._repo


def _served(
    hub: Hub, row: RepoRow, method: str, path: str, query: str, body: bytes, content_type: str = ""
) -> Response:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
    }
    started: list[Any] = []
    # A clone may be large; it is written to a file without a name before it is sent.
    answer = hub.blobs.scratch()

    def start(status: str, headers: list[tuple[str, str]]) -> Any:
        started[:] = [int(status.split()[0]), dict(headers)]
        return answer.write

    try:
        repo = Repo(str(hub.git_path(row.rid)), bare=True)
        try:
            for data in HTTPGitApplication(_One(repo))(environ, start):
                answer.write(data)
        finally:
            repo.close()
    except (GitProtocolError, ValueError, KeyError, IndexError, AssertionError, OSError) as error:
        answer.close()
        raise HubFault(400, f"git could not be answered: {error}") from error
    status, headers = started
    size = answer.tell()
    return StreamingResponse(_pieces(answer), status, {**headers, "Content-Length": str(size)})


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while data := file.read(_CHUNK):
            yield data


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        result = unpacker.decompress(data, _MOST_UNPACKED)
    except zlib.error as error:
        raise HubFault(400, f"The body is not gzip: {error}") from error
    if unpacker.unconsumed_tail:
        raise HubFault(413, f"The body is longer than {_MOST_UNPACKED} bytes")
    return result


ROUTES = [
    route(method, f"/{{web}}{{repo}}{git}/{end}", handler, check=readable, most=_MOST_REQUEST, reads=True)
    for git in (".git", "")
    for method, end, handler in (
        ("GET", "info/refs", advertise),
        ("POST", "git-upload-pack", send_pack),
        ("POST", "git-receive-pack", take_pack),
    )
]
