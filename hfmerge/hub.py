"""Publish a merge: weights are uploaded, then one commit carries weights, ledger and card, guarded by its parent.

Kept states go to the branch `merge-state`, so that people who only load the model do not pay for them: new ones before
the commit on `main`, obsolete ones are deleted after it, so that no moment has a ledger without its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.asking import hub_api, hub_errors, patiently
from hfmerge.card import FILE, card_facts, combine_cards, render_card
from hfmerge.commits import commit_once, download, listed, moved, upload
from hfmerge.digest import sha256_bytes
from hfmerge.errors import HfMergeError, PushError
from hfmerge.ledger import FOLDER, Entry, check_chain
from hfmerge.marked import part, with_part
from hfmerge.merged import STATE_BRANCH
from hfmerge.pictures.embedding import FIGURES, drawn
from hfmerge.scorecard import PREFIX, carried_scores
from hfmerge.seen import remember_steps, repository_place
from hfmerge.statebranch import drop_states, push_states


if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

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
    uploaded: Sequence[CommitOperationAdd | CommitOperationCopy] = (),
) -> Pushed:
    """Publish the merge in `folder`.

    Args:
        folder: made by hfmerge.
        repo_id: created if it does not exist.
        private: visibility of a new repository; None: the Hub's default.
        create_pr: open a pull request instead of committing to `main`.
        parent_commit: what `main` must be at; None: what it is at when the push begins.
        uploaded: files of the merge that are not, or need not be, in `folder` (see `upload_weights`), or that are
            copied from an earlier commit.

    Raises:
        PushError: the branch moved, or the repository holds another merge. SourceError: no right, no connection.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = hub_api()
    history = {f"{FOLDER}/{p.name}": p.read_bytes() for p in sorted((folder / FOLDER).glob("*.json"))}
    entries = check_chain(history, str(folder))
    head = ensure_repo(repo_id, private=private, create_pr=create_pr)
    if parent_commit is not None and head != parent_commit:
        raise moved(repo_id, parent_commit)
    with hub_errors(repo_id):
        remote = listed(api, repo_id, head)
        _check_lineage(api, repo_id, head, remote, history)
        existing = download(api, repo_id, FILE, head).decode("utf-8") if FILE in remote else None
    card = combine_cards(existing, render_card(entries, card_facts(entries[-1], repo_id)))
    files = _public_files(folder)
    # pictures and scores are those of the folder, or none
    mine = files[FILE].read_text(encoding="utf-8") if FILE in files else ""
    card = carried_scores(mine, with_part(card, FIGURES, part(mine, FIGURES)))
    given = {operation.path_in_repo: operation for operation in uploaded}
    new = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != FILE and name not in given]
    adds = [*new, *given.values(), CommitOperationAdd(FILE, card.encode())]
    gone = [CommitOperationDelete(name) for name in _stale(remote, entries, [*files, *given], drawn(existing))]
    notes = []
    parent = parent_commit or head
    with hub_errors(repo_id):
        states = {name: folder / name for name in sorted(entries[-1].beside) if (folder / name).is_file()}
        if create_pr:
            if states:
                notes.append("the kept state stays here: a pull request cannot carry the branch merge-state")
        else:
            push_states(api, repo_id, states)
        # shard by shard, so that an interrupted upload goes on where it stopped
        for operation in new:
            if operation.path_in_repo.endswith(".safetensors"):
                upload(api, repo_id, operation, create_pr=create_pr)
        last = entries[-1]
        made = commit_once(
            api, repo_id, [*adds, *gone], title=_message(last), description=f"{last.how}.\nLedger: {last.file}",
            parent=parent, proof={last.file: history[last.file]}, create_pr=create_pr,
        )  # fmt: skip
    tag = None if create_pr else f"step-{last.step:04d}"
    if tag is not None:
        notes.extend(_follow_up(api, repo_id, made.oid, tag, _message(last), list(last.beside)))
        seen = remember_steps(repository_place(repo_id), {e.step: sha256_bytes(history[e.file]) for e in entries})
        notes.extend(() if seen is None else (seen,))
    return Pushed(repo_id, made.oid, made.url, made.pull_request, tag, tuple(notes))


