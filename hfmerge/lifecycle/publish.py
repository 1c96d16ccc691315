"""Publishes a merge: uploads the weights, then makes one commit with weights, ledger and card, guarded by its parent.

Kept states go to the branch `merge-state`, so that people who only load the model do not download them. New states are
pushed before the commit on `main`, and obsolete states are deleted after it. So a published ledger always has its
states.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hfmerge.engine.plan import Plan
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.storage import find_disks, own_params
from hfmerge.errors import HfMergeError, OfflineError, OutputError, PushError
from hfmerge.evaluation.plots.embedding import FIGURES, drawn
from hfmerge.hashing import sha256_bytes
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.commits import NewCommit, commit_once, moved, tag_once, upload
from hfmerge.hub.download import pin
from hfmerge.hub.privacy import restricted
from hfmerge.hub.reference import ModelRef, Snapshot
from hfmerge.hub.state_branch import (
    STATE_BRANCH,
    bring_states_back,
    drop_states,
    find_states,
    push_states,
    withdraw_states,
)
from hfmerge.ledger.card import FILE, card_facts, combine_cards, present_site, render_card
from hfmerge.ledger.card_sections import RESULTS_PREFIX, carried_scores, part, with_part
from hfmerge.ledger.entry import LEDGER_FOLDER, Entry
from hfmerge.ledger.log import commit_of
from hfmerge.ledger.removal import contained_models
from hfmerge.ledger.repository import ledger_in, noted_places
from hfmerge.ledger.seen import remember_steps, repository_place
from hfmerge.lifecycle.push_target import (
    Destination,
    Target,
    card_there,
    check_branch,
    check_levels,
    check_replacement,
    find_target,
    made_by,
    make_target,
    with_snapshots,
)
from hfmerge.validation.folders import files_in
from hfmerge.validation.quoting import markdown, plain
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

PRIVATE_FILES = ("merge_state/",)
"""Not on `main`: states live on their own branch, and local paths nowhere."""


@dataclass(frozen=True)
class Pushed:
    """A push that was made: repository, commit on `main` (or of the pull request), addresses, tag."""

    repo_id: str
    commit: str
    url: str
    pull_request: str | None
    tag: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A push that may begin.

    Attributes:
        entries, history: the ledger of the merge, and its files.
        target: the repository as it is.
        lost: files of the repository that are not of this merge, and that the push replaces or deletes.
        strange: such files on the branch of kept states.
        notes: remarks for the user.
    """

    entries: tuple[Entry, ...]
    history: Mapping[str, bytes]
    target: Target
    lost: tuple[str, ...]
    strange: tuple[str, ...]
    notes: tuple[str, ...]


def open_push(folder: Path, to: Destination, written: Sequence[str] = ()) -> Opened:
    """Find or create the repository, and check that the merge in `folder` may be pushed to it.

    Args:
        written: files that will be there.

    Raises:
        PushError: somebody pushed meanwhile, the repository holds something else, or more people may read it than may
            read the inputs.
        SourceError: no right, no connection.
    """
    snapshot = pin(ModelRef(str(folder), None, None, folder))
    entries, history = ledger_in(snapshot)
    inputs = with_snapshots(contained_models(entries[-1]), noted_places(snapshot, entries[-1]))
    levels = restricted(part.identity for part in inputs)
    notes = []
    target = find_target(to)
    if target is None:
        make_target(to, levels)
        target = find_target(to)
        if held := to.withheld(levels, 0):
            notes.append(f"{to.repo_id} is a private repository, since not everybody may read {', '.join(held)}")
    if target is None:
        raise PushError(f"{to.repo_id}: was deleted meanwhile; run the command again.")
    if to.parent_commit is not None and target.head != to.parent_commit:
        raise moved(to.repo_id, to.parent_commit)
    check_levels(to, target.level, levels)
    lost, note = check_replacement(to, target, inputs, history, written=written)
    strange, other = check_branch(to)
    notes.extend(line for line in (note, other) if line is not None)
    return Opened(entries, history, target, tuple(lost), tuple(strange), tuple(notes))


