"""Routes that read and change the git side: trees, paths, history, branches, tags, squash, tensor headers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import islice
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import Response

from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, Entry, GitStore, LogEntry, valid_ref
from hfmerge.hubserver.hub import Hub, moment
from hfmerge.hubserver.info import tip_facts
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.safetensors import read_sharded
from hfmerge.hubserver.wire import Call, HubFault, entry_missing, reply, revision_missing, segment, text_field, truthy


_TREE_PAGE = 1000
_EXPANDED_PAGE = 50
_COMMITS_PAGE = 50
# The paths somebody asks about, as a form.
_MOST_PATHS = 32 << 20


def tree(hub: Hub, call: Call) -> Response:
    """The entries of a folder, a page at a time; later pages stay on the commit of the first."""
    row = hub.repo(call)
    folder = call.args.get("path", "").strip("/")
    expand = call.flag("expand")
    size = call.number("limit", _EXPANDED_PAGE if expand else _TREE_PAGE, _EXPANDED_PAGE if expand else _TREE_PAGE)
    start = call.number("cursor", 0, 1 << 40)
    headers = {}
    with hub.git(row) as git:
        commit = hub.commit_of(git, call.args["rev"])
        found = git.lookup(commit, folder)
        if found is None or not found.is_folder:
            raise entry_missing(f'{folder} does not exist on "{call.args["rev"]}"', commit)
        entries = git.entries(commit, folder, recursive=call.flag("recursive"), start=start, stop=start + size + 1)
        page = list(entries)
        if len(page) > size:
            page.pop()
            url = call.request.url.include_query_params(cursor=start + size)
            path = f"/api/{row.kind}s/{row.id}/tree/{commit}" + (f"/{segment(folder)}" if folder else "")
            headers["Link"] = f'<{call.origin}{path}?{url.query}>; rel="next"'
        return reply(_described(git, commit, page, expand), headers={"X-Repo-Commit": commit, **headers})


def paths_info(hub: Hub, call: Call) -> Response:
    """What is at some paths; those where nothing is are left out. The body is a form, or JSON."""
    row = hub.repo(call)
    if call.request.headers.get("content-type", "").startswith("application/json"):
        body = call.json()
        paths, expand = body.get("paths", []), bool(body.get("expand"))
        paths = [paths] if isinstance(paths, str) else paths
    else:
        try:
            form = parse_qs(call.body.decode("ascii"), keep_blank_values=True)
        except UnicodeDecodeError as error:
            raise HubFault(400, "The form is not percent-encoded") from error
        paths, expand = form.get("paths", []) + form.get("paths[]", []), truthy((form.get("expand") or [""])[-1])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise HubFault(400, '"paths" must be a list of texts')
    with hub.git(row) as git:
        commit = hub.commit_of(git, call.args["rev"])
        found = [git.lookup(commit, path.strip("/")) for path in dict.fromkeys(paths) if path.strip("/")]
        return reply(_described(git, commit, [entry for entry in found if entry is not None], expand))


def refs(hub: Hub, call: Call) -> Response:
    """Branches and tags, and the references of pull requests if asked for."""

    def named(git: GitStore, prefix: str) -> list[dict[str, str]]:
        return [{"name": n.removeprefix(prefix), "ref": n, "targetCommit": c} for n, c in git.refs(prefix)]

    with hub.git(hub.repo(call)) as git:
        result: dict[str, Any] = {
            "branches": named(git, "refs/heads/"),
            "converts": named(git, "refs/convert/"),
            "tags": named(git, "refs/tags/"),
        }
        if call.flag("include_prs"):
            result["pullRequests"] = named(git, "refs/pr/")
    return reply(result)


def commits(hub: Hub, call: Call) -> Response:
    """The history of a revision, a page at a time."""
    row = hub.repo(call)
    size = call.number("limit", _COMMITS_PAGE, _COMMITS_PAGE)
    number = call.number("p", 0, 1 << 40)
    formatted = "formatted" in call.queries("expand", "expand[]")
    with hub.git(row) as git:
        history = git.history(hub.commit_of(git, call.args["rev"]))
        passed = sum(1 for _ in islice(history, number * size))
        page = list(islice(history, size + 1))
        headers = {"X-Total-Count": str(passed + len(page) + sum(1 for _ in history))}
    if len(page) > size:
        page.pop()
        url = call.request.url.include_query_params(p=number + 1)
        headers["Link"] = f'<{call.origin}{call.request.scope["raw_path"].decode()}?{url.query}>; rel="next"'
    return reply([_commit(entry, formatted) for entry in page], headers=headers)


def create_branch(hub: Hub, call: Call) -> Response:
    """Start a branch at a revision."""
    row = hub.writable(call)
    name = call.args["branch"]
    start = call.json().get("startingPoint") or DEFAULT_BRANCH
    with hub.git_writing(row) as git:
        if name.startswith("refs/"):
            raise HubFault(400, f"Invalid reference for a branch: {name}")
        _require_free(git, f"refs/heads/{name}")
        git.set_ref(f"refs/heads/{name}", hub.commit_of(git, str(start)))
    return reply({})


def delete_branch(hub: Hub, call: Call) -> Response:
    """Delete a branch, except main."""
    row = hub.writable(call)
    name = f"refs/heads/{call.args['branch']}"
    if name == DEFAULT_BRANCH:
        raise HubFault(403, f"Cannot delete {name}")
    with hub.git_writing(row) as git:
        if git.ref(name) is None:
            raise revision_missing(call.args["branch"])
        git.delete_ref(name)
    return reply({})


def create_tag(hub: Hub, call: Call) -> Response:
    """Tag a revision."""
    row = hub.writable(call)
    body = call.json()
    name = text_field(body, "tag")
    with hub.git_writing(row) as git:
        commit = hub.commit_of(git, call.args["rev"])
        _require_free(git, f"refs/tags/{name}")
        git.tag(name, commit, text_field(body, "message", required=False), hub.require_user(call))
    return reply({})


def delete_tag(hub: Hub, call: Call) -> Response:
    """Delete a tag."""
    row = hub.writable(call)
    name = f"refs/tags/{call.args['tag']}"
    with hub.git_writing(row) as git:
        if git.ref(name) is None:
            raise revision_missing(call.args["tag"])
        git.delete_ref(name)
    return reply({})


def super_squash(hub: Hub, call: Call) -> Response:
    """Replace the history of a branch by one commit."""
    row = hub.writable(call)
    branch = call.args["rev"]
    ref = branch if branch.startswith("refs/") and not branch.startswith("refs/tags/") else f"refs/heads/{branch}"
    message = text_field(call.json(), "message", required=False) or f"Super-squash branch '{branch}'"
    with hub.git_writing(row) as git:
        commit = git.ref(ref)
        if commit is None and (branch.startswith("refs/tags/") or git.ref(f"refs/tags/{branch}") is not None):
            raise HubFault(400, f"Invalid reference for a branch: {branch}")
        if commit is None:
            raise revision_missing(branch)
        git.set_ref(ref, git.commit(git.tree_id(commit), None, hub.require_user(call), f"{message}\n"))
    tip_facts(hub, row)
    return reply({})


def safetensors_metadata(hub: Hub, call: Call) -> Response:
    """The headers of all shards of an index on main; the index comes without what they repeat."""
    row = hub.repo(call)
    hub.require_content(row, call)
    with hub.git(row) as git:
        commit = hub.commit_of(git, DEFAULT_BRANCH)
        try:
            index, headers = read_sharded(hub, git, commit, call.args["path"])
        except ValueError as error:
            raise HubFault(400, f"Not a sharded safetensors model: {error}") from error
    index.pop("weight_map")
    return reply({"index": index, "headers": headers})


def _described(git: GitStore, commit: str, entries: Sequence[Entry], expand: bool) -> list[dict[str, Any]]:
    changes = git.last_changes(commit, [entry.path for entry in entries]) if expand else {}
    described = []
    for entry in entries:
        item: dict[str, Any] = {
            "type": "directory" if entry.is_folder else "file",
            "oid": entry.oid,
            "size": entry.size,
            "path": entry.path,
        }
        if entry.lfs is not None:
            item["lfs"] = {"oid": entry.lfs.oid, "size": entry.size, "pointerSize": entry.lfs.pointer_size}
        if entry.path in changes:
            change = changes[entry.path]
            item["lastCommit"] = {"id": change.oid, "title": change.title, "date": moment(change.time)}
        described.append(item)
    return described


def _commit(entry: LogEntry, formatted: bool) -> dict[str, Any]:
    item: dict[str, Any] = {
        "id": entry.oid,
        "title": entry.title,
        "message": entry.body,
        "date": moment(entry.time),
        "authors": [{"user": entry.author}],
    }
    if formatted:
        item["formatted"] = {"title": html.escape(entry.title), "message": html.escape(entry.body)}
    return item


def _require_free(git: GitStore, name: str) -> None:
    if not valid_ref(name):
        raise HubFault(400, f"Invalid reference name: {name}")
    if git.ref(name) is not None:
        raise HubFault(409, f"Reference {name} already exists")
    # A reference cannot lie in a folder that is itself a reference, nor the other way round.
    for other, _ in git.refs("refs/"):
        if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
            raise HubFault(409, f"Reference {name} clashes with {other}")


ROUTES = [
    route("GET", "/api/{kind}/{repo}/tree/{rev}", tree),
    route("GET", "/api/{kind}/{repo}/tree/{rev}/{path}", tree),
    route("POST", "/api/{kind}/{repo}/paths-info/{rev}", paths_info, most=_MOST_PATHS, reads=True),
    route("GET", "/api/{kind}/{repo}/refs", refs),
    route("GET", "/api/{kind}/{repo}/commits/{rev}", commits),
    route("POST", "/api/{kind}/{repo}/branch/{branch}", create_branch, check=Hub.writable),
    route("DELETE", "/api/{kind}/{repo}/branch/{branch}", delete_branch, check=Hub.writable),
    route("POST", "/api/{kind}/{repo}/tag/{rev}", create_tag, check=Hub.writable),
    route("DELETE", "/api/{kind}/{repo}/tag/{tag}", delete_tag, check=Hub.writable),
    route("POST", "/api/{kind}/{repo}/super-squash/{rev}", super_squash, check=Hub.writable),
    route("GET", "/api/{kind}/{repo}/safetensors-metadata/{path}", safetensors_metadata),
]
