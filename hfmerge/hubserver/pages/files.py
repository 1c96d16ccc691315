"""Routes of a repository's first page, of its folders and of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from starlette.responses import Response

from hfmerge.hubserver.cards import front_matter, read_card
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, Entry, GitStore
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.pages.markdown import MOST_BYTES, render
from hfmerge.hubserver.pages.merges import read_history
from hfmerge.hubserver.pages.modeltree import model_tree
from hfmerge.hubserver.pages.reading import is_here, opened, read_text, refusal
from hfmerge.hubserver.pages.rendering import page, page_route
from hfmerge.hubserver.wire import Call, HubFault, entry_missing, repo_path


_MOST_ON_FRONT = 100
_MOST_IN_FOLDER = 500
_MOST_SHOWN = 512 << 10
_MOST_VALUE = 2000
_MOST_KEYS = 100


def front(hub: Hub, call: Call) -> Response:
    """A repository: its card, files, commits, references, merge history, and the models it comes from and led to."""
    row = hub.repo(call)
    refused = refusal(hub, row, call)
    values: dict[str, Any] = {"card": None, "matter": [], "history": None}
    with hub.git(row) as git:
        commit = hub.commit_of(git, DEFAULT_BRANCH)
        entries = list(git.entries(commit, stop=_MOST_ON_FRONT + 1))
        if refused is None:
            text = read_text(hub, git, git.lookup(commit, "README.md"), MOST_BYTES)
            values["matter"], values["card"] = _card(text, row.kind, f"{repo_path(row.kind, row.id)} main")
            values["history"] = read_history(hub, git, commit)
        values |= {
            "commit": commit,
            "entries": entries[:_MOST_ON_FRONT],
            "more": len(entries) > _MOST_ON_FRONT,
            "commits": list(islice(git.history(commit), 5)),
            "branches": _named(git, "refs/heads/"),
            "tags": _named(git, "refs/tags/"),
        }
    clone = f"git clone {call.origin}{repo_path(row.kind, row.id)}"
    return page(
        *(hub, call, "front.html.j2"), row=row, refused=refused, tree=model_tree(hub, row, call), clone=clone, **values
    )


def tree(hub: Hub, call: Call) -> Response:
    """A folder at a revision."""
    row = hub.repo(call)
    folder = call.args.get("path", "").strip("/")
    number = call.number("p", 0, 1 << 20)
    with hub.git(row) as git:
        commit = hub.commit_of(git, call.args["rev"])
        found = git.lookup(commit, folder)
        if found is None or not found.is_folder:
            raise entry_missing(f"No folder {folder} at {call.args['rev']}", commit)
        start = number * _MOST_IN_FOLDER
        entries = list(git.entries(commit, folder, start=start, stop=start + _MOST_IN_FOLDER + 1))
    values: dict[str, Any] = {"folder": folder, "commit": commit, "number": number}
    values |= {"entries": entries[:_MOST_IN_FOLDER], "more": len(entries) > _MOST_IN_FOLDER}
    return page(hub, call, "tree.html.j2", row=row, rev=call.args["rev"], **values)


def blob(hub: Hub, call: Call) -> Response:
    """A file at a revision: its text, or how to get it."""
    with opened(hub, call) as (row, git):
        commit = hub.commit_of(git, call.args["rev"])
        entry = hub.file_at(git, commit, call.args["path"].strip("/"))
        text = read_text(hub, git, entry, _MOST_SHOWN)
        note = _note(entry, is_here(entry)) if text is None else ""
    return page(hub, call, "blob.html.j2", row=row, rev=call.args["rev"], entry=entry, text=text, note=note)


def wrong_id(hub: Hub, call: Call) -> Response:
    """An address of a git repository in a browser."""
    raise HubFault(404, f"This address is for git: git clone {call.origin}{call.request.scope['path']}")


def _note(entry: Entry, here: bool) -> str:
    if not here:
        return "This large file was deleted."
    if entry.size > _MOST_SHOWN:
        return "This file is too long to be shown here."
    return "This file is not a text."


def _card(text: str | None, kind: str, base: str) -> tuple[list[tuple[str, str]], Any]:
    """The front matter as a table, and the card as HTML."""
    if text is None:
        return [], None
    block = front_matter(text)
    if block is None:
        return [], render(text, base)
    lines = text.removeprefix("\ufeff").lstrip().splitlines()
    end = next(at for at, line in enumerate(lines) if at and line.rstrip() == "---")
    card = read_card(text, kind)
    matter = _table(card.data) if card.data else [("front matter", block[:_MOST_VALUE])] if block.strip() else []
    return matter, render("\n".join(lines[end + 1 :]), base)


def _table(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    table = []
    for key, value in islice(data.items(), _MOST_KEYS):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            text = ", ".join(value)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
        table.append((str(key), text if len(text) <= _MOST_VALUE else text[:_MOST_VALUE] + "…"))
    return table


def _named(git: GitStore, prefix: str) -> list[tuple[str, str]]:
    return [(name.removeprefix(prefix), commit) for name, commit in git.refs(prefix)]


ROUTES = [
    page_route("/{web}{repo}/tree/{rev}", tree),
    page_route("/{web}{repo}/tree/{rev}/{path}", tree),
    page_route("/{web}{repo}/blob/{rev}/{path}", blob),
    page_route("/{web}{repo}.git", wrong_id),
    page_route("/{web}{repo}", front),
]
