"""Requests of a push, with retries: list files, upload files, and make one commit exactly once or not at all."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.errors import PushError
from hfmerge.hub.client import Patience, patiently, pause_after, status_of


UPLOADING = Patience(whole=15.0)
"""Retries of uploads. The client retries by itself for a while; after a long failed upload hfmerge does not retry."""


@dataclass(frozen=True)
class Commit:
    """A commit that was made: id, address, and the pull request that was opened with it, if any."""

    oid: str
    url: str
    pull_request: str | None


@dataclass(frozen=True)
class NewCommit:
    """A commit to be made.

    Attributes:
        operations: the files; large files are uploaded already.
        title, description: its message.
        parent: the commit that `main` must be at.
        proof: path -> bytes of a small file that no other commit on `parent` would hold.
        create_pr: open a pull request with it.
    """

    operations: Sequence[Any]
    title: str
    description: str
    parent: str
    proof: Mapping[str, bytes]
    create_pr: bool = False


def commit_once(api: Any, repo_id: str, new: NewCommit, *, patience: Patience | None = None) -> Commit:
    """Commit to `main`, or open a pull request; again where the Hub or the network fails for a moment.

    If an answer is lost, the commit may still have been made. It was made if the commit after `parent` on `main` holds
    `proof`. If it was not made, `parent` guards the next try.

    Raises:
        PushError: the branch moved, or it is not known whether the pull request was opened. Other errors are the
            client's.
    """
    patience, failures = patience or Patience(), 0
    while True:
        try:
            made = api.create_commit(
                repo_id, list(new.operations), commit_message=new.title, commit_description=new.description,
                create_pr=new.create_pr, parent_commit=new.parent,
            )  # fmt: skip
            return Commit(made.oid, str(made.commit_url), made.pr_url)
        except Exception as error:  # whatever does not pass is raised again
            status = status_of(error)
            stale = status == 412
            wait = None if stale else pause_after(error, failures + 1, patience)
            if new.create_pr and wait is not None and status not in (429, 503):
                raise PushError(
                    f"{repo_id}: the Hub's answer to the pull request was lost ({status or type(error).__name__}); "
                    "see on its community page whether it was opened before you run the command again."
                ) from error
            if not new.create_pr and (wait is not None or (stale and failures)):
                landed = patiently(lambda: _landed(api, repo_id, new.parent, new.proof))
                if landed is not None:
                    return landed
            if stale:
                raise moved(repo_id, new.parent) from error
            failures += 1
            if wait is None or failures >= patience.tries:
                raise
        time.sleep(wait)


def moved(repo_id: str, parent: str) -> PushError:
    """The error for the case that `main` moved since the work began."""
    return PushError(
        f"{repo_id}: main moved since {parent[:8]}; somebody pushed meanwhile. Nothing was changed there: run the "
        "command again on the new state."
    )


def _landed(api: Any, repo_id: str, parent: str, proof: Mapping[str, bytes]) -> Commit | None:
    """The commit that follows `parent` on `main`, if it is the last one and holds `proof`."""
    commits = api.list_repo_commits(repo_id, revision="main")
    if len(commits) < 2 or commits[1].commit_id != parent:
        return None
    oid = str(commits[0].commit_id)
    held = {item.path for item in api.get_paths_info(repo_id, list(proof), revision=oid)}
    for name, data in proof.items():
        if name not in held or download(api, repo_id, name, oid) != data:
            return None
    return Commit(oid, f"{api.endpoint}/{repo_id}/commit/{oid}", None)


def tag_once(api: Any, repo_id: str, tag: str, oid: str, message: str, files: Collection[str]) -> str | None:
    """Create a tag for a commit. An existing tag is not moved.

    Args:
        message: message of an annotated tag; empty: a plain tag.
        files: the files that the tag stands for. An existing tag of another commit with these files is accepted.

    Returns:
        The commit that an existing tag names, if its files differ; else None.
    """
    patiently(lambda: api.create_tag(repo_id, tag=tag, revision=oid, tag_message=message or None, exist_ok=True))
    refs = patiently(lambda: api.list_repo_refs(repo_id))
    named = next((str(ref.target_commit) for ref in refs.tags if ref.name == tag), oid)
    if named == oid:
        return None
    there, here = listed(api, repo_id, named), listed(api, repo_id, oid)
    same = all(name in there and name in here and there[name].blob_id == here[name].blob_id for name in files)
    return None if same else named


def upload(
    api: Any,
    repo_id: str,
    operation: Any,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    free_memory: bool = False,
) -> None:
    """Upload a file without a commit, if it is large. Parts that arrived earlier are not sent again."""
    patiently(
        lambda: api.preupload_lfs_files(
            repo_id, [operation], revision=revision, create_pr=create_pr or None, free_memory=free_memory
        ),
        UPLOADING,
    )


def listed(api: Any, repo_id: str, revision: str) -> dict[str, Any]:
    """Files of a revision, by path."""
    tree = patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
    return {item.path: item for item in tree if hasattr(item, "size")}


def download(api: Any, repo_id: str, name: str, revision: str) -> bytes:
    """A small file of a revision."""
    return Path(patiently(lambda: api.hf_hub_download(repo_id, name, revision=revision))).read_bytes()