def push_folder(
    folder: Path,
    to: Destination,
    uploaded: Sequence[CommitOperationAdd | CommitOperationCopy] = (),
    earlier: Mapping[str, str] = MappingProxyType({}),
) -> Pushed:
    """Publish the merge in `folder`.

    Args:
        folder: made by hfmerge.
        to: the target repository.
        uploaded: files of the merge that need not be in `folder`, because they are uploaded already (see
            `upload_weights`) or are copied from an earlier commit.
        earlier: kept states of the merge that are not in `folder` -> a commit of their branch that holds them.

    Raises:
        PushError: see `open_push`. SourceError: no right, no connection.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, repo_id, create_pr = hub_api(), to.repo_id, to.create_pr
    held = files_in(folder)
    files = _public_files(held)
    uploads = {operation.path_in_repo: operation for operation in uploaded}
    opened = open_push(folder, to, [name for name in (*files, *uploads) if name != FILE])
    entries, history, remote, head = opened.entries, opened.history, opened.target.files, opened.target.head
    existing = card_there(repo_id, opened.target)
    card = combine_cards(existing, render_card(entries, card_facts(entries[-1], repo_id, present_site())))
    # pictures and scores come from the folder, never from the repository
    mine = files[FILE].read_text(encoding="utf-8") if FILE in files else ""
    card = carried_scores(mine, with_part(card, FIGURES, part(mine, FIGURES)))
    new = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != FILE and name not in uploads]
    adds = [*new, *uploads.values(), CommitOperationAdd(FILE, card.encode())]
    former = _stale(remote, entries, drawn(existing))
    deletions = [CommitOperationDelete(name) for name in sorted({*former, *opened.lost} - {*files, *uploads})]
    notes, last = list(opened.notes), entries[-1]
    states = {name: held[name] for name in sorted(last.beside) if name in held}
    if create_pr and states:
        notes.append(
            f"the kept state was not published: a pull request cannot change the branch {STATE_BRANCH}. When the pull "
            "request is merged, push directly; that publishes the state, and deletes the state of the step before"
        )

    def publish_states() -> None:
        push_states(api, repo_id, states, opened.strange)
        bring_states_back(api, repo_id, earlier)

    kept = [] if create_pr else [*states, *earlier]
    with _taken_back(api, repo_id, kept) if kept else contextlib.nullcontext(), hub_errors(repo_id, "write"):
        if kept:
            publish_states()
        # shard by shard, so that an interrupted upload goes on where it stopped
        for operation in new:
            if operation.path_in_repo.endswith(".safetensors"):
                upload(api, repo_id, operation, create_pr=create_pr)
        commit = NewCommit(
            [*adds, *deletions], title=plain(to.message) if to.message else _message(last),
            description="\n".join([f"{markdown(last.how)}.", f"Ledger: {last.file}", *opened.notes]),
            parent=head, proof={last.file: history[last.file]}, create_pr=create_pr,
        )  # fmt: skip
        made = commit_once(api, repo_id, commit)
    tag = None
    if not create_pr:
        tag = _after_commit(api, repo_id, made.oid, opened, publish_states if kept else None, notes)
    return Pushed(repo_id, made.oid, made.url, made.pull_request, tag, tuple(notes))


def _after_commit(
    api: Any, repo_id: str, oid: str, opened: Opened, again: Callable[[], None] | None, notes: list[str]
) -> str | None:
    """Tag the commit, clear the branch of states and remember the history. A failure adds a note.

    Args:
        again: publishes the states once more.

    Returns:
        The tag, or None.
    """
    entries, history, last, tag = opened.entries, opened.history, opened.entries[-1], None
    if any(name.startswith(f"{LEDGER_FOLDER}/") for name in opened.lost):
        notes.extend(_untagged(api, repo_id))
    advice = f"push the folder to {repo_id} again to correct this"
    try:
        with hub_errors(repo_id):
            tag = _tag(api, repo_id, oid, last, notes)
    except HfMergeError as error:
        notes.append(f"published, but without the tag {_tag_name(last)}; {advice} ({error})")
    try:
        with hub_errors(repo_id):
            if again is not None:
                # once more, since somebody else's clean-up may have read the ledger before this commit
                again()
            _tidy(api, repo_id, oid, last, opened.strange)
    except HfMergeError as error:
        notes.append(f"published, but obsolete states are still on the branch {STATE_BRANCH}; {advice} ({error})")
    seen = remember_steps(repository_place(repo_id), {e.step: sha256_bytes(history[e.file]) for e in entries})
    notes.extend(() if seen is None else (seen,))
    return tag


def _untagged(api: Any, repo_id: str) -> list[str]:
    """Delete the tags of another merge's steps, which this one has replaced; says which they were."""
    gone = []
    try:
        with hub_errors(repo_id, "write"):
            refs = patiently(lambda: api.list_repo_refs(repo_id))
            for tag in refs.tags:
                if re.fullmatch(r"step-\d{4,}", tag.name):
                    patiently(partial(api.delete_tag, repo_id, tag=tag.name))
                    gone.append(f"{tag.name} ({tag.target_commit[:12]})")
    except HfMergeError as error:
        return [f"published, but tags of the merge that was there before are still there ({error})"]
    return [f"deleted the tags of the merge that was there before: {', '.join(gone)}"] if gone else []


