"""Routes of discussions and pull requests; a pull request is a reference `refs/pr/N`, merged by one commit."""

from __future__ import annotations

import html
import io
import uuid
from typing import Any

from dulwich.diff_tree import tree_changes
from dulwich.patch import write_object_diff
from starlette.responses import Response

from hfmerge.hubserver.database import DiscussionRow, RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, GitStore
from hfmerge.hubserver.hub import Hub, now
from hfmerge.hubserver.info import tip_facts
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, forbidden, reply, revision_missing, text_field


_PAGE = 50
# Comparing takes time that grows with the square of the lines; more is no reading for people.
_MOST_COMPARED = 1 << 20
_MOST_LINES = 5_000
_MOST_DIFF = 4 << 20


def open_pull(hub: Hub, git: GitStore, row: RepoRow, user: str, message: str, *, base: str, commit: str) -> int:
    """Open a pull request that already has its commit; called under the lock of the repository."""
    title, _, text = message.partition("\n")
    opened = DiscussionRow(hub.database.next_discussion(row.rid), True, title, "open", user, now(), base, None)
    _open(hub, git, row, opened, text.strip(), commit)
    note_commit(hub, row, f"refs/pr/{opened.num}", user, message, commit)
    return opened.num


def note_commit(hub: Hub, row: RepoRow, ref: str, user: str, message: str, oid: str) -> None:
    """Write a commit into the discussion of its pull request, if it is on one."""
    if (discussion := hub.pull_of(row, ref)) is not None:
        data = {"subject": message.partition("\n")[0], "oid": oid}
        hub.database.put_event(row.rid, discussion.num, _event("commit", user, data))


def create(hub: Hub, call: Call) -> Response:
    """Open a discussion, or a pull request without a commit yet: a draft."""
    row = hub.repo(call)
    user = hub.require_user(call)
    body = call.json()
    title = text_field(body, "title")
    if not 3 <= len(title) <= 200:
        raise HubFault(400, '"title" must have 3 to 200 characters')
    text = text_field(body, "description", required=False)
    pull = bool(body.get("pullRequest"))
    with hub.git_writing(row) as git:
        commit = hub.commit_of(git, DEFAULT_BRANCH) if pull else None
        number, status = hub.database.next_discussion(row.rid), "draft" if pull else "open"
        _open(
            hub, git, row, DiscussionRow(number, pull, title, status, user, now(), DEFAULT_BRANCH, None), text, commit
        )
    return reply({"num": number, "url": f"/{row.id}/discussions/{number}", "pullRequest": pull})


def listing(hub: Hub, call: Call) -> Response:
    """Discussions by type, status and author, a page at a time."""
    row = hub.repo(call)
    kind, status, author = call.query("type"), call.query("status"), call.query("author")
    found = []
    for discussion in reversed(hub.database.discussions(row.rid)):
        # For a search, a draft is an open pull request, and a merged one is closed.
        state = {"draft": "open", "merged": "closed"}.get(discussion.status, discussion.status)
        if kind in ("discussion", "pull_request") and discussion.pull != (kind == "pull_request"):
            continue
        if status in ("open", "closed") and state != status:
            continue
        if author is None or discussion.author == author:
            found.append(_summary(row, discussion))
    start = call.number("p", 0, 1 << 40) * _PAGE
    return reply({"discussions": found[start : start + _PAGE], "count": len(found), "start": start})


def details(hub: Hub, call: Call) -> Response:
    """One discussion with its events; for a pull request also conflicts and, if asked for, the difference.

    The difference is text of files: of a gated repository, only those who were let in have it. The conversation is
    open to all who see the repository, so the rest of the answer stays.
    """
    row = hub.repo(call)
    discussion = _discussion(hub, row, call)
    result = {**_summary(row, discussion), "events": hub.database.events(row.rid, discussion.num)}
    if discussion.pull:
        with hub.git(row) as git:
            base, head = _ends(git, discussion)
            result["changes"] = {"base": discussion.base, "mergeCommitId": discussion.merged}
            if discussion.merged is not None:
                result["filesWithConflicts"] = []
                before = next((e.oid for i, e in enumerate(git.history(discussion.merged)) if i == 1), None)
                ends = (before, discussion.merged)
            else:
                result["filesWithConflicts"] = merge_trees(git, base, head)[1]
                ends = (git.common_ancestor(base, head), head)
            if call.flag("diff") and hub.may_read(row, call.user):
                result["diff"] = _diff(git, *ends)
    return reply(result)


def comment(hub: Hub, call: Call) -> Response:
    """Say something."""
    row = hub.repo(call)
    user = hub.require_user(call)
    discussion = _discussion(hub, row, call)
    event = _comment(user, text_field(call.json(), "comment"))
    hub.database.put_event(row.rid, discussion.num, event)
    return reply({"newMessage": event})


