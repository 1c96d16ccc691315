"""Large files for git-lfs: where to get those that a clone only points to."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.gitserve import readable
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.wire import Call, HubFault, reply


_OID = re.compile(r"[0-9a-f]{64}")
_MOST_OBJECTS = 1000
_SECONDS = 3600


def batch_download(hub: Hub, call: Call, body: dict[str, Any]) -> Response:
    """An address for each object the repository has, for whoever may read it."""
    row = readable(hub, call)
    objects = body.get("objects")
    if not isinstance(objects, list) or len(objects) > _MOST_OBJECTS:
        raise HubFault(400, f'"objects" must be a list of at most {_MOST_OBJECTS} objects')
    answer = {"transfer": "basic", "objects": [_found(hub, call, row.rid, item) for item in objects]}
    return reply({**answer, "hash_algo": "sha256"}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _found(hub: Hub, call: Call, rid: str, item: Any) -> dict[str, Any]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not _OID.fullmatch(oid) or not isinstance(size, int):
        raise HubFault(400, 'Each object needs an "oid" of 64 hex digits and a "size"')
    # Knowing a hash is no right to the object: another repository may have it.
    if not hub.database.linked(rid, oid) or hub.blobs.size(oid) != size:
        return {"oid": oid, "size": size, "error": {"code": 404, "message": "The repository has no such object"}}
    href = hub.signed_url(call, "fetch", {"oid": oid, "name": oid}, seconds=_SECONDS)
    download = {"href": href, "header": {}, "expires_in": _SECONDS}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"download": download}}
