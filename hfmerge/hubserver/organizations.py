"""Routes of users and organisations: who they are, who is a member with which role, what they have stored."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from hfmerge.errors import HfMergeError
from hfmerge.hubserver.accounts import check_name
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.info import tip_facts
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, forbidden, reply, text_field


def create(hub: Hub, call: Call) -> Response:
    """Make an organisation, with its maker as administrator."""
    user = hub.require_user(call)
    name = text_field(call.json(), "name")
    try:
        check_name(name)
        if not hub.accounts.add_org(name, user):
            raise HubFault(409, f"There is an organization called {name}")
    except HfMergeError as error:
        raise HubFault(400, str(error)) from error
    return reply({"name": name})


def overview(hub: Hub, call: Call) -> Response:
    """An organisation in numbers; repositories that the caller may not see are not counted."""
    org = _org(hub, call)
    return reply({**_described(hub, call, org), "numUsers": len(hub.accounts.members(org))})


def user_overview(hub: Hub, call: Call) -> Response:
    """A user in numbers, and their organisations."""
    user = hub.accounts.user(call.args["user"])
    if user is None:
        raise HubFault(404, "This user does not exist")
    orgs = [{"name": name, "fullname": name} for name, _ in hub.accounts.memberships(user)]
    return reply({**_described(hub, call, user), "user": user, "type": "user", "orgs": orgs})


def members(hub: Hub, call: Call) -> Response:
    """The members of an organisation, for users."""
    hub.require_user(call)
    listed = hub.accounts.members(_org(hub, call))
    people = [{"user": user, "fullname": user, "type": "user", "role": role} for user, role in listed]
    return reply(people, headers={"X-Total-Count": str(len(people))})


def set_member(hub: Hub, call: Call) -> Response:
    """Make a user a member, or give a member another role."""
    org = _administered(hub, call)
    role = text_field(call.json(), "role")
    if role != "admin":
        _require_other_admin(hub, org, call.args["user"])
    try:
        hub.accounts.set_member(org, call.args["user"], role)
    except HfMergeError as error:
        raise HubFault(400, str(error)) from error
    return reply({"user": hub.accounts.user(call.args["user"]), "role": role})


def remove_member(hub: Hub, call: Call) -> Response:
    """Take a member out; everybody may leave."""
    user = hub.require_user(call)
    org = _org(hub, call) if call.args["user"].lower() == user.lower() else _administered(hub, call)
    _require_other_admin(hub, org, call.args["user"])
    try:
        hub.accounts.remove_member(org, call.args["user"])
    except HfMergeError as error:
        raise HubFault(400, str(error)) from error
    return reply({})


def own_repositories(hub: Hub, call: Call) -> Response:
    """The repositories of the user, with the bytes of their large files."""
    return _storage(hub, hub.require_user(call))


def org_repositories(hub: Hub, call: Call) -> Response:
    """The repositories of an organisation, for its members."""
    org = _org(hub, call)
    if hub.accounts.role(org, hub.require_user(call)) is None:
        raise forbidden(f"You are not a member of {org}")
    return _storage(hub, org)


def _org(hub: Hub, call: Call) -> str:
    org = hub.accounts.org(call.args["org"])
    if org is None:
        raise HubFault(404, "This organization does not exist")
    return org


def _administered(hub: Hub, call: Call) -> str:
    user = hub.require_user(call)
    org = _org(hub, call)
    if hub.accounts.role(org, user) != "admin":
        raise forbidden(f"Only an admin of {org} may do this")
    return org


def _require_other_admin(hub: Hub, org: str, user: str) -> None:
    admins = [name.lower() for name, role in hub.accounts.members(org) if role == "admin"]
    if admins == [user.lower()]:
        raise HubFault(400, f"Nobody would be left to administer {org}; make another member admin first")


def _in(hub: Hub, namespace: str) -> list[RepoRow]:
    return [row for row in hub.database.repos() if row.namespace.lower() == namespace.lower()]


def _described(hub: Hub, call: Call, name: str) -> dict[str, Any]:
    kinds = [row.kind for row in _in(hub, name) if hub.may_see(row, call.user)]
    counts = {"numModels": kinds.count("model"), "numDatasets": kinds.count("dataset"), "numSpaces": 0}
    return {"name": name, "fullname": name, "avatarUrl": "", **counts}


def _storage(hub: Hub, namespace: str) -> Response:
    items: list[dict[str, Any]] = []
    for row in _in(hub, namespace):
        sizes = [hub.blobs.size(oid) or 0 for oid in hub.database.objects(row.rid)]
        items.append(
            {
                "id": row.id,
                "type": row.kind,
                "updatedAt": tip_facts(hub, row).fields["lastModified"],
                "visibility": "private" if row.private else "public",
                "storage": sum(sizes),
            }
        )
    total = sum(item["storage"] for item in items)
    for item in items:
        item["storagePercent"] = item["storage"] / total if total else 0.0
    items.sort(key=lambda item: -item["storage"])
    return reply(items, headers={"X-Total-Count": str(len(items))})


ROUTES = [
    route("GET", "/api/settings/repositories", own_repositories),
    route("POST", "/api/organizations/create", create, check=Hub.require_user),
    route("GET", "/api/organizations/{org}/overview", overview),
    route("GET", "/api/organizations/{org}/members", members),
    route("PUT", "/api/organizations/{org}/members/{user}", set_member, check=_administered),
    route("DELETE", "/api/organizations/{org}/members/{user}", remove_member, check=Hub.require_user),
    route("GET", "/api/organizations/{org}/settings/repositories", org_repositories),
    route("GET", "/api/users/{user}/overview", user_overview),
]