def _follow_up(api: Any, repo_id: str, oid: str, tag: str, message: str, states: Sequence[str]) -> list[str]:
    """Tag the commit and delete obsolete states; the merge is published by now, so what fails is told, not raised."""
    notes = []
    again = f"push the folder to {repo_id} again to make up for it"
    try:
        with hub_errors(repo_id):
            patiently(lambda: api.create_tag(repo_id, tag=tag, revision=oid, tag_message=message, exist_ok=True))
    except HfMergeError as error:
        notes.append(f"published, but without the tag {tag}; {again} ({error})")
    try:
        with hub_errors(repo_id):
            drop_states(api, repo_id, states)
    except HfMergeError as error:
        notes.append(f"published, but obsolete states are still on the branch {STATE_BRANCH}; {again} ({error})")
    return notes


def ensure_repo(repo_id: str, *, private: bool | None = None, create_pr: bool = False) -> str:
    """The commit that `main` is at; a repository that does not exist is created, unless a pull request is wanted.

    Raises:
        SourceError: no right, no connection, nothing to open a pull request for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = hub_api()
    with hub_errors(repo_id):
        try:
            head = patiently(lambda: api.model_info(repo_id, revision="main")).sha
        except RepositoryNotFoundError:
            if create_pr:
                raise
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            head = patiently(lambda: api.model_info(repo_id)).sha
    return str(head)


def upload_weights(
    folder: Path, names: Sequence[str], repo_id: str, *, create_pr: bool = False
) -> list[CommitOperationAdd]:
    """Upload weight files from this machine without a commit; another machine commits them.

    Args:
        names: files in `folder`.

    Returns:
        What to commit, in the order of `names`; small enough to be sent there.

    Raises:
        SourceError: no right, no connection.
    """
    from huggingface_hub import CommitOperationAdd

    api = hub_api()
    operations = []
    with hub_errors(repo_id):
        for name in names:
            operation = CommitOperationAdd(name, str(folder / name))
            upload(api, repo_id, operation, create_pr=create_pr, free_memory=True)
            if operation.path_or_fileobj:
                # the repository keeps such files in git itself, so it is small, and travels with the commit
                operation = CommitOperationAdd(name, (folder / name).read_bytes())
            operations.append(operation)
    return operations


def _public_files(folder: Path) -> dict[str, Path]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    public = {name: path for name, path in files.items() if not name.startswith(PRIVATE_FILES)}
    # the Hub refuses these folders, which people's own tools leave in a folder
    return {name: path for name, path in public.items() if not {".git", ".cache"} & {*name.split("/")}}


def _message(entry: Entry) -> str:
    names = ", ".join(entry.subjects)
    done = {
        "merge": f"Merge {names}",
        "add": f"Add {names}",
        "unmerge": f"Take out {names}",
        "subtract": f"Subtract {names}",
        "replace": f"Replace {' by '.join(entry.subjects)}",
        "reorder": f"Reorder {names}",
        "rebase": f"Rebase onto {names}",
        "restore": f"Restore step {entry.restored}",
    }[entry.action]
    return f"{done} with hfmerge ({entry.method['name']}, step {entry.step})"


def _check_lineage(api: Any, repo_id: str, head: str, remote: Mapping[str, Any], history: Mapping[str, bytes]) -> None:
    """A repository that holds a ledger already takes only a continuation of it."""
    theirs = sorted(name for name in remote if name.startswith(f"{FOLDER}/"))
    for name in theirs:
        if history.get(name) != download(api, repo_id, name, head):
            raise PushError(
                f"{repo_id}: holds another merge ({name} differs); go on from it with `hfmerge add {repo_id} MODEL`, "
                "or push "
                "to another repository."
            )


def _stale(
    remote: Mapping[str, Any], entries: Sequence[Entry], files: Sequence[str], pictures: Sequence[str]
) -> list[str]:
    """Files of the repository that are wrong beside the new: former products, pictures, scores, foreign weights."""
    former = {*pictures, *(name for entry in entries for name in entry.products)}
    return [
        name
        for name in sorted(remote)
        if name not in files
        and (
            name in former
            or name == "LICENSE.md"
            or name.startswith(PREFIX)
            or ("/" not in name and name.endswith(WEIGHT_SUFFIXES))
        )
    ]
