"""Repeated changes: the command of a change that is done succeeds again, and finishes the clean-up of a killed run.

A change is done if the last step of the merge is the same action on the same models, and these models are in the merge
or out of it, as the command asks.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.digests import digests, folder_digest, with_beside
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.run_files import STATE_FOLDER
from hfmerge.engine.workspace import clear
from hfmerge.errors import HfMergeError, LedgerError
from hfmerge.hub.download import pin
from hfmerge.hub.reference import ModelRef, parse_ref
from hfmerge.ledger.entry import Material, contained
from hfmerge.ledger.repository import Merged
from hfmerge.lifecycle.admission import admit_change
from hfmerge.lifecycle.publish import finish_push
from hfmerge.lifecycle.push_target import Destination, require_writer
from hfmerge.lifecycle.session import MergeResult, Session, push_written
from hfmerge.recipe.recipe import ModelEntry
from hfmerge.recipe.weights import Weight


def in_place(opened: Merged, output: str | Path | None, to: Destination | None) -> bool:
    """Whether the result of a change replaces the merge that is changed."""
    folder = opened.snapshot.folder
    if folder is not None:
        return output is None or Path(output).resolve() == folder
    own = to is not None and not to.create_pr and to.repo_id.lower() == opened.snapshot.name.lower()
    return own and output is None and opened.snapshot.ref.revision in (None, "main")


def already_added(opened: Merged, models: Sequence[ModelEntry]) -> bool:
    """Whether the last step added these very models."""
    if not models or not _last_was(opened, "add"):
        return False
    before, last = opened.entries[-2].models, opened.last.models
    if len(last) != len(before) + len(models):
        return False
    new = zip(last[len(before) :], models, strict=True)
    return all(
        (held.weight, held.alias) == (new_model.weight, new_model.alias) and _is(opened, held, new_model.model)
        for held, new_model in new
    )


def already_replaced(opened: Merged, old: str, new: str, weight: Weight | None) -> bool:
    """Whether the last step put this very model in the place of that one."""
    if not _last_was(opened, "replace"):
        return False
    before = opened.entries[-2]
    try:
        at = before.find(old)
    except LedgerError:
        return False
    gone, came = before.models[at], opened.last.models[at]
    if came == gone or (came.identity != gone.identity and gone.identity in contained(opened.last)):
        return False
    return came.weight == (gone.weight if weight is None else weight) and _is(opened, came, new)


def already_restored(opened: Merged, step: int) -> bool:
    """Whether the last step went back to this one."""
    return opened.last.action == "restore" and opened.last.restored == step


def _last_was(opened: Merged, action: str) -> bool:
    return opened.last.action == action and len(opened.entries) > 1


def _is(opened: Merged, held: Material, ref: str) -> bool:
    """Whether a reference means a model that the merge holds, as it is now."""
    try:
        places = parse_ref(ref)
        names = [_identity(place, held if place is places[-1] else None) for place in places]
    except HfMergeError:
        return False  # planning the change reports what is wrong with the reference
    return names == [*([held.beneath] if held.beneath else []), held.identity]


def _identity(place: ModelRef, held: Material | None) -> str:
    snapshot = pin(place)
    if snapshot.commit is not None:
        return f"{snapshot.name}@{snapshot.commit}"
    source = with_beside(describe(place.text), () if held is None else held.files)
    return f"{snapshot.name}@sha256:{folder_digest(digests(source))}"


def finish(opened: Merged, to: Destination | None, ranks: Ranks) -> MergeResult:
    """Finish a change that is done, without computing: publish a folder, remove files of earlier steps.

    Raises:
        PushError, SourceError: the Hub refuses. OutputError: a file cannot be removed.
    """
    return ranks.on_main(lambda: _finish(opened, to, ranks))


def _finish(opened: Merged, to: Destination | None, ranks: Ranks) -> MergeResult:
    folder, last, pushed = opened.snapshot.folder, opened.last, None
    if folder is None:
        to = to or Destination(opened.snapshot.name)
        require_writer(opened.snapshot.name)
        pushed = finish_push(opened.snapshot, last, to)
    else:
        admit_change(opened, to, Session(Ranks()))()
        clear(folder)
        _drop_strays(folder, last.beside)
        pushed = push_written(folder, to) if to is not None else None
    seconds = {"merging": 0.0, "total": 0.0}
    return MergeResult(folder, last, (), pushed, seconds, ranks.world, repeated=True)


def _drop_strays(folder: Path, keep: Collection[str]) -> None:
    """Remove states and copies of sources that the last step does not list; a link goes, what it leads to stays."""
    root = folder / STATE_FOLDER
    if root.is_symlink():
        root.unlink()
        return
    for here, folders, files in os.walk(root):
        for path in (Path(here, name) for name in (*folders, *files)):
            if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in keep:
                path.unlink()
