"""Kept states on the Hub: a branch of their own, so that people who only load the model do not pay for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from hfmerge.hub.client import patiently
from hfmerge.hub.commits import listed, upload


STATE_BRANCH = "merge-state"
ATTRIBUTES = ".gitattributes"
"""What the branch holds beside kept states and copies of sources: it says what is large."""


def push_states(api: Any, repo_id: str, states: Mapping[str, Path]) -> None:
    """Add kept states and copies of sources (path in the repository -> file); nothing is deleted yet."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if not states:
        return
    patiently(lambda: api.create_branch(repo_id, branch=STATE_BRANCH, exist_ok=True))
    held = _intact(api, repo_id)
    adds = [CommitOperationAdd(name, str(path)) for name, path in states.items() if name not in held]
    for operation in adds:
        upload(api, repo_id, operation, revision=STATE_BRANCH)

    def commit() -> None:
        now, good = listed(api, repo_id, STATE_BRANCH), _intact(api, repo_id)
        new = [operation for operation in adds if operation.path_in_repo not in good]
        foreign = [name for name in now if not name.startswith("merge_state/") and name != ATTRIBUTES]
        operations = [*new, *(CommitOperationDelete(name) for name in foreign)]
        if operations:
            api.create_commit(repo_id, operations, commit_message="Keep state", revision=STATE_BRANCH)

    patiently(commit)


def _intact(api: Any, repo_id: str) -> list[str]:
    """States and copies on the branch that are what their names, which are their digests, say."""
    return [name for name, item in listed(api, repo_id, STATE_BRANCH).items() if _as_named(item)]


def _as_named(item: Any) -> bool:
    return item.lfs is not None and item.lfs.sha256 == PurePosixPath(item.path).stem


def find_states(api: Any, repo_id: str, files: Sequence[str]) -> dict[str, str]:
    """Path of a state -> a commit of the branch that holds it; states that no commit holds any more are left out."""
    refs = patiently(lambda: api.list_repo_refs(repo_id))
    if not files or not any(branch.name == STATE_BRANCH for branch in refs.branches):
        return {}
    found: dict[str, str] = {}
    for commit in patiently(lambda: list(api.list_repo_commits(repo_id, revision=STATE_BRANCH))):
        wanted = [file for file in files if file not in found]
        if not wanted:
            break
        oid = str(commit.commit_id)
        infos = patiently(partial(api.get_paths_info, repo_id, wanted, revision=oid))
        found |= {str(info.path): oid for info in infos if _as_named(info)}
    return found


def bring_states_back(api: Any, repo_id: str, commits: Mapping[str, str]) -> None:
    """Put states that earlier commits of the branch hold, as `find_states` found them, back where they were."""
    from huggingface_hub import CommitOperationCopy

    def commit() -> None:
        held = _intact(api, repo_id)
        copies = [
            CommitOperationCopy(file, file, src_revision=oid) for file, oid in commits.items() if file not in held
        ]
        if copies:
            api.create_commit(repo_id, copies, commit_message="Restore state", revision=STATE_BRANCH)

    patiently(commit)


def drop_states(api: Any, repo_id: str, keep: Sequence[str]) -> None:
    """Delete whatever is on the branch and no longer belongs to the merge (it may hold a removed model).

    Args:
        keep: paths of states and copies of sources that do.
    """
    from huggingface_hub import CommitOperationDelete

    refs = patiently(lambda: api.list_repo_refs(repo_id))
    if not any(branch.name == STATE_BRANCH for branch in refs.branches):
        return

    def commit() -> None:
        held = listed(api, repo_id, STATE_BRANCH)
        old = [name for name in held if name not in keep and name != ATTRIBUTES]
        if old:
            operations = [CommitOperationDelete(name) for name in old]
            api.create_commit(repo_id, operations, commit_message="Drop obsolete state", revision=STATE_BRANCH)

    patiently(commit)
