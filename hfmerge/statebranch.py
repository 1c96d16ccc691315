"""Kept states on the Hub: a branch of their own, so that people who only load the model do not pay for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfmerge.asking import patiently
from hfmerge.commits import listed, upload
from hfmerge.merged import STATE_BRANCH


def push_states(api: Any, repo_id: str, states: Sequence[Path]) -> None:
    """Add kept states to the branch; nothing of the merge is deleted yet."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if not states:
        return
    patiently(lambda: api.create_branch(repo_id, branch=STATE_BRANCH, exist_ok=True))
    held = listed(api, repo_id, STATE_BRANCH)
    adds = [CommitOperationAdd(f"merge_state/{p.name}", str(p)) for p in states if f"merge_state/{p.name}" not in held]
    for operation in adds:
        upload(api, repo_id, operation, revision=STATE_BRANCH)

    def commit() -> None:
        now = listed(api, repo_id, STATE_BRANCH)
        new = [operation for operation in adds if operation.path_in_repo not in now]
        foreign = [name for name in now if not name.startswith("merge_state/") and name != ".gitattributes"]
        operations = [*new, *(CommitOperationDelete(name) for name in foreign)]
        if operations:
            api.create_commit(repo_id, operations, commit_message="Keep state", revision=STATE_BRANCH)

    patiently(commit)


def drop_states(api: Any, repo_id: str, keep: Sequence[str]) -> None:
    """Delete states that no longer belong to the merge (they may hold a removed model)."""
    from huggingface_hub import CommitOperationDelete

    refs = patiently(lambda: api.list_repo_refs(repo_id))
    if not any(branch.name == STATE_BRANCH for branch in refs.branches):
        return

    def commit() -> None:
        held = listed(api, repo_id, STATE_BRANCH)
        old = [name for name in held if name.startswith("merge_state/") and name.partition("/")[2] not in keep]
        if old:
            operations = [CommitOperationDelete(name) for name in old]
            api.create_commit(repo_id, operations, commit_message="Drop obsolete state", revision=STATE_BRANCH)

    patiently(commit)
