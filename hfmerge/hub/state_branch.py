"""Kept states on the Hub lie on a branch of their own, so that loading the model does not download them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from hfmerge.hub.client import patiently
from hfmerge.hub.commits import listed, upload


STATE_BRANCH = "merge-state"
ATTRIBUTES = ".gitattributes"
"""File of the branch beside kept states and copies of sources: it names the large files."""
OWN = "merge_state/"
"""Folder of the branch that kept states and copies of sources lie in."""


def strange_files(api: Any, repo_id: str) -> list[str]:
    """Files on the branch that neither hfmerge nor `main` put there, in order; none if there is no such branch."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        held = listed(api, repo_id, STATE_BRANCH)
    except RevisionNotFoundError:
        return []
    return _strange(api, repo_id, held)


def _exists(api: Any, repo_id: str) -> bool:
    refs = patiently(lambda: api.list_repo_refs(repo_id))
    return any(branch.name == STATE_BRANCH for branch in refs.branches)


def _strange(api: Any, repo_id: str, held: Mapping[str, Any]) -> list[str]:
    """Files on the branch that are neither ours nor copies of files of `main`, from which the branch was made."""
    left = {name: item.blob_id for name, item in held.items() if not name.startswith(OWN) and name != ATTRIBUTES}
    if left:
        left = _without(left, listed(api, repo_id, "main"))
    if left:
        main = {*_history(api, repo_id, "main")}
        fork = next((commit for commit in _history(api, repo_id, STATE_BRANCH) if commit in main), None)
        left = _without(left, listed(api, repo_id, fork)) if fork is not None else left
    return sorted(left)


def _history(api: Any, repo_id: str, branch: str) -> list[str]:
    return patiently(lambda: [str(one.commit_id) for one in api.list_repo_commits(repo_id, revision=branch)])


def _without(left: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, str]:
    return {name: blob for name, blob in left.items() if name not in known or known[name].blob_id != blob}


def push_states(api: Any, repo_id: str, states: Mapping[str, Path], replaced: Collection[str] = ()) -> None:
    """Add kept states and copies of sources (path in the repository -> file). Nothing is deleted yet.

    Args:
        replaced: strange files (see `strange_files`) that may be deleted.
    """
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
        kept = {*_strange(api, repo_id, now)} - {*replaced}
        foreign = [name for name in now if not name.startswith(OWN) and name != ATTRIBUTES and name not in kept]
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
    if not files or not _exists(api, repo_id):
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

    if not commits:
        return

    def commit() -> None:
        held = _intact(api, repo_id)
        copies = [
            CommitOperationCopy(file, file, src_revision=oid) for file, oid in commits.items() if file not in held
        ]
        if copies:
            api.create_commit(repo_id, copies, commit_message="Restore state", revision=STATE_BRANCH)

    patiently(commit)


def drop_states(api: Any, repo_id: str, keep: Collection[str], replaced: Collection[str] = ()) -> list[str]:
    """Delete the files of the branch that no longer belong to the merge: they may hold a removed model.

    Args:
        keep: paths of the states and copies of sources that belong to the merge.
        replaced: strange files (see `strange_files`) that may be deleted.

    Returns:
        Paths of the deleted files.
    """

    def old(held: Mapping[str, Any]) -> list[str]:
        kept = {*keep, ATTRIBUTES, *_strange(api, repo_id, held)} - {*replaced}
        return [name for name in held if name not in kept]

    return _delete(api, repo_id, old, "Drop obsolete state")


def withdraw_states(api: Any, repo_id: str, names: Collection[str]) -> None:
    """Delete states and copies of sources from the branch."""
    _delete(api, repo_id, lambda held: [name for name in held if name in names], "Take state back")


def _delete(api: Any, repo_id: str, choose: Callable[[Mapping[str, Any]], list[str]], title: str) -> list[str]:
    from huggingface_hub import CommitOperationDelete

    gone: list[str] = []

    def commit() -> None:
        if names := choose(listed(api, repo_id, STATE_BRANCH)):
            gone.extend(names)
            operations = [CommitOperationDelete(name) for name in names]
            api.create_commit(repo_id, operations, commit_message=title, revision=STATE_BRANCH)

    if _exists(api, repo_id):
        patiently(commit)
    return gone
