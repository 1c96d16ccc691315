"""Publish a merge: weights are uploaded, then one commit carries weights, ledger and card, guarded by its parent.

Kept states go to the branch `merge-state`, so that people who only load the model do not pay for them: new ones before
the commit on `main`, obsolete ones are deleted after it, so that no moment has a ledger without its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.card import FILE, card_facts, combine_cards, render_card
from hfmerge.errors import PushError
from hfmerge.ledger import FOLDER, Entry, check_chain
from hfmerge.merged import STATE_BRANCH
from hfmerge.source import hub_api, hub_errors


WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
PRIVATE_FILES = ("merge_state/",)
"""Not on `main`: states live on their own branch, and local paths nowhere."""


@dataclass(frozen=True)
class Pushed:
    """Where a merge went: repository, commit on `main` (or of the pull request), addresses, tag."""

    repo_id: str
    commit: str
    url: str
    pull_request: str | None
    tag: str | None
    notes: tuple[str, ...] = ()


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
) -> Pushed:
    """Publish the merge in `folder`.

    Args:
        folder: made by hfmerge.
        repo_id: created if it does not exist.
        private: visibility of a new repository; None: the Hub's default.
        create_pr: open a pull request instead of committing to `main`.
        parent_commit: what `main` must be at; None: what it is at when the push begins.

    Raises:
        PushError: the branch moved, or the repository holds another merge. SourceError: no right, no connection.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = hub_api()
    history = {f"{FOLDER}/{p.name}": p.read_bytes() for p in sorted((folder / FOLDER).glob("*.json"))}
    entries = check_chain(history, str(folder))
    with hub_errors(repo_id):
        try:
            head = api.model_info(repo_id, revision="main").sha
        except RepositoryNotFoundError:
            if create_pr:
                raise
            api.create_repo(repo_id, private=private, exist_ok=True)
            head = api.model_info(repo_id).sha
        remote = {
            item.path: item
            for item in api.list_repo_tree(repo_id, recursive=True, revision=head)
            if hasattr(item, "size")
        }
        _check_lineage(api, repo_id, head, remote, history)
        existing = None
        if FILE in remote:
            existing = Path(api.hf_hub_download(repo_id, FILE, revision=head)).read_text(encoding="utf-8")
    card = combine_cards(existing, render_card(entries, card_facts(entries[-1], repo_id)))
    files = _public_files(folder)
    adds = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != FILE]
    adds.append(CommitOperationAdd(FILE, card.encode()))
    gone = [CommitOperationDelete(name) for name in _stale(remote, entries, list(files))]
    notes = []
    parent = parent_commit or head
    with hub_errors(repo_id):
        states = sorted((folder / "merge_state").glob("*.safetensors"))
        if create_pr:
            if states:
                notes.append("the kept state stays here: a pull request cannot carry the branch merge-state")
        else:
            _push_states(api, repo_id, states)
        try:
            # shard by shard, so that an interrupted upload goes on where it stopped
            for operation in adds:
                if operation.path_in_repo.endswith(".safetensors"):
                    api.preupload_lfs_files(repo_id, [operation], create_pr=create_pr or None, free_memory=False)
            info = api.create_commit(
                repo_id,
                [*adds, *gone],
                commit_message=_message(entries[-1]),
                commit_description=f"{entries[-1].how}.\nLedger: {entries[-1].file}",
                create_pr=create_pr,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            if getattr(error.response, "status_code", None) == 412:
                raise PushError(
                    f"{repo_id}: main moved since {str(parent)[:8]}; somebody pushed meanwhile. Nothing was changed "
                    "there: run the command again on the new state."
                ) from error
            raise
        tag = None
        if not create_pr:
            tag = f"step-{entries[-1].step:04d}"
            api.create_tag(repo_id, tag=tag, revision=info.oid, tag_message=_message(entries[-1]), exist_ok=True)
            _drop_states(api, repo_id, [path.name for path in states])
    return Pushed(repo_id, info.oid, str(info.commit_url), info.pr_url, tag, tuple(notes))


def _public_files(folder: Path) -> dict[str, Path]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    public = {name: path for name, path in files.items() if not name.startswith(PRIVATE_FILES)}
    # the Hub refuses these folders, which people's own tools leave in a folder
    return {name: path for name, path in public.items() if not {".git", ".cache"} & {*name.split("/")}}


def _message(entry: Entry) -> str:
    verb = {"merge": "Merge", "add": "Add", "unmerge": "Take out"}[entry.action]
    return f"{verb} {', '.join(entry.subjects)} with hfmerge ({entry.method['name']}, step {entry.step})"


def _check_lineage(api: Any, repo_id: str, head: str, remote: Mapping[str, Any], history: Mapping[str, bytes]) -> None:
    """A repository that holds a ledger already takes only a continuation of it."""
    theirs = sorted(name for name in remote if name.startswith(f"{FOLDER}/"))
    for name in theirs:
        data = Path(api.hf_hub_download(repo_id, name, revision=head)).read_bytes()
        if history.get(name) != data:
            raise PushError(
                f"{repo_id}: holds another merge ({name} differs); go on from it with `hfmerge add {repo_id} MODEL`, "
                "or push "
                "to another repository."
            )


def _stale(remote: Mapping[str, Any], entries: Sequence[Entry], files: Sequence[str]) -> list[str]:
    """Files of the repository that would be wrong beside the new ones: former products, and foreign root weights."""
    former = {name for entry in entries for name in entry.products}
    return [
        name
        for name in sorted(remote)
        if name not in files
        and (name in former or name == "LICENSE.md" or ("/" not in name and name.endswith(WEIGHT_SUFFIXES)))
    ]


def _push_states(api: Any, repo_id: str, states: Sequence[Path]) -> None:
    """Add the kept states to their branch; nothing is deleted yet."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if not states:
        return
    api.create_branch(repo_id, branch=STATE_BRANCH, exist_ok=True)
    held = [
        item.path
        for item in api.list_repo_tree(repo_id, recursive=True, revision=STATE_BRANCH)
        if hasattr(item, "size")
    ]
    adds = [CommitOperationAdd(f"merge_state/{p.name}", str(p)) for p in states if f"merge_state/{p.name}" not in held]
    foreign = [name for name in held if not name.startswith("merge_state/") and name != ".gitattributes"]
    operations = [*adds, *(CommitOperationDelete(name) for name in foreign)]
    if operations:
        api.create_commit(repo_id, operations, commit_message="Keep state", revision=STATE_BRANCH)


def _drop_states(api: Any, repo_id: str, keep: Sequence[str]) -> None:
    """Delete states that no longer belong to the merge (they may hold a removed model)."""
    from huggingface_hub import CommitOperationDelete

    if not any(branch.name == STATE_BRANCH for branch in api.list_repo_refs(repo_id).branches):
        return
    held = [
        item.path
        for item in api.list_repo_tree(repo_id, recursive=True, revision=STATE_BRANCH)
        if hasattr(item, "size")
    ]
    old = [name for name in held if name.startswith("merge_state/") and name.partition("/")[2] not in keep]
    if old:
        operations = [CommitOperationDelete(name) for name in old]
        api.create_commit(repo_id, operations, commit_message="Drop obsolete state", revision=STATE_BRANCH)