def finish_push(snapshot: Snapshot, last: Entry, to: Destination) -> Pushed:
    """Finish a push that ended after its commit: set the tag, and delete obsolete states from their branch.

    Args:
        snapshot: the repository.
        last: the last entry of its ledger.
        to: the destination with the consents of the user.

    Raises:
        PushError: somebody else uses the branch. SourceError: no right, no connection.
    """
    api, repo_id, notes = hub_api(), snapshot.name, list[str]()
    strange, note = check_branch(to)
    notes.extend([note] if note is not None else ())
    oid = commit_of(snapshot, last.file)
    with hub_errors(repo_id, "write"):
        tag = _tag(api, repo_id, oid, last, notes)
        _tidy(api, repo_id, str(snapshot.commit), last, strange)
    return Pushed(repo_id, oid, f"{api.endpoint}/{repo_id}/commit/{oid}", None, tag, tuple(notes))


def _tag_name(last: Entry) -> str:
    return f"step-{last.step:04d}"


def _tag(api: Any, repo_id: str, oid: str, last: Entry, notes: list[str]) -> str | None:
    """Tag the commit of a step; None, with a note, where the tag is taken."""
    tag = _tag_name(last)
    other = tag_once(api, repo_id, tag, oid, _message(last), [last.file, *last.products])
    if other is None:
        return tag
    notes.append(
        f"published, but without the tag {tag}: there is one of the commit {other[:12]}, which holds other files, and "
        f"it was left as it is; `hf repos tag delete {repo_id} {tag}` deletes it, then push again"
    )
    return None


@contextlib.contextmanager
def _taken_back(api: Any, repo_id: str, states: Sequence[str]) -> Iterator[None]:
    """When a push fails, take back the states that were published for it: they may hold what the winner took out."""
    try:
        yield
    except OfflineError:
        raise  # the Hub cannot be reached to delete them; `verify` names the files that are left
    except HfMergeError as error:
        try:
            with hub_errors(repo_id, "write"):
                withdraw_states(api, repo_id, {*states} - {*_listed_states(repo_id)})
        except HfMergeError as other:
            left = f"{error} The state that it kept is still on the branch {STATE_BRANCH} ({other})"
            raise type(error)(left) from error
        raise


def _tidy(api: Any, repo_id: str, commit: str, last: Entry, strange: Sequence[str]) -> None:
    """Delete obsolete states, but no state that somebody else publishes meanwhile.

    Who pushes publishes states, then a ledger that lists them, then again those that are missing. So states of a
    ledger that comes while this deletes are either put back by who pushes, or seen afterwards and brought back here.

    Args:
        commit: what `main` was at when `last` was the last entry of its ledger.
        strange: files of somebody else on the branch that may be deleted.
    """

    def listed_now() -> list[str]:
        head = str(patiently(lambda: api.model_info(repo_id, revision="main")).sha)
        return list(last.beside) if head == commit else _listed_states(repo_id)

    gone = drop_states(api, repo_id, listed_now(), strange)
    if missing := sorted({*gone} & {*(listed_now() if gone else ())}):
        bring_states_back(api, repo_id, find_states(api, repo_id, missing))


