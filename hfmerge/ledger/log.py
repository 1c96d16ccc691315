"""The steps of a merge as a list and as a tree: action, models, authors and date of each step.

The ledger holds no dates and no names of people. On the Hub the commits hold them. The tree is a chain of steps. Each
step shows the models that joined and left. A model that is itself a merge is a branch:

o  org/base@0f3c9a12
|
*  1 merge  5be1a09c77d2  opcm alpha=0.5  norm 1.07
|    + org/a@1b2c3d4e  0.53
| o  + org/inner@77aa01bc  0.61, itself a merge, ledger 90dd1c2e3f4a, of
|/     org/x@11112222
|      org/y@33334444
*  2 unmerge  8c1d2e3f4a5b  opcm alpha=0.5  norm 0.98
|    - org/a@1b2c3d4e
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from hfmerge.errors import OfflineError
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.reference import Snapshot
from hfmerge.ledger.diff import compare
from hfmerge.ledger.entry import LEDGER_FOLDER, Entry, Material, short
from hfmerge.ledger.repository import Merged
from hfmerge.recipe.weights import shown


@dataclass(frozen=True)
class _Commit:
    """The commit on the Hub that brought a ledger entry: its id, its authors, and when it was made."""

    oid: str
    authors: tuple[str, ...]
    date: datetime


@dataclass(frozen=True)
class Step:
    """One entry of a ledger and what is known about it.

    Attributes:
        entry: the ledger entry.
        digest: SHA-256 of its file.
        commit: the commit that added the file; None for a folder, and if the Hub cannot be asked.
    """

    entry: Entry
    digest: str
    commit: _Commit | None

    @property
    def norms(self) -> dict[str, float]:
        """Label of a model -> Frobenius norm of its task vector, over all merged parameters."""
        return {model.label: (model.squared_norm or 0.0) ** 0.5 for model in self.entry.models}

    @property
    def merged_norm(self) -> float:
        """Frobenius norm of the merged task vector."""
        return float(self.entry.scalars.merged_norm)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary; the entry itself is the ledger's file."""
        entry, commit = self.entry, self.commit
        return {
            "step": entry.step,
            "action": entry.action,
            "models": list(entry.subjects),
            "how": entry.how,
            "restored": entry.restored,
            "method": {"name": entry.method.name, **entry.method.options, "norm": entry.method.norm},
            "norms": self.norms,
            "merged_norm": self.merged_norm,
            "digest": self.digest,
            "commit": commit and commit.oid,
            "who": list(commit.authors) if commit else [],
            "when": commit and commit.date.isoformat(),
        }


def steps_of(merged: Merged) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """All steps, oldest first, and warnings on what could not be found out.

    Raises:
        SourceError: the Hub refuses to list the repository's commits.
    """
    notes: list[str] = []
    commits: Mapping[str, _Commit] = {}
    if merged.snapshot.folder is None:
        try:
            if merged.snapshot.offline or merged.snapshot.vanished:
                raise OfflineError(f"{merged.snapshot.label}: the Hub cannot be asked")
            commits = _commits(merged)
        except OfflineError as error:
            notes.append(f"authors and dates are not known ({str(error).rstrip('.')}).")
    entries = merged.entries
    steps = tuple(Step(entry, entry.digest, commits.get(entry.file)) for entry in entries)
    return steps, tuple(notes)


def _commits(merged: Merged) -> dict[str, _Commit]:
    """Ledger file -> the commit that brought it: the only one that ever touched it, since no entry is ever changed."""
    api, name, revision = hub_api(), merged.snapshot.repo_id, merged.snapshot.commit
    below = merged.snapshot.path(LEDGER_FOLDER)
    with hub_errors(merged.snapshot.label):
        tree = patiently(lambda: list(api.list_repo_tree(name, below, revision=revision, expand=True)))
        history = patiently(lambda: list(api.list_repo_commits(name, revision=revision)))
    known = {str(commit.commit_id): commit for commit in history}
    found = {}
    for item in tree:
        oid = str(item.last_commit.oid) if getattr(item, "last_commit", None) else None
        if oid in known:
            commit = known[oid]
            file = f"{LEDGER_FOLDER}/{PurePosixPath(item.path).name}"
            found[file] = _Commit(oid, tuple(str(author) for author in commit.authors), commit.created_at)
    return found


