"""Routes on whole repositories: create, delete, move, settings, information, lists, access."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.attributes import DEFAULT_ATTRIBUTES
from hfmerge.hubserver.cards import REPO_ID, read_card
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, GitStore
from hfmerge.hubserver.hub import Hub, now
from hfmerge.hubserver.info import children_count, commit_facts, listed, plain_siblings, properties, tip_facts
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, forbidden, not_implemented, reply, repo_path, text_field


_KINDS = ("model", "dataset")
_PAGE = 1000
# A whole README.md comes to be checked, of which the metadata are read.
_MOST_CARD = 8 << 20

# What a list tells about each repository, and what `full` adds.
_LISTED = (
    *("_id", "id", "modelId", "likes", "trendingScore", "private", "downloads", "tags"),
    *("pipeline_tag", "library_name", "createdAt"),
)
_FULL = ("author", "sha", "lastModified", "gated", "disabled", "siblings")


def whoami(hub: Hub, call: Call) -> Response:
    """The user of the token, with the organisations they are a member of."""
    user = hub.require_user(call)
    orgs = [
        {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": role, "isEnterprise": False}
        for name, role in hub.accounts.memberships(user)
    ]
    token = {"displayName": "hfmerge", "role": call.role, "createdAt": now()}
    auth = {"type": "access_token", "accessToken": token}
    return reply(
        {"type": "user", "id": user, "name": user, "fullname": user, "isPro": False, "orgs": orgs, "auth": auth}
    )


def create(hub: Hub, call: Call) -> Response:
    """Create a repository with its first commit, the `.gitattributes` that say what is large."""
    user = hub.require_user(call)
    body = call.json()
    kind, repo_id = _named(body, user)
    if not hub.claim_namespace(user, repo_id.split("/")[0]):
        raise forbidden(f'You don\'t have the rights to create a {kind} under the namespace "{repo_id.split("/")[0]}"')
    private = _private(body)
    row = RepoRow(uuid.uuid4().hex, kind, repo_id, user, bool(private), None, now())
    url = call.origin + repo_path(kind, repo_id)
    taken = HubFault(409, f"You already created this {kind} repo", extra={"url": url})
    if hub.database.repo(kind, repo_id) is not None:
        raise taken
    with GitStore.create(hub.git_path(row.rid)) as git:
        editor = git.edit(None)
        editor.put(".gitattributes", git.add_blob(DEFAULT_ATTRIBUTES[kind].encode()))
        git.set_ref(DEFAULT_BRANCH, git.commit(editor.store(), None, user, "initial commit"))
    if not hub.database.add_repo(row):
        hub.drop_git(row.rid)
        raise taken
    tip_facts(hub, row)
    return reply({"url": url, "name": repo_id, "id": row.rid[:24]})


def delete(hub: Hub, call: Call) -> Response:
    """Delete a repository for good."""
    user = hub.require_user(call)
    kind, repo_id = _named(call.json(), user)
    row = hub.repo_named(call, kind, repo_id)
    hub.require_writer(row, call)
    with hub.lock(row.rid):
        hub.database.delete_repo(row.rid)
        hub.drop_git(row.rid)
    return reply({})


def move(hub: Hub, call: Call) -> Response:
    """Rename a repository; the old address redirects."""
    user = hub.require_user(call)
    body = call.json()
    kind = body.get("type") or "model"
    row = hub.repo_named(call, kind, text_field(body, "fromRepo"))
    hub.require_writer(row, call)
    target = text_field(body, "toRepo")
    if not REPO_ID.fullmatch(target) or target.count("/") != 1:
        raise HubFault(400, f"Invalid repo name: {target}")
    if not hub.claim_namespace(user, target.split("/")[0]):
        raise forbidden(f"You don't have the rights to move a repository to {target}")
    with hub.lock(row.rid):
        if not hub.database.move_repo(row, target):
            raise HubFault(409, f"A {kind} repository called {target} already exists")
    return reply({"url": call.origin + repo_path(kind, target)})


def settings(hub: Hub, call: Call) -> Response:
    """Set visibility and gating."""
    row = hub.writable(call)
    body = call.json()
    gated = row.gated
    if "gated" in body:
        if body["gated"] not in ("auto", "manual", False):
            raise HubFault(400, '"gated" must be one of "auto", "manual", false')
        gated = body["gated"] or None
    private = _private(body)
    hub.database.change_repo(row.rid, private=row.private if private is None else private, gated=gated)
    return reply({"private": row.private if private is None else private, "gated": gated or False})


def info(hub: Hub, call: Call) -> Response:
    """What there is to know about a repository, on main or at a revision."""
    row = hub.repo(call)
    with hub.git(row) as git:
        commit = hub.commit_of(git, call.args.get("rev", DEFAULT_BRANCH))
        facts = tip_facts(hub, row) if commit == hub.tip(row) else commit_facts(hub, row, git, commit)
    shown = properties(hub, row, call.user, facts.sha, facts.fields)
    shown["siblings"] = facts.siblings if call.flag("blobs") else plain_siblings(facts.siblings)
    if wanted := call.queries("expand", "expand[]"):
        if "childrenModelCount" in wanted and row.kind == "model":
            shown["childrenModelCount"] = children_count(hub, row)
        shown = {key: shown[key] for key in ("_id", "id", *wanted) if key in shown}
    else:
        shown.pop("baseModels", None)
    return reply(shown)


def listing(hub: Hub, call: Call) -> Response:
    """Repositories by text, author and tags, a page at a time."""
    filters = [*call.queries("filter"), *call.queries("pipeline_tag")]
    rows = [row for row in hub.database.repos(call.kind) if _wanted(hub, call, row)]
    facts = listed(hub, call.kind, rows)
    found = [(row, properties(hub, row, call.user, *facts[row.rid][:2])) for row in rows if row.rid in facts]
    found = [(row, shown) for row, shown in found if all(tag in shown["tags"] for tag in filters)]
    sort = call.query("sort") or "createdAt"
    if found and sort not in ("createdAt", "lastModified", "downloads", "likes", "trendingScore"):
        raise HubFault(400, f'Invalid sort parameter "{sort}"')
    found.sort(key=lambda item: item[1][sort], reverse=call.query("direction") != "1")
    start = call.number("cursor", 0, 1 << 40)
    page = found[start : start + call.number("limit", _PAGE, _PAGE)]
    headers = {"X-Total-Count": str(len(found))}
    if start + len(page) < len(found):
        url = call.request.url.include_query_params(cursor=start + len(page))
        headers["Link"] = f'<{call.origin}{url.path}?{url.query}>; rel="next"'
    keys = [*_LISTED, *(_FULL if call.flag("full") else ())]
    keys += [name for name in ("cardData", "config") if call.flag(name)]
    if expand := call.queries("expand", "expand[]"):
        keys = ["_id", "id", *expand]
    if "siblings" in keys:
        for row, shown in page:
            shown["siblings"] = plain_siblings(json.loads(facts[row.rid][2]))
    return reply([{key: shown[key] for key in keys if key in shown} for _, shown in page], headers=headers)


def _wanted(hub: Hub, call: Call, row: RepoRow) -> bool:
    author, search = call.query("author"), call.query("search")
    if author is not None and row.namespace.lower() != author.lower():
        return False
    if search is not None and search.lower() not in row.id.lower():
        return False
    if call.query("gated") is not None and call.flag("gated") != (row.gated is not None):
        return False
    return hub.may_see(row, call.user)


def auth_check(hub: Hub, call: Call) -> Response:
    """Whether the files may be read."""
    hub.require_content(hub.repo(call), call)
    return reply({})


def auth_check_write(hub: Hub, call: Call) -> Response:
    """Whether the repository may be written."""
    hub.writable(call)
    return reply({})


def ask_access(hub: Hub, call: Call) -> Response:
    """Ask to be let into a gated repository: at once where that is automatic, else its owners decide."""
    row = hub.speaker(call)
    user = hub.require_user(call)
    _require_gated(row)
    status = hub.database.access_of(row.rid, user)
    if status is None:
        status = "accepted" if row.gated == "auto" else "pending"
        hub.database.set_access(row.rid, user, status, now())
    return reply({"requestId": _request_id(row, user), "status": status})


def grant_access(hub: Hub, call: Call) -> Response:
    """Let a user into a gated repository who did not ask."""
    row = hub.writable(call)
    user = text_field(call.json(), "user")
    if hub.accounts.user(user) is None:
        raise HubFault(404, f"No user called {user}")
    return _set_access(hub, row, hub.accounts.user(user) or user, "accepted")


def handle_access(hub: Hub, call: Call) -> Response:
    """Accept, reject or put back a request, named by its user or by its id."""
    row = hub.writable(call)
    body = call.json()
    if body.get("requestId") is None:
        name = text_field(body, "user")
        if (user := hub.accounts.user(name)) is None:
            raise HubFault(404, f"No user called {name}")
    else:
        request = text_field(body, "requestId")
        user = next((name for name in hub.database.requesters(row.rid) if _request_id(row, name) == request), None)
        if user is None:
            raise HubFault(404, f"No access request with the id {request}")
    return _set_access(hub, row, user, text_field(body, "status"))


def list_access(hub: Hub, call: Call) -> Response:
    """The users with a status."""
    row = hub.writable(call)
    status = call.args["status"]
    return reply(
        [
            {
                "user": {"user": user, "fullname": user},
                "requestId": _request_id(row, user),
                "status": status,
                "timestamp": time,
            }
            for user, time in hub.database.access(row.rid, status)
        ]
    )


def validate_yaml(hub: Hub, call: Call) -> Response:
    """Check the front matter of a card."""
    body = call.json()
    if not isinstance(body.get("content"), str):
        raise HubFault(400, '"content" must be a text', extra={"errors": [{"message": '"content" must be a text'}]})
    card = read_card(body["content"], str(body.get("repoType") or "model"))
    errors = [{"message": message} for message in card.errors]
    warnings = [{"message": message} for message in card.warnings]
    if errors:
        text = "Invalid metadata: " + "; ".join(card.errors)
        raise HubFault(400, text, extra={"errors": errors, "warnings": warnings})
    return reply({"errors": [], "warnings": warnings})


def absent(hub: Hub, call: Call) -> Response:
    """Parts of a repository that this server leaves out."""
    hub.repo(call)
    end = call.repo_span[1] if call.repo_span is not None else 0
    raise not_implemented(call.request.scope["raw_path"].decode("latin-1")[end:])


def background(hub: Hub, call: Call) -> Response:
    """What clients ask in passing."""
    return reply({})


def _set_access(hub: Hub, row: RepoRow, user: str, status: str) -> Response:
    _require_gated(row)
    if status not in ("accepted", "rejected", "pending"):
        raise HubFault(400, '"status" must be one of accepted, rejected, pending')
    if hub.database.access_of(row.rid, user) == status:
        raise HubFault(400, f"The request of {user} is already {status}")
    hub.database.set_access(row.rid, user, status, now())
    return reply({})


def _require_gated(row: RepoRow) -> None:
    if row.gated is None:
        raise HubFault(400, f"{row.id} is not gated")


def _request_id(row: RepoRow, user: str) -> str:
    """The id of a user's request: the same each time, and of no use to guess the user from."""
    return hashlib.sha256(f"{row.rid}:{user}".encode()).hexdigest()[:24]