def _listed_states(repo_id: str) -> list[str]:
    """States and copies that the ledger of a repository lists, if it has a ledger.

    Raises:
        LedgerError: it has one that cannot be read. SourceError: the Hub cannot be asked.
    """
    snapshot = pin(ModelRef(repo_id, repo_id, None, None))
    if not any(name.startswith(f"{LEDGER_FOLDER}/") for name in snapshot.files):
        return []
    return list(ledger_in(snapshot)[0][-1].beside)


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
    with hub_errors(repo_id, "write"):
        for name in names:
            operation = CommitOperationAdd(name, str(folder / name))
            upload(api, repo_id, operation, create_pr=create_pr, free_memory=True)
            if operation.path_or_fileobj:
                # the repository keeps such files in git itself, so it is small, and travels with the commit
                operation = CommitOperationAdd(name, (folder / name).read_bytes())
            operations.append(operation)
    return operations


def _public_files(held: Mapping[str, Path]) -> dict[str, Path]:
    public = {name: path for name, path in held.items() if not name.startswith(PRIVATE_FILES)}
    # the Hub refuses these folders, which people's own tools leave in a folder
    return {name: path for name, path in public.items() if not {".git", ".cache"} & {*name.split("/")}}


def _message(entry: Entry) -> str:
    names = plain(", ".join(entry.subjects))
    done = {
        "merge": f"Merge {names}",
        "add": f"Add {names}",
        "unmerge": f"Take out {names}",
        "subtract": f"Subtract {names}",
        "replace": f"Replace {plain(' by '.join(entry.subjects))}",
        "reorder": f"Reorder {names}",
        "rebase": f"Rebase onto {names}",
        "restore": f"Restore step {entry.restored}",
    }[entry.action]
    return f"{done} with hfmerge ({entry.method.name}, step {entry.step})"


def _stale(remote: Mapping[str, Any], entries: Sequence[Entry], pictures: Sequence[str]) -> list[str]:
    """Files of the repository that its last step left: products, licences, pictures, scores."""
    there = [entry for entry in entries if entry.file in remote]
    former = {*pictures, *(made_by(there[-1]) if there else ())}
    return [name for name in remote if name in former or name.startswith(RESULTS_PREFIX)]


def with_disks(ranks: Ranks, target: str | Path | None, storage: str) -> Ranks:
    """The processes with a note on which of them write to one disk.

    Args:
        target: folder of the result; None when it only goes to the Hub, from temporary folders.
        storage: see `engine.storage.STORAGE`.

    Raises:
        OutputError: the result is to go into a folder that some machines do not see.
    """
    place = Path(target).absolute().parent if target is not None else Path(tempfile.gettempdir())
    ranks = find_disks(ranks, place, storage)
    if ranks.disk_count > 1 and target is not None:
        raise OutputError(
            f"{target}: the machines of this run share no disk there; choose a folder that all of them see, or name "
            f"none and publish with {parameter('push_to')}. Each machine then uploads its own files."
        )
    return ranks


def publish(planned: Plan, folder: Path, ranks: Ranks, to: Destination) -> Pushed:
    """Publish the result of a run, called on all ranks: each machine uploads its own files, rank 0 commits all.

    Args:
        folder: the output folder on this process's disk. Rank 0's folder has all files but the weights that were made
            on other disks.

    Raises:
        PushError, SourceError: see `push_folder`.
    """
    if ranks.disk_count == 1:
        return ranks.on_main(lambda: push_folder(folder, to))
    repo_id, create_pr = to.repo_id, to.create_pr
    ranks.on_main(lambda: open_push(folder, to).target.head)
    files = sorted({param.file for param in own_params(planned, ranks)}) if ranks.leads else []
    parts = ranks.together(lambda: upload_weights(folder, files, repo_id, create_pr=create_pr))
    return ranks.on_main(lambda: push_folder(folder, to, [operation for part in parts for operation in part]))
