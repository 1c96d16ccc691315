"""Squashes a published merge's history, so that no branch leads to earlier weights, and lists what still does.

The ledger consists of files, so the squash keeps it. Commits get new ids. An old commit stays reachable if a tag, a
pull request or somebody's branch leads to it. The present files of the merge do not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hfmerge.errors import HfMergeError, NotFoundError, PushError, VerificationError
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.commits import tag_once
from hfmerge.hub.state_branch import STATE_BRANCH, drop_states, strange_files
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.lifecycle.push_target import require_writer
from hfmerge.lifecycle.verify import WEIGHTS, check_merged
from hfmerge.validation.wording import parameter


BRANCHES = ("main", STATE_BRANCH)
OUT_OF_REACH = "duplicates of the repository, downloads, and caches of the Hub cannot be listed or reached"


@dataclass(frozen=True)
class EarlierFile:
    """A large file that belongs to an earlier step alone: path, newest such step, SHA-256."""

    path: str
    step: int
    sha256: str


@dataclass(frozen=True)
class PurgePlan:
    """The plan of a purge, made without changing anything.

    Attributes:
        repo_id: the repository.
        head: the present commit of `main`.
        commits: branch that is squashed -> its number of commits.
        tags: hfmerge's own tags `step-NNNN`. All are deleted; the tag of the present step is made again.
        files: large files of earlier steps that will be deleted from the Hub's storage; None if they are to stay.
        leftovers: one line for each further thing that holds earlier weights or leads to a commit with them.
        children: models whose cards name this one as their base; they may contain earlier weights.
    """

    repo_id: str
    head: str
    commits: Mapping[str, int]
    tags: tuple[str, ...]
    files: tuple[EarlierFile, ...] | None
    leftovers: tuple[str, ...]
    children: tuple[str, ...]


@dataclass(frozen=True)
class Purged:
    """The result of a purge: its plan, the new head of `main`, and remarks for the user."""

    plan: PurgePlan
    head: str
    notes: tuple[str, ...]


def purge(
    repo_id: str, *, delete_files: bool = False, confirm: Callable[[PurgePlan], bool] | None = None
) -> Purged | None:
    """Squash the branches of a published merge; None if `confirm` refuses.

    Args:
        repo_id: `org/name`.
        delete_files: also delete the large files of earlier steps from the Hub's storage. Then no reference gives them
            any more.
        confirm: called with the plan before anything changes; False ends the purge.

    Raises:
        VerificationError: the merge is not what its ledger says. PushError: somebody pushed meanwhile, or uses the
            branch of kept states. SourceError: no such repository, no right, no connection.
    """
    # what interrupted commands left is dropped with the history
    merged = _published(repo_id, strays=False)
    repo_id, api = merged.snapshot.name, hub_api()
    with hub_errors(repo_id):
        if strange := strange_files(api, repo_id):
            raise PushError(
                f"{repo_id}: not purged, since its branch {STATE_BRANCH} holds {strange[0]}, which is not of a merge; "
                "move it to another branch."
            )
        plan = _plan(api, merged, delete_files)
    if confirm is not None and not confirm(plan):
        return None
    require_writer(repo_id)
    with hub_errors(repo_id):
        return _purged(api, merged, plan)


def _published(repo_id: str, *, strays: bool = True) -> Merged:
    merged = open_merged(repo_id)
    snapshot = merged.snapshot
    if snapshot.folder is not None or snapshot.subfolder is not None or snapshot.ref.revision not in (None, "main"):
        raise HfMergeError(f"{repo_id}: name a repository on the Hub, `org/name`, without a revision.")
    report = check_merged(merged, strays=strays)
    if not report.ok:
        raise VerificationError(f"{repo_id}: not purged, since its history may be needed; {report.culprits[0]}")
    return merged


def _plan(api: Any, merged: Merged, delete_files: bool) -> PurgePlan:
    repo_id, earlier = merged.snapshot.name, earlier_files(merged.entries)
    refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    commits = {
        branch.name: _history(api, repo_id, branch.target_commit)
        for branch in refs.branches
        if branch.name in BRANCHES
    }
    own = [tag.name for tag in refs.tags if re.fullmatch(r"step-\d{4,}", tag.name)]
    others = [("branch", ref) for ref in refs.branches if ref.name not in BRANCHES]
    others += [("tag", ref) for ref in refs.tags if ref.name not in own]
    others += [("converted branch", ref) for ref in refs.converts]
    others += [("pull request", ref) for ref in refs.pull_requests or ()]
    old = [commit for ids in commits.values() for commit in ids]
    leftovers = []
    for kind, ref in others:
        reason = _why_left(api, repo_id, ref.target_commit, earlier, old)
        if reason is not None:
            leftovers.append(f"{kind} {ref.name}: {reason}")
    files = None
    if delete_files:
        files = tuple(earlier[file.file_oid] for file in _large_files(api, repo_id) if file.file_oid in earlier)
    children = patiently(lambda: [str(model.id) for model in api.list_models(filter=f"base_model:{repo_id}")])
    return PurgePlan(
        repo_id,
        str(merged.snapshot.commit),
        {name: len(ids) for name, ids in commits.items()},
        tuple(own),
        files,
        tuple(leftovers),
        tuple(sorted(set(children) - {repo_id})),
    )


def earlier_files(entries: Sequence[Entry]) -> dict[str, EarlierFile]:
    """SHA-256 -> weight file or kept state, for all that belong to earlier steps alone."""
    last = entries[-1]
    found: dict[str, EarlierFile] = {}
    for entry in entries[:-1]:
        files = {name: digest for name, digest in entry.products.items() if name.endswith(WEIGHTS)}
        files |= entry.beside
        found |= {digest: EarlierFile(name, entry.step, digest) for name, digest in files.items()}
    now = {*last.products.values(), *last.beside.values()}
    return {digest: file for digest, file in found.items() if digest not in now}


def _why_left(
    api: Any, repo_id: str, commit: str, earlier: Mapping[str, EarlierFile], old: Sequence[str]
) -> str | None:
    """How a reference leads to earlier weights; None if it does not."""
    info = patiently(lambda: api.model_info(repo_id, revision=commit, files_metadata=True))
    held = [item.lfs.sha256 for item in info.siblings or () if item.lfs is not None]
    steps = sorted({earlier[digest].step for digest in held if digest in earlier})
    if steps:
        return f"holds the weights of step {', '.join(map(str, steps))}"
    behind = _history(api, repo_id, commit)
    return "its history leads to the earlier commits" if set(behind) & set(old) else None


def _history(api: Any, repo_id: str, commit: str) -> list[str]:
    """Ids of a commit and of all before it."""
    return patiently(lambda: [one.commit_id for one in api.list_repo_commits(repo_id, revision=commit)])


def _large_files(api: Any, repo_id: str) -> list[Any]:
    return patiently(lambda: list(api.list_lfs_files(repo_id)))


def _purged(api: Any, merged: Merged, plan: PurgePlan) -> Purged:
    repo_id, last = plan.repo_id, merged.last
    head = str(patiently(lambda: api.model_info(repo_id, revision="main")).sha)
    if head != plan.head:
        raise PushError(f"{repo_id}: somebody pushed meanwhile (main is at {head[:8]}); look again, then repeat.")
    message = f"Squash the history of the merge (step {last.step})"
    drop_states(api, repo_id, list(last.beside))
    for branch in plan.commits:
        patiently(partial(api.super_squash_history, repo_id, branch=branch, commit_message=message))
    for tag in plan.tags:
        patiently(partial(api.delete_tag, repo_id, tag=tag))
    if plan.files is not None:
        earlier = earlier_files(merged.entries)
        files = [file for file in _large_files(api, repo_id) if file.file_oid in earlier]
        # the branches are squashed already; rewriting would change their commits once more
        patiently(lambda: api.permanently_delete_lfs_files(repo_id, files, rewrite_history=False))
    after = _published(repo_id)
    if after.history != merged.history:
        raise VerificationError(
            f"{repo_id}: squashed, but its ledger changed meanwhile: somebody pushed. Look at its history."
        )
    name, commit = f"step-{last.step:04d}", str(after.snapshot.commit)
    other = tag_once(api, repo_id, name, commit, "", [last.file, *last.products])
    notes = [OUT_OF_REACH]
    if other is not None:
        notes.append(f"somebody gave the tag {name} to the commit {other[:12]} meanwhile; it was left as it is")
    if plan.files is None and _known(api, repo_id, plan.head):
        notes.append(
            f"the Hub still answers for the old commit {plan.head[:8]} to those who know its id; "
            f"{parameter('delete_files', True)} takes the weights of earlier steps out of its storage"
        )
    return Purged(plan, commit, tuple(notes))


def _known(api: Any, repo_id: str, commit: str) -> bool:
    try:
        with hub_errors(repo_id):
            patiently(lambda: api.model_info(repo_id, revision=commit))
    except NotFoundError:
        return False
    return True
