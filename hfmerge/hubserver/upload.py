"""Routes of a commit: asking how to send each file, and the commit itself."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.attributes import DEFAULT_ATTRIBUTES, attributes_of, ignored, is_large
from hfmerge.hubserver.cards import read_card
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.discussions import note_commit, open_pull
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, GitStore, pointer_text
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.info import tip_facts
from hfmerge.hubserver.plain import load_json
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, entry_missing, reply, repo_path, revision_missing, text_field


STALE = "The branch was updated since you opened this page. Please refresh and try again."
_MOST_FILES = 256
# A commit carries its regular files, and is held in memory.
_MOST_COMMIT = 512 << 20
_OID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Operation:
    """One line of a commit: `file` with its content, `lfsFile` with its object, or a deletion."""

    key: str
    path: str
    content: bytes = b""
    oid: str = ""
    size: int | None = None


def preupload(hub: Hub, call: Call) -> Response:
    """How each file should be sent, and what the repository has in its place."""
    row = _pushable(hub, call)
    body = call.json()
    files = body.get("files")
    if not isinstance(files, list) or len(files) > _MOST_FILES:
        raise HubFault(400, f'"files" must be a list of at most {_MOST_FILES} files')
    uploads = [_upload(item) for item in files]
    with hub.git(row) as git:
        commit = hub.commit_of(git, call.args["rev"])
        rules = git.lookup(commit, ".gitattributes")
        attributes = attributes_of(DEFAULT_ATTRIBUTES[row.kind].encode() if rules is None else git.read(rules.oid))
        ignore = str(body.get("gitIgnore") or "").encode()
        if not ignore and (entry := git.lookup(commit, ".gitignore")) is not None and not entry.is_folder:
            ignore = git.read(entry.oid)
        left_out = ignored(ignore, [path for path, _, _ in uploads])
        answers = []
        for path, size, sample in uploads:
            answer: dict[str, Any] = {
                "path": path,
                "uploadMode": "lfs" if is_large(attributes, path, size, sample) else "regular",
                "shouldIgnore": left_out[path],
            }
            present = git.lookup(commit, path)
            if present is not None and not present.is_folder:
                answer["oid"] = present.lfs.oid if present.lfs is not None else present.oid
            answers.append(answer)
    return reply({"files": answers})


def commit(hub: Hub, call: Call) -> Response:
    """Make a commit on a branch or on a pull request, or open a pull request with it."""
    opens_pull = call.flag("create_pr")
    row = _pushable(hub, call)
    header, operations = _parse(call.body)
    user = hub.require_user(call)
    message = text_field(header, "summary") + "\n"
    if description := text_field(header, "description", required=False):
        message += f"\n{description}\n"
    operations = [_checked(hub, row, operation) for operation in operations]
    with hub.git_writing(row) as git:
        ref = _target(hub, git, row, call.args["rev"], pulls=not opens_pull)
        tip = git.ref(ref)
        if tip is None:
            raise revision_missing(call.args["rev"])
        parent = header.get("parentCommit")
        if parent is not None and not (isinstance(parent, str) and len(parent) >= 7 and tip.startswith(parent)):
            raise HubFault(412, STALE)
        oid = git.commit(_apply(git, tip, operations), tip, user, message)
        url = call.origin + repo_path(row.kind, row.id)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
        if opens_pull:
            number = open_pull(hub, git, row, user, message, base=ref, commit=oid)
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        else:
            git.set_ref(ref, oid)
            note_commit(hub, row, ref, user, message, oid)
    if ref == DEFAULT_BRANCH and not opens_pull:
        tip_facts(hub, row)
    return reply(answer)


def check_path(path: Any) -> str:
    """A path that may be written.

    Raises:
        HubFault: 422 if it could leave the repository on some system, or hide in git's own folder.
    """
    if isinstance(path, str):
        parts = path.split("/")
        plain = not any(ord(letter) < 32 or letter in "\\\x7f" for letter in path) and len(path) <= 1024
        if plain and not any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
            return path
    raise HubFault(422, f"Invalid path in repository: {json.dumps(path)}")


def _upload(item: Any) -> tuple[str, int, bytes]:
    if not isinstance(item, dict) or not isinstance(item.get("size"), int) or item["size"] < 0:
        raise HubFault(400, 'Each of "files" needs "path", "size" and "sample"')
    return check_path(item.get("path")), item["size"], _decode(item.get("sample", ""))


def _decode(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise HubFault(400, f"Not base64: {error}") from error


def _parse(body: bytes) -> tuple[dict[str, Any], list[Operation]]:
    header: dict[str, Any] | None = None
    operations: list[Operation] = []
    for number, line in enumerate(body.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = load_json(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise HubFault(
                400, f'Line {number} of the commit is not a JSON object with "key" and "value": {error}'
            ) from error
        if not isinstance(value, dict):
            raise HubFault(400, f'Line {number} of the commit: "value" must be an object')
        if key == "header":
            header = value
        else:
            operations.append(_operation(key, value))
    if header is None:
        raise HubFault(400, "The commit has no header line")
    if not operations:
        raise HubFault(400, "Add a line with the key `lfsFile`, `file`, `deletedFile` or `deletedFolder`")
    return header, operations


def _operation(key: Any, value: dict[str, Any]) -> Operation:
    if key == "deletedFolder" and isinstance(value.get("path"), str):
        return Operation(key, check_path(value["path"].rstrip("/")))
    path = check_path(value.get("path"))
    if key == "deletedFile":
        return Operation(key, path)
    if key == "file":
        content = value.get("content")
        if value.get("encoding", "utf-8") == "base64":
            return Operation(key, path, content=_decode(content))
        if not isinstance(content, str):
            raise HubFault(400, f'{path}: "content" must be a text')
        return Operation(key, path, content=content.encode())
    if key == "lfsFile":
        oid, size = value.get("oid"), value.get("size")
        if value.get("algo") != "sha256" or not isinstance(oid, str) or not _OID.fullmatch(oid):
            raise HubFault(400, f'{path}: an lfsFile needs "algo": "sha256" and an "oid" of 64 hex digits')
        if size is not None and not isinstance(size, int):
            raise HubFault(400, f'{path}: "size" must be a whole number')
        return Operation(key, path, oid=oid, size=size)
    raise HubFault(400, f"Unknown key in commit: {key}")


def _checked(hub: Hub, row: RepoRow, operation: Operation) -> Operation:
    """The operation, complete: a copy of a large file inside the repository comes without its size."""
    if operation.key == "lfsFile":
        size = hub.blobs.size(operation.oid) if hub.database.linked(row.rid, operation.oid) else None
        if size is None:
            raise HubFault(400, f"{operation.path}: LFS object {operation.oid} was not uploaded to {row.id}")
        if operation.size is not None and operation.size != size:
            raise HubFault(400, f"{operation.path}: LFS object {operation.oid} has {size} bytes, not {operation.size}")
        return replace(operation, size=size)
    if operation.key == "file" and operation.path == "README.md":
        card = read_card(operation.content.decode("utf-8", "replace"), row.kind)
        if card.errors:
            raise HubFault(400, "Invalid metadata in README.md: " + "; ".join(card.errors))
    return operation


def _target(hub: Hub, git: GitStore, row: RepoRow, revision: str, *, pulls: bool) -> str:
    """The full name of the branch or pull request a commit goes to."""
    if (discussion := hub.pull_of(row, revision)) is not None and pulls:
        if discussion.status in ("merged", "closed"):
            raise HubFault(403, f"Pull request {discussion.num} is {discussion.status}")
        return revision
    name = revision if revision.startswith("refs/heads/") else f"refs/heads/{revision}"
    if revision == "HEAD":
        name = DEFAULT_BRANCH
    if git.ref(name) is None:
        raise revision_missing(revision)
    return name


def _apply(git: GitStore, tip: str, operations: list[Operation]) -> bytes:
    editor = git.edit(tip)
    for operation in operations:
        try:
            if operation.key in ("deletedFile", "deletedFolder"):
                editor.remove(operation.path, folder_only=operation.key == "deletedFolder")
            else:
                editor.put(operation.path, git.add_blob(_stored(operation)))
        except KeyError as error:
            raise entry_missing(f"A file with this name doesn't exist: {operation.path}", tip) from error
        except NotADirectoryError as error:
            raise HubFault(400, f"{operation.path}: {error} is a file, not a folder") from error
        except IsADirectoryError as error:
            raise HubFault(400, f"{operation.path}: is a folder, not a file") from error
    return editor.store()


def _stored(operation: Operation) -> bytes:
    if operation.key == "file":
        return operation.content
    return pointer_text(operation.oid, operation.size or 0)


def _pushable(hub: Hub, call: Call) -> RepoRow:
    return hub.pushable(call, call.args["rev"], opens_pull=call.flag("create_pr"))


ROUTES = [
    route("POST", "/api/{kind}/{repo}/preupload/{rev}", preupload, check=_pushable),
    route("POST", "/api/{kind}/{repo}/commit/{rev}", commit, check=_pushable, most=_MOST_COMMIT),
]
