"""What a page may read of a repository: what its viewer may, up to a limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import Entry, GitStore
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.wire import Call, HubFault


@contextmanager
def opened(hub: Hub, call: Call) -> Iterator[tuple[RepoRow, GitStore]]:
    """The repository of a request, whose content its user may read."""
    row = hub.repo(call)
    hub.require_content(row, call)
    with hub.git(row) as git:
        yield row, git


def refusal(hub: Hub, row: RepoRow, call: Call) -> str | None:
    """Why the user may not read the content of a gated repository, None if they may."""
    try:
        hub.require_content(row, call)
    except HubFault as fault:
        return fault.message
    return None


def is_here(entry: Entry) -> bool:
    """Whether there are bytes to read: a large file may have been deleted for good."""
    return entry.lfs is None or entry.lfs.present


def read_text(hub: Hub, git: GitStore, entry: Entry | None, most: int) -> str | None:
    """The text of a file; None if there is none: missing, deleted, longer than `most` bytes, or not a text."""
    if entry is None or entry.is_folder or entry.size > most or not is_here(entry):
        return None
    data = hub.content(git, entry)
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