def edit_comment(hub: Hub, call: Call) -> Response:
    """Change a comment of one's own."""
    return _change_comment(hub, call, text_field(call.json(), "content"))


def hide_comment(hub: Hub, call: Call) -> Response:
    """Take a comment away for good."""
    return _change_comment(hub, call, None)


def rename(hub: Hub, call: Call) -> Response:
    """Change the title."""
    row = hub.repo(call)
    title = text_field(call.json(), "title")
    with hub.lock(row.rid):
        discussion, user = _changeable(hub, row, call)
        event = _event("title-change", user, {"from": discussion.title, "to": title})
        hub.database.change_discussion(
            row.rid, discussion.num, title=title, status=discussion.status, merged=discussion.merged
        )
        hub.database.put_event(row.rid, discussion.num, event)
    return reply({"newTitle": event})


def change_status(hub: Hub, call: Call) -> Response:
    """Open (a draft too), close, or open again."""
    row = hub.repo(call)
    body = call.json()
    status = text_field(body, "status")
    if status not in ("open", "closed"):
        raise HubFault(400, '"status" must be "open" or "closed"')
    with hub.lock(row.rid):
        discussion, user = _changeable(hub, row, call)
        if discussion.status == "merged":
            raise HubFault(400, "This pull request is already merged")
        _say(hub, row, discussion, user, body)
        event = _set_status(hub, row, discussion, user, status, None)
    return reply({"newStatus": event})


def merge(hub: Hub, call: Call) -> Response:
    """Put the changes of a pull request on its base branch, as one commit."""
    row = hub.writable(call)
    user = hub.require_user(call)
    body = call.json()
    with hub.git_writing(row) as git:
        discussion = _discussion(hub, row, call)
        if not discussion.pull:
            raise HubFault(400, "This is not a pull request")
        if discussion.status == "draft":
            raise HubFault(400, "This branch is in draft mode, publish it to be able to merge")
        if discussion.status != "open":
            raise HubFault(400, f"This pull request is {discussion.status}")
        base, head = _ends(git, discussion)
        tree, conflicts = merge_trees(git, base, head)
        if tree is None:
            raise HubFault(409, f"This pull request has conflicts in: {', '.join(conflicts)}")
        ancestor = git.common_ancestor(base, head)
        commits = []
        for entry in git.history(head):
            if entry.oid == ancestor:
                break
            commits.append(f"- {entry.title} ({entry.oid})\n")
        message = f"{discussion.title} (#{discussion.num})\n\n\n" + "".join(reversed(commits))
        oid = git.commit(tree, base, discussion.author, message)
        git.set_ref(discussion.base, oid)
        _say(hub, row, discussion, user, body)
        _set_status(hub, row, discussion, user, "merged", oid)
    tip_facts(hub, row)
    return reply({"mergeCommitId": oid})


def merge_trees(git: GitStore, base: str, head: str) -> tuple[bytes | None, list[str]]:
    """The tree of `base` with what `head` changed since they parted; None and the paths if both changed the same."""
    ancestor = git.common_ancestor(base, head)
    theirs = _changes(git, ancestor, head)
    ours = _changes(git, ancestor, base)
    conflicts = [path for path in theirs if path in ours and ours[path] != theirs[path]]
    editor = git.edit(base)
    for path, blob in sorted(theirs.items(), key=lambda item: item[1] is not None):
        if path in conflicts or ours.get(path, b"") == blob:
            continue
        try:
            if blob is None:
                editor.remove(path, folder_only=False)
            else:
                editor.put(path, blob)
        except (KeyError, NotADirectoryError, IsADirectoryError):
            conflicts.append(path)  # one side made a folder where the other has a file
    return (None, conflicts) if conflicts else (editor.store(), [])


def _changes(git: GitStore, old: str | None, new: str) -> dict[str, bytes | None]:
    old_tree = None if old is None else git.tree_id(old)
    changes: dict[str, bytes | None] = {}
    for change in tree_changes(git.objects, old_tree, git.tree_id(new)):
        if change.new is not None and change.new.sha is not None:
            changes[(change.new.path or b"").decode()] = change.new.sha
        elif change.old is not None:
            changes[(change.old.path or b"").decode()] = None
    return changes


def _diff(git: GitStore, old: str | None, new: str) -> str:
    """The difference as git writes it; files that are too long to compare are only named."""
    text = io.BytesIO()
    old_tree = None if old is None else git.tree_id(old)
    for paths, modes, oids in git.objects.tree_changes(old_tree, git.tree_id(new)):
        if text.tell() < _MOST_DIFF and all(_comparable(git, oid) for oid in oids):
            before, after = zip(paths, modes, oids, strict=True)
            write_object_diff(text, git.objects, before, after)
        else:
            path = paths[1] or paths[0] or b""
            text.write(b"diff --git a/%b b/%b\nThis file is too long to be compared\n" % (path, path))
    return text.getvalue().decode("utf-8", "replace")


