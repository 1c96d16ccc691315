"""A session: the processes of a run and how they use the machines, for as long as one job is carried out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hfmerge.checkpoint.digests import Digester
from hfmerge.checkpoint.streaming.session import Streamed
from hfmerge.engine.options import DEFAULT, NO_CONSENT, Consent, RunOptions
from hfmerge.engine.ranks import Ranks, processes
from hfmerge.engine.workspace import recover
from hfmerge.errors import HfMergeError, PushError
from hfmerge.hub.download import pin
from hfmerge.hub.reference import parse_ref
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.ledger.seen import refuse_rewritten
from hfmerge.lifecycle.publish import Pushed, push_folder
from hfmerge.lifecycle.push_target import Destination
from hfmerge.lifecycle.record import adopt_card
from hfmerge.recipe.keys import jsonable
from hfmerge.recipe.recipe import ModelEntry, Recipe, load_recipe, parse_recipe, recipe_data
from hfmerge.recipe.united import without_united


_T = TypeVar("_T")


@dataclass(frozen=True)
class MergeResult:
    """The result of a verb that makes a merge.

    Attributes:
        folder: the output folder; None if the result is only on the Hub.
        entry: the ledger entry that was written.
        warnings: warnings for the user.
        pushed: the push, or None if nothing was published.
        seconds: wall time in seconds: of the computation, and of the whole verb.
        processes: number of processes that took part.
        reused: number of chunks taken over from a killed run. With two passes a chunk counts twice.
        streamed: bytes and files that were streamed from the Hub; None if streaming was not asked for.
        repeated: the change was done already. `entry` is of the earlier run; this run only finished its clean-up.
    """

    folder: Path | None
    entry: Entry
    warnings: tuple[str, ...]
    pushed: Pushed | None
    seconds: Mapping[str, float]
    processes: int = 1
    reused: int = 0
    streamed: Streamed | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Session:
    """The processes and options that every step of a job needs.

    Attributes:
        ranks: the processes.
        options: how they use the machines.
        digester: hashes files beside other work.
    """

    ranks: Ranks
    options: RunOptions = DEFAULT
    digester: Digester | None = None

    def on_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0 and give its result to all ranks. An error is raised on all ranks."""
        return self.ranks.on_main(work)

    def each(self, work: Callable[[], _T]) -> _T:
        """Run `work` on every rank and give each its own result. An error on one rank is raised on all ranks."""
        return self.ranks.each(work)

    def tell(self, line: str) -> None:
        """Tell the user one line, on rank 0."""
        if self.options.notify is not None and self.ranks.main:
            self.options.notify(line)

    def open(self, merged: str, sources: Mapping[str, str]) -> Merged:
        """Open an existing merge, after finishing the rename of a killed run; compare the history with what the user
        saw.

        Raises:
            LedgerError: there is no ledger, it is broken, or it was rewritten since the user saw it.
        """
        self.on_main(partial(recover, merged))
        ref = self.pinned(merged)
        opened = self.each(lambda: open_merged(ref, sources, self.options.consent))
        # a history is remembered under the branch that the user named, not under the commit that this run pinned
        as_named = dataclasses.replace(opened.snapshot, ref=parse_ref(merged)[0])
        self.on_main(partial(refuse_rewritten, dataclasses.replace(opened, snapshot=as_named)))
        return opened

    def pinned(self, ref: str) -> str:
        """The reference pinned to a commit by rank 0, so that all processes read the same files."""
        return ref if self.ranks.world == 1 else self.on_main(partial(_pin_text, ref))

    def pinned_model(self, entry: ModelEntry) -> ModelEntry:
        """A model with its reference pinned."""
        return dataclasses.replace(entry, model=self.pinned(entry.model))

    def pinned_recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with all its references pinned."""
        models = tuple(map(self.pinned_model, recipe.models))
        return dataclasses.replace(recipe, base=self.pinned(recipe.base), models=models)


@contextlib.contextmanager
def session(options: RunOptions) -> Iterator[Session]:
    """The processes of this run, for as long as one verb works.

    Raises:
        HfMergeError: see `engine.ranks.processes`.
    """
    with processes() as ranks:
        yield Session(ranks, options)


def _pin_text(ref: str) -> str:
    try:
        places = [pin(place) for place in parse_ref(ref)]
    except HfMergeError:
        # planning meets the same fault and reports it together with all others
        return ref
    return "+".join(f"{p.name}@{p.commit}" if p.commit else p.ref.text for p in places)


AnyRecipe = Recipe | Mapping[str, Any] | str | Path
"""A recipe as a verb takes it: a `Recipe`, its keys as plain data, or the path of a YAML file."""


def given_recipe(recipe: AnyRecipe | None, consent: Consent = NO_CONSENT, **keys: Any) -> tuple[Recipe, str]:
    """The checked recipe of a verb, and its name in messages; its consents and `consent` both count.

    Args:
        recipe: None: `keys` are the whole recipe.
        keys: keys of a recipe, which count instead of the recipe's own; None: not given.

    Raises:
        RecipeError: all problems.
    """
    given = {name: value for name, value in keys.items() if value is not None}
    origin = "recipe"
    data: Any = recipe if recipe is not None else {}
    notes: tuple[str, ...] = ()
    if isinstance(data, str | Path):
        origin, data = str(data), load_recipe(data)
    elif given and isinstance(data, Mapping) and "merge_method" in data:
        data = parse_recipe(data, origin)
    if isinstance(data, Recipe):
        data, notes = recipe_data(data), data.notes
    if isinstance(data, Mapping):
        data = dict(data)
        without_united(data, given)
        data = {name: _plain(value) for name, value in {**data, **given}.items()}
    checked = parse_recipe(data, origin)
    loaded = dataclasses.replace(
        checked,
        notes=checked.notes or notes,
        trust_remote_code=checked.trust_remote_code or consent.trust_remote_code,
        allow_pickle=checked.allow_pickle or consent.allow_pickle,
    )
    return loaded, origin


def _plain(value: Any) -> Any:
    """A key's value as plain data; what cannot be is found by the check of the recipe."""
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else jsonable(value)


def push_written(folder: Path, to: Destination) -> Pushed:
    """Publish a folder that is complete already. If the push fails, the folder stays as it is."""
    try:
        pushed = push_folder(folder, to)
    except HfMergeError as error:
        raise PushError(
            f"{error} The merge itself is in {folder}; `hfmerge push {folder} {to.repo_id}` tries again."
        ) from error
    adopt_card(folder, to.repo_id)
    return pushed
