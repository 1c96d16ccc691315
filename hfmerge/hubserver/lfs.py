"""Routes of Git-LFS: the batch, objects in one piece or in parts, and their verification."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from hfmerge.hubserver.blobs import Incoming
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import URL_SECONDS, Hub
from hfmerge.hubserver.lfsdownload import batch_download
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, reply, repo_path


_OID = re.compile(r"[0-9a-f]{64}")
_MOST_OBJECTS = 1000
_MOST_PARTS = 10_000
_CHUNK = 1 << 20


def batch(hub: Hub, call: Call) -> Response:
    """Where to send or to get which objects; to send those the repository has needs no action."""
    body = call.json()
    if body.get("operation") == "download":
        return batch_download(hub, call, body)
    ref = body.get("ref")
    revision = ref.get("name") if isinstance(ref, dict) else None
    # Without a reference the objects are for a pull request that will be opened with the commit.
    row = hub.pushable(call, revision, opens_pull=revision is None)
    objects = body.get("objects")
    if not isinstance(objects, list) or len(objects) > _MOST_OBJECTS:
        raise HubFault(400, f'"objects" must be a list of at most {_MOST_OBJECTS} objects')
    multipart = "multipart" in body.get("transfers", [])
    answers = [_action(hub, call, row, item, multipart) for item in objects]
    parted = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in answers)
    return reply({"transfer": "multipart" if parted else "basic", "objects": answers, "hash_algo": "sha256"})


async def put_object(hub: Hub, call: Call) -> Response:
    """Receive an object in one piece."""
    claims = hub.signer.check("object", call.args["token"])
    with hub.blobs.receive() as incoming:
        async for data in _pieces(call):
            if incoming.size + len(data) > claims["size"]:
                raise HubFault(400, f"The object is longer than the {claims['size']} bytes announced")
            await run_in_threadpool(incoming.write, data)
        await run_in_threadpool(_keep, hub, incoming, claims)
    return reply({})


async def put_part(hub: Hub, call: Call) -> Response:
    """Receive one part of an object; its entity tag is its sha256."""
    claims = hub.signer.check("part", call.args["token"])
    handle, temporary = tempfile.mkstemp(dir=hub.blobs.temporary)
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file:
            async for data in _pieces(call):
                if file.tell() + len(data) > hub.part_size:
                    raise HubFault(400, f"The part is longer than {hub.part_size} bytes")
                await run_in_threadpool(file.write, data)
                digest.update(data)
        name = f"{claims['upload']}.{claims['part']}."
        earlier = list(hub.blobs.temporary.glob(f"{name}*"))
        os.replace(temporary, hub.blobs.temporary / (name + digest.hexdigest()))
        for path in earlier:  # a part that is sent again and again takes its place once
            if path.name != name + digest.hexdigest():
                path.unlink(missing_ok=True)
    except BaseException:  # an upload that ends early leaves nothing
        os.unlink(temporary)
        raise
    return Response(headers={"ETag": f'"{digest.hexdigest()}"'})


def complete(hub: Hub, call: Call) -> Response:
    """Join the parts of an object."""
    claims = _completes(hub, call)
    parts = call.json().get("parts")
    if not isinstance(parts, list) or len(parts) != claims["parts"]:
        raise HubFault(400, f"Expected {claims['parts']} parts")
    paths = []
    for number, part in enumerate(parts, start=1):
        etag = str(part.get("etag", "")).strip('"') if isinstance(part, dict) else ""
        path = hub.blobs.temporary / f"{claims['upload']}.{number}.{etag}"
        if not _OID.fullmatch(etag) or part.get("partNumber") != number or not path.exists():
            raise HubFault(400, f"Part {number} was not received with that entity tag")
        paths.append(path)
    try:
        with hub.blobs.receive() as incoming:
            for path in paths:
                with path.open("rb") as file:
                    while data := file.read(_CHUNK):
                        incoming.write(data)
            _keep(hub, incoming, claims)
    finally:  # parts that make another object than announced make it again when they are joined again
        for path in paths:
            path.unlink(missing_ok=True)
    return reply({})


def verify(hub: Hub, call: Call) -> Response:
    """Whether an object has arrived."""
    row = hub.repo(call)
    hub.require_user(call)
    body = call.json()
    oid = str(body.get("oid"))
    if not hub.database.linked(row.rid, oid) or hub.blobs.size(oid) != body.get("size"):
        raise HubFault(404, f"LFS object {oid} is not here with that size")
    return reply({})


def _action(hub: Hub, call: Call, row: RepoRow, item: Any, multipart: bool) -> dict[str, Any]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not isinstance(size, int) or not _OID.fullmatch(oid) or size < 0:
        raise HubFault(400, 'Each object needs an "oid" of 64 hex digits and a "size"')
    answer: dict[str, Any] = {"oid": oid, "size": size}
    # Knowing a hash is no proof of having the object: only what this repository has may be skipped.
    if hub.database.linked(row.rid, oid) and hub.blobs.size(oid) == size:
        return answer
    try:
        hub.blobs.require_room(size)
    except ValueError as error:
        raise HubFault(413, f"{oid}: {error}") from error
    claims: dict[str, object] = {"rid": row.rid, "oid": oid, "size": size}
    verification = call.origin + repo_path(row.kind, row.id) + ".git/info/lfs/verify"
    if multipart and size > hub.part_size:
        count = -(-size // hub.part_size)
        if count > _MOST_PARTS:
            raise HubFault(413, f"{oid}: more than {_MOST_PARTS} parts")
        hub.blobs.clear_stale(URL_SECONDS)
        claims |= {"upload": uuid.uuid4().hex, "parts": count}
        header = {"chunk_size": str(hub.part_size)}
        for number in range(1, count + 1):
            header[str(number)] = hub.signed_url(call, "part", {"upload": claims["upload"], "part": number})
        upload = {"href": hub.signed_url(call, "complete", claims), "header": header}
    else:
        upload = {"href": hub.signed_url(call, "object", claims), "header": {}}
    return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": {"href": verification}}}


def _keep(hub: Hub, incoming: Incoming, claims: dict[str, Any]) -> None:
    try:
        incoming.keep(claims["oid"], claims["size"])
    except ValueError as error:
        raise HubFault(400, f"The object is not what was announced: {error}") from error
    hub.link(claims["rid"], claims["oid"])


async def _pieces(call: Call) -> AsyncIterator[bytes]:
    buffer = bytearray()
    async for data in call.request.stream():
        buffer += data
        if len(buffer) >= _CHUNK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _completes(hub: Hub, call: Call) -> dict[str, Any]:
    return hub.signer.check("complete", call.args["token"])


ROUTES = [
    route("POST", "/{web}{repo}.git/info/lfs/objects/batch", batch, reads=True),
    route("POST", "/{web}{repo}.git/info/lfs/verify", verify, check=Hub.speaker, reads=True),
    route("PUT", "/_signed/object/{token}", put_object, open=True),
    route("PUT", "/_signed/part/{token}", put_part, open=True),
    route("POST", "/_signed/complete/{token}", complete, check=_completes, open=True),
]