def _comparable(git: GitStore, oid: bytes | None) -> bool:
    data = b"" if oid is None else git.read(oid.decode())
    return len(data) <= _MOST_COMPARED and data.count(b"\n") <= _MOST_LINES


def _ends(git: GitStore, discussion: DiscussionRow) -> tuple[str, str]:
    base, head = git.ref(discussion.base), git.ref(f"refs/pr/{discussion.num}")
    if base is None or head is None:
        raise revision_missing(discussion.base if base is None else f"refs/pr/{discussion.num}")
    return base, head


def _open(hub: Hub, git: GitStore, row: RepoRow, new: DiscussionRow, text: str, commit: str | None) -> None:
    """Store a new discussion with its first comment; `commit` is that of a pull request."""
    if commit is not None:
        # The reference first: one without a discussion is overwritten, a discussion without one would be broken.
        git.set_ref(f"refs/pr/{new.num}", commit)
    hub.database.add_discussion(row.rid, new)
    hub.database.put_event(row.rid, new.num, _comment(new.author, text))


def _discussion(hub: Hub, row: RepoRow, call: Call) -> DiscussionRow:
    discussion = hub.database.discussion(row.rid, int(call.args["num"]))
    if discussion is None:
        raise HubFault(404, f"No discussion {call.args['num']} in {row.id}")
    return discussion


def _changeable(hub: Hub, row: RepoRow, call: Call) -> tuple[DiscussionRow, str]:
    user = hub.require_user(call)
    discussion = _discussion(hub, row, call)
    if discussion.author != user and not hub.may_write(row, user):
        raise forbidden("Only its author and the owners of the repository may change a discussion")
    return discussion, user


def _set_status(
    hub: Hub, row: RepoRow, discussion: DiscussionRow, user: str, status: str, merged: str | None
) -> dict[str, Any]:
    event = _event("status-change", user, {"status": status})
    hub.database.change_discussion(row.rid, discussion.num, title=discussion.title, status=status, merged=merged)
    hub.database.put_event(row.rid, discussion.num, event)
    return event


def _say(hub: Hub, row: RepoRow, discussion: DiscussionRow, user: str, body: dict[str, Any]) -> None:
    if text := text_field(body, "comment", required=False):
        hub.database.put_event(row.rid, discussion.num, _comment(user, text))


def _change_comment(hub: Hub, call: Call, text: str | None) -> Response:
    row = hub.repo(call)
    user = hub.require_user(call)
    discussion = _discussion(hub, row, call)
    with hub.lock(row.rid):
        events = [e for e in hub.database.events(row.rid, discussion.num) if e["id"] == call.args["comment"]]
        if not events or events[0]["type"] != "comment" or events[0]["data"]["hidden"]:
            raise HubFault(404, "No such comment")
        event = events[0]
        if event["author"]["name"] != user and (text is not None or not hub.may_write(row, user)):
            raise forbidden("Only its author may change a comment")
        latest = _words(user, text or "")
        history = [] if text is None else [*event["data"]["history"], event["data"]["latest"]]
        event["data"] = {"edited": True, "hidden": text is None, "latest": latest, "history": history}
        hub.database.put_event(row.rid, discussion.num, event)
    return reply({"updatedComment": event})


def _event(kind: str, user: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex[:24], "type": kind, "createdAt": now(), "author": {"name": user}, "data": data}


def _comment(user: str, text: str) -> dict[str, Any]:
    data = {"edited": False, "hidden": False, "latest": _words(user, text), "history": []}
    return _event("comment", user, data)


def _words(user: str, text: str) -> dict[str, Any]:
    rendered = f"<p>{html.escape(text)}</p>"
    return {"raw": text, "html": rendered, "updatedAt": now(), "author": {"name": user}}


def _summary(row: RepoRow, discussion: DiscussionRow) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "author": {"name": discussion.author},
        "createdAt": discussion.created,
        "isPullRequest": discussion.pull,
        "repo": {"name": row.id, "type": row.kind},
    }


_ONE = "/api/{kind}/{repo}/discussions/{num}"

ROUTES = [
    route("POST", "/api/{kind}/{repo}/discussions", create, check=Hub.speaker),
    route("GET", "/api/{kind}/{repo}/discussions", listing),
    route("GET", _ONE, details),
    route("POST", f"{_ONE}/comment", comment, check=Hub.speaker),
    route("POST", f"{_ONE}/comment/{{comment}}/edit", edit_comment, check=Hub.speaker),
    route("POST", f"{_ONE}/comment/{{comment}}/hide", hide_comment, check=Hub.speaker),
    route("POST", f"{_ONE}/title", rename, check=Hub.speaker),
    route("POST", f"{_ONE}/status", change_status, check=Hub.speaker),
    route("POST", f"{_ONE}/merge", merge, check=Hub.writable),
]