def commit_of(snapshot: Snapshot, file: str) -> str:
    """The commit that brought a ledger entry.

    Args:
        snapshot: the repository.
        file: the entry's path.

    Raises:
        SourceError: the Hub cannot be asked.
    """
    api = hub_api()
    with hub_errors(snapshot.label):
        infos = patiently(
            lambda: api.get_paths_info(snapshot.repo_id, [snapshot.path(file)], revision=snapshot.commit, expand=True)
        )
    return str(infos[0].last_commit.oid)


def tree(steps: Sequence[Step]) -> list[str]:
    """The lines of the tree, oldest step first."""
    lines = [f"o  {steps[0].entry.base.label}", *_parts(steps[0].entry.base)]
    before: Entry | None = None
    for step in steps:
        lines += ["|", f"*  {title(step)}"]
        if step.entry.restored is not None:
            lines.append(f"|    = step {step.entry.restored}")
        lines += _changes(before, step.entry)
        lines.append(f"|    ({step.entry.how})")
        before = step.entry
    return lines


def title(step: Step) -> str:
    """Number, action, digest, method, norm, and who and when where that is known, of one step."""
    words = [f"{step.entry.step} {step.entry.action}", step.digest[:12], method_line(step.entry)]
    words.append(f"norm {step.merged_norm:.4g}")
    if step.commit is not None:
        words += [", ".join(step.commit.authors), f"{step.commit.date:%Y-%m-%d %H:%M}"]
    return "  ".join(words)


def method_line(entry: Entry) -> str:
    """A method with its options, in one line."""
    options = " ".join(f"{name}={value}" for name, value in entry.method.options.items())
    rescaled = "" if entry.method.norm == "none" else f"norm={entry.method.norm}"
    return " ".join(part for part in (entry.method.name, options, rescaled) if part)


def _changes(before: Entry | None, after: Entry) -> Iterator[str]:
    if before is None:
        for model in after.models:
            yield from _model("+", model)
        return
    change = compare(before, after)
    if change.base is not None:
        yield f"|    base {change.base[0].label} -> {change.base[1].label}"
        yield from _parts(change.base[1])
    for model in change.removed:
        yield from _model("-", model)
    for old, new in change.replaced:
        yield from _model("-", old)
        yield from _model("+", new)
    for model in change.added:
        yield from _model("+", model)
    for model in change.subtracted:
        yield f"|    ~ {model.label}  approximately subtracted, still in the state"
    for model, weight in change.weights:
        yield f"|    ~ {model.label}  weight {shown(weight)} -> {shown(model.weight)}"
    if change.order is not None:
        yield f"|    order {', '.join(model.label for model in after.models)}"
    for name, (old, new) in change.method.items():
        yield f"|    {name} {old} -> {new}"


def _model(sign: str, model: Material) -> Iterator[str]:
    weight = "" if model.weight == 1.0 else f", weight {shown(model.weight)}"
    text = f"{sign} {model.label}  {(model.squared_norm or 0.0) ** 0.5:.4g}{weight}"
    if model.ledger is None or sign == "-":
        yield f"|    {text}"
        return
    yield f"| o  {text}, itself a merge, ledger {model.ledger[:12]}, of"
    for at, identity in enumerate(model.contains):
        yield f"|{'/ ' if at == 0 else '  '}    {short(identity)}"


def _parts(base: Material) -> Iterator[str]:
    """The models of a base that is itself a merge."""
    if base.ledger is not None:
        yield f"|\\   itself a merge, ledger {base.ledger[:12]}, of"
        yield from (f"| o  {short(identity)}" for identity in base.contains)
