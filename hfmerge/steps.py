"""The steps of a merge as people ask for them: what each did, with what norms, and who brought it when.

The ledger holds no clock and no names of people; on the Hub the commits do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hfmerge.errors import OfflineError
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.reference import Pinned
from hfmerge.ledger import FOLDER, Entry
from hfmerge.merged import Merged


@dataclass(frozen=True)
class Commit:
    """The commit on the Hub that brought a ledger entry: its id, its authors, and when it was made."""

    oid: str
    authors: tuple[str, ...]
    date: datetime


@dataclass(frozen=True)
class Step:
    """One entry of a ledger and what is known about it.

    Attributes:
        entry: it.
        digest: SHA-256 of its file.
        commit: that brought it; None for a folder, and where the Hub cannot be asked.
    """

    entry: Entry
    digest: str
    commit: Commit | None

    @property
    def norms(self) -> dict[str, float]:
        """Label of a model -> Frobenius norm of its task vector, over all merged parameters."""
        return {model.label: (model.squared_norm or 0.0) ** 0.5 for model in self.entry.models}

    @property
    def merged_norm(self) -> float:
        """Frobenius norm of the merged task vector."""
        return float(self.entry.scalars["merged_norm"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary; the entry itself is the ledger's file."""
        entry, commit = self.entry, self.commit
        return {
            "step": entry.step,
            "action": entry.action,
            "models": list(entry.subjects),
            "how": entry.how,
            "restored": entry.restored,
            "method": {"name": entry.method["name"], **entry.method["options"], "norm": entry.method["norm"]},
            "norms": self.norms,
            "merged_norm": self.merged_norm,
            "digest": self.digest,
            "commit": commit and commit.oid,
            "who": list(commit.authors) if commit else [],
            "when": commit and commit.date.isoformat(),
        }


def steps_of(merged: Merged) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """All steps, oldest first, and what could not be found out.

    Raises:
        SourceError: the Hub refuses to list the repository's commits.
    """
    notes: list[str] = []
    commits: Mapping[str, Commit] = {}
    if merged.pinned.folder is None:
        try:
            if merged.pinned.offline or merged.pinned.gone:
                raise OfflineError(f"{merged.pinned.label}: the Hub cannot be asked")
            commits = _commits(merged)
        except OfflineError as error:
            notes.append(f"who and when are not known ({str(error).rstrip('.')}).")
    entries = merged.entries
    steps = tuple(Step(entry, entry.digest, commits.get(entry.file)) for entry in entries)
    return steps, tuple(notes)


def _commits(merged: Merged) -> dict[str, Commit]:
    """Ledger file -> the commit that brought it: the only one that ever touched it, since no entry is ever changed."""
    api, name, revision = hub_api(), merged.pinned.name, merged.pinned.commit
    with hub_errors(merged.pinned.label):
        tree = patiently(lambda: list(api.list_repo_tree(name, FOLDER, revision=revision, expand=True)))
        history = patiently(lambda: list(api.list_repo_commits(name, revision=revision)))
    known = {str(commit.commit_id): commit for commit in history}
    found = {}
    for item in tree:
        oid = str(item.last_commit.oid) if getattr(item, "last_commit", None) else None
        if oid in known:
            commit = known[oid]
            found[str(item.path)] = Commit(oid, tuple(str(author) for author in commit.authors), commit.created_at)
    return found


def commit_of(pinned: Pinned, file: str) -> str:
    """The commit that brought a ledger entry.

    Args:
        pinned: the repository.
        file: the entry's path.

    Raises:
        SourceError: the Hub cannot be asked.
    """
    api = hub_api()
    with hub_errors(pinned.label):
        infos = patiently(lambda: api.get_paths_info(pinned.name, [file], revision=pinned.commit, expand=True))
    return str(infos[0].last_commit.oid)