def _named(body: dict[str, Any], user: str) -> tuple[str, str]:
    kind = body.get("type") or "model"
    if kind not in _KINDS:
        raise not_implemented(f"repositories of type {kind}")
    name = text_field(body, "name")
    namespace = text_field(body, "organization", required=False) or user
    repo_id = name if "/" in name else f"{namespace}/{name}"
    if not REPO_ID.fullmatch(repo_id) or repo_id.count("/") != 1 or repo_id.endswith(".git"):
        raise HubFault(400, f"Invalid repo name: {repo_id}")
    return kind, repo_id


def _private(body: dict[str, Any]) -> bool | None:
    if body.get("visibility") is not None:
        if body["visibility"] not in ("public", "private"):
            raise HubFault(400, '"visibility" must be "public" or "private"')
        return bool(body["visibility"] == "private")
    return None if body.get("private") is None else bool(body["private"])


ROUTES = [
    route("GET", "/api/whoami-v2", whoami),
    route("POST", "/api/repos/create", create, check=Hub.require_user),
    route("DELETE", "/api/repos/delete", delete, check=Hub.require_user),
    route("POST", "/api/repos/move", move, check=Hub.require_user),
    # Anybody may ask this, also without a token: the client checks every card before it sends it.
    route("POST", "/api/validate-yaml", validate_yaml, most=_MOST_CARD, reads=True),
    route("GET", "/api/agent-harnesses", background),
    route("GET", "/api/telemetry/{path}", background),
    route("GET", "/api/{kind}", listing),
    route("PUT", "/api/{kind}/{repo}/settings", settings, check=Hub.writable),
    route("GET", "/api/{kind}/{repo}/auth-check", auth_check),
    route("GET", "/api/{kind}/{repo}/auth-check/write", auth_check_write),
    route("POST", "/api/{kind}/{repo}/user-access-request/grant", grant_access, check=Hub.writable),
    route("POST", "/api/{kind}/{repo}/user-access-request/handle", handle_access, check=Hub.writable),
    route("GET", "/api/{kind}/{repo}/user-access-request/{status}", list_access),
    route("POST", "/api/{kind}/{repo}/ask-access", ask_access, check=Hub.speaker, reads=True),
    route("POST", "/{web}{repo}/ask-access", ask_access, check=Hub.speaker, reads=True),
    *(
        route(method, f"/api/{{kind}}/{{repo}}/{name}", absent)
        for method, name in (
            ("POST", "lfs-files/duplicate"),
            *(("POST", "like"), ("DELETE", "like"), ("GET", "likers"), ("GET", "leaderboard"), ("POST", "duplicate")),
        )
    ),
    route("GET", "/api/{kind}/{repo}/revision/{rev}", info),
    route("GET", "/api/{kind}/{repo}", info),
]
