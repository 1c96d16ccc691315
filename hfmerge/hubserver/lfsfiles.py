"""Routes that list the large files of a repository, and delete some for good."""

from __future__ import annotations

from starlette.responses import Response

from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, GitStore
from hfmerge.hubserver.hub import Hub, moment
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, not_implemented, reply


_PAGE = 1000


def listing(hub: Hub, call: Call) -> Response:
    """Every large file that was sent to the repository and not deleted since, whether a commit names it or not."""
    row = hub.writable(call)
    start = call.number("cursor", 0, 1 << 40)
    oids = hub.database.objects(row.rid)
    with hub.git(row) as git:
        names = _names(git)
    page = []
    for oid in oids[start : start + _PAGE]:
        info = hub.blobs.path(oid).stat()
        name, ref = names.get(oid, (oid, None))
        item = {"fileOid": oid, "oid": oid, "filename": name, "ref": ref}
        page.append({**item, "pushedAt": moment(info.st_mtime), "size": info.st_size})
    headers = {"X-Total-Count": str(len(oids))}
    if start + len(page) < len(oids):
        url = call.request.url.include_query_params(cursor=start + len(page))
        headers["Link"] = f'<{call.origin}{url.path}?{url.query}>; rel="next"'
    return reply(page, headers=headers)


def delete(hub: Hub, call: Call) -> Response:
    """Take large files from the repository: commits that name them stay, and no longer give them.

    The objects themselves go, like all that no repository has, when the server starts next.
    """
    row = hub.writable(call)
    changes = call.json().get("deletions")
    oids = changes.get("sha") if isinstance(changes, dict) else None
    if not isinstance(oids, list) or not all(isinstance(oid, str) for oid in oids):
        raise HubFault(400, '"deletions.sha" must be a list of object ids')
    if isinstance(changes, dict) and changes.get("rewriteHistory", True):
        raise not_implemented("rewriting history while large files are deleted")
    for oid in oids:
        if not hub.database.linked(row.rid, oid):
            raise HubFault(404, f"LFS object {oid} is not here")
    for oid in oids:
        hub.database.unlink(row.rid, oid)
    return reply({})


def _names(git: GitStore) -> dict[str, tuple[str, str]]:
    """Object id -> a path it has at the end of some reference, and the reference; main before all others."""
    names: dict[str, tuple[str, str]] = {}
    for ref, commit in sorted(git.refs("refs/"), key=lambda item: item[0] != DEFAULT_BRANCH):
        for entry in git.entries(commit, recursive=True):
            if entry.lfs is not None:
                names.setdefault(entry.lfs.oid, (entry.path, ref))
    return names


ROUTES = [
    route("GET", "/api/{kind}/{repo}/lfs-files", listing),
    route("POST", "/api/{kind}/{repo}/lfs-files/batch", delete, check=Hub.writable),
]
