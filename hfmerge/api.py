"""The public verbs. Each wires the parts together and returns a small result; none of them prints."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hfmerge.card import restrictive
from hfmerge.changes import Change, plan_add, plan_unmerge
from hfmerge.errors import HfMergeError, OutputError, PushError, RecipeError, VerificationError
from hfmerge.execute import run
from hfmerge.hub import Pushed, push_folder
from hfmerge.ledger import Entry
from hfmerge.merged import Merged, open_merged
from hfmerge.planning import Plan, make_plan
from hfmerge.recipe import ModelEntry, Recipe, load_recipe
from hfmerge.recording import adopt_card, keep_foreign_files, readable_card, record
from hfmerge.runtime import Ranks, current_ranks
from hfmerge.source import Digester, parse_ref, pin
from hfmerge.verifying import Report, verify_merge
from hfmerge.workspace import full_disk, recover, workspace


@dataclass(frozen=True)
class MergeResult:
    """What a verb made.

    Attributes:
        folder: the output, None when it only went to the Hub.
        entry: the ledger entry written.
        warnings: what the user should know.
        pushed: where it was published, or None.
        seconds: wall time of the computation and of everything.
    """

    folder: Path | None
    entry: Entry
    warnings: tuple[str, ...]
    pushed: Pushed | None
    seconds: Mapping[str, float]


def plan(recipe: Recipe | str | Path) -> Plan:
    """What a merge would do, from headers alone; downloads no weights.

    Raises:
        RecipeError: every problem of the recipe and its models at once.
    """
    asked, origin = _recipe(recipe)
    return make_plan(asked, origin=origin)


def merge(
    recipe: Recipe | str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> MergeResult:
    """Merge the models of a recipe into a new folder, with ledger and card, and publish it if asked.

    Args:
        recipe: a `Recipe` or the path of a YAML file.
        output, push_to, private: instead of the recipe's.
        create_pr: publish as a pull request.

    Raises:
        HfMergeError: see `hfmerge.errors`; nothing half-written remains.
    """
    asked, origin = _recipe(recipe)
    target, repo_id = output or asked.output, push_to or asked.push_to
    if target is None and repo_id is None:
        raise OutputError(f"{origin}: says neither `output` nor `push_to`; name a folder or a repository.")
    start = time.monotonic()
    ranks = current_ranks()
    push_to_hub = partial(push_folder, repo_id=str(repo_id), private=_private(asked, private), create_pr=create_pr)
    with Digester() as digester:
        # one process hashes what is here while it plans; several share the hashing later
        early = digester.start if ranks.world == 1 else None
        pinned = _pinned_recipe(asked, ranks)
        planned = ranks.each(partial(make_plan, pinned, origin=origin, on_source=early))
        with _folder(target, planned, ranks, replace=False) as folder:
            entry, seconds, _ = _build(planned, folder, ranks, None, None, digester)
            pushed = ranks.on_main(partial(push_to_hub, folder)) if target is None else None
    if target is not None and repo_id is not None:
        pushed = ranks.on_main(partial(_push_written, Path(target), repo_id, push_to_hub))
    return _result(target, entry, planned, pushed, start, seconds)


def add(
    merged: str | Path,
    models: Sequence[str | ModelEntry],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    sources: Mapping[str, str] | None = None,
) -> MergeResult:
    """Merge further models into an existing merge, continuing from its carried state.

    Args:
        merged: `org/name[@revision]` or a folder.
        models: references, or entries with a weight.
        output: a new folder; without it a folder is replaced in one rename, and a Hub ID needs `push_to`.
        push_to: repository; pushing to the merge's own guards against a concurrent push.
        sources: name of a model that was merged from a folder -> where that lies now.

    Raises:
        HfMergeError: see `hfmerge.errors`; the existing merge stays as it was.
    """
    ranks = current_ranks()
    ranks.on_main(partial(recover, merged))
    opened = open_merged(_pinned_ref(str(merged), ranks), sources)
    given = [m if isinstance(m, ModelEntry) else ModelEntry(m) for m in models]
    entries = [ModelEntry(_pinned_ref(entry.model, ranks), entry.weight) for entry in given]
    return _change(opened, lambda: plan_add(opened, entries), ranks, output, push_to, create_pr)


def unmerge(
    merged: str | Path,
    remove: str | Sequence[str],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    sources: Mapping[str, str] | None = None,
) -> MergeResult:
    """Take models out: the result has the bytes of the merge that never saw them.

    Args:
        merged, output, push_to, create_pr, sources: as for `add`.
        remove: names as the ledger lists them.

    Raises:
        LedgerError: not in the merge, or nothing would be left. HfMergeError: see `hfmerge.errors`.
    """
    ranks = current_ranks()
    ranks.on_main(partial(recover, merged))
    opened = open_merged(_pinned_ref(str(merged), ranks), sources)
    names = [remove] if isinstance(remove, str) else list(remove)
    return _change(opened, lambda: plan_unmerge(opened, names), ranks, output, push_to, create_pr)


def verify(merged: str | Path, *, replay: bool = False, sources: Mapping[str, str] | None = None) -> Report:
    """Check ledger, files and card of a merge; with `replay`, merge again and compare bytes. See `Report.ok`."""
    return verify_merge(str(merged), replay=replay, sources=sources)


def push(
    folder: str | Path, repo_id: str, *, private: bool | None = None, create_pr: bool = False, check: bool = True
) -> Pushed:
    """Publish a merge folder.

    Args:
        check: verify the folder first, so that nothing is published that its ledger does not describe.

    Raises:
        VerificationError: the folder is not what its ledger says. PushError: see `hub.push_folder`.
    """
    if check:
        report = verify_merge(str(folder))
        if not report.ok:
            raise VerificationError(f"{folder}: not pushed; {report.culprits[0]}")
    pushed = push_folder(Path(folder), repo_id, private=private, create_pr=create_pr)
    adopt_card(Path(folder), repo_id)
    return pushed


def _recipe(recipe: Recipe | str | Path) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, "recipe"
    return load_recipe(recipe), str(recipe)


def _private(recipe: Recipe, private: bool | None) -> bool | None:
    return recipe.private if private is None else private


def _pinned_ref(ref: str, ranks: Ranks) -> str:
    """The reference as rank 0 sees it now, pinned to a commit, so that all processes read the same thing."""
    if ranks.world == 1:
        return ref
    return ranks.on_main(lambda: _pin_text(ref))


def _pin_text(ref: str) -> str:
    try:
        places = [pin(place) for place in parse_ref(ref)]
    except HfMergeError:
        # planning meets the same fault and reports it together with all others
        return ref
    return "+".join(f"{p.name}@{p.commit}" if p.commit else p.place.text for p in places)


def _pinned_recipe(recipe: Recipe, ranks: Ranks) -> Recipe:
    models = tuple(ModelEntry(_pinned_ref(entry.model, ranks), entry.weight) for entry in recipe.models)
    return dataclasses.replace(recipe, base=_pinned_ref(recipe.base, ranks), models=models)


@contextlib.contextmanager
def _folder(target: str | Path | None, planned: Plan, ranks: Ranks, *, replace: bool) -> Iterator[Path]:
    """The folder to build in, held by rank 0: a workspace that becomes `target`, or a temporary one."""
    with contextlib.ExitStack() as stack:
        context = _temporary(planned) if target is None else None
        if target is not None:
            context = workspace(Path(target), needed=planned.estimate.disk, replace=replace)
        assert context is not None
        yield ranks.on_main(partial(stack.enter_context, context))
        ranks.on_main(stack.close)


@contextlib.contextmanager
def _temporary(planned: Plan) -> Iterator[Path]:
    """A folder for a result that only goes to the Hub."""
    with tempfile.TemporaryDirectory(prefix="hfmerge-") as name:
        free = shutil.disk_usage(name).free
        if free < planned.estimate.disk:
            raise OutputError(
                f"{name}: {planned.estimate.disk / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; set TMPDIR."
            )
        with full_disk(Path(name)):
            yield Path(name)


def _change(
    opened: Merged,
    make: Callable[[], Change],
    ranks: Ranks,
    output: str | Path | None,
    push_to: str | None,
    create_pr: bool,
) -> MergeResult:
    target: str | Path | None = output
    if target is None and opened.pinned.folder is not None:
        target = opened.pinned.folder
    if target is None and push_to is None:
        name = opened.pinned.name
        raise PushError(f"{name}: lies on the Hub; say where the result goes: --push-to {name}, or --output FOLDER.")
    start = time.monotonic()
    change = ranks.each(make)
    replace = (
        opened.pinned.folder is not None and target is not None and Path(target).resolve() == opened.pinned.folder
    )
    own = push_to is not None and push_to.lower() == opened.pinned.name.lower()
    parent = opened.pinned.commit if own else None
    push_to_hub = partial(push_folder, repo_id=str(push_to), create_pr=create_pr, parent_commit=parent)
    with _folder(target, change.plan, ranks, replace=replace) as folder:
        entry, seconds, notes = _build(change.plan, folder, ranks, opened, change)
        if replace:
            ranks.on_main(partial(keep_foreign_files, opened, folder))
        pushed = ranks.on_main(partial(push_to_hub, folder)) if target is None else None
    if target is not None and push_to is not None:
        pushed = ranks.on_main(partial(_push_written, Path(target), push_to, push_to_hub))
    return _result(target, entry, change.plan, pushed, start, seconds, notes)


def _result(
    target: str | Path | None,
    entry: Entry,
    planned: Plan,
    pushed: Pushed | None,
    start: float,
    seconds: float,
    notes: tuple[str, ...] = (),
) -> MergeResult:
    licences = restrictive([entry.base, *entry.models])
    times = {"merging": seconds, "total": time.monotonic() - start}
    folder = Path(target) if target is not None else None
    return MergeResult(folder, entry, (*planned.warnings, *notes, *licences), pushed, times)


def _build(
    planned: Plan,
    folder: Path,
    ranks: Ranks,
    opened: Merged | None,
    change: Change | None,
    digester: Digester | None = None,
) -> tuple[Entry, float, tuple[str, ...]]:
    """Run a plan into `folder` and add ledger and card; also seconds of the run, and warnings."""
    existing = readable_card(opened) if opened else None
    start = time.monotonic()
    outcome = run(planned, folder, ranks, digester)
    seconds = time.monotonic() - start
    entry, notes = ranks.on_main(partial(record, planned, folder, outcome, opened, change, existing))
    return entry, seconds, notes


def _push_written(folder: Path, repo_id: str, push_to_hub: Callable[[Path], Pushed]) -> Pushed:
    """Publish a folder that is complete already: a failure costs nothing but the push."""
    try:
        pushed = push_to_hub(folder)
    except HfMergeError as error:
        raise PushError(
            f"{error} The merge itself is in {folder}; `hfmerge push {folder} {repo_id}` tries again."
        ) from error
    adopt_card(folder, repo_id)
    return pushed


__all__ = ["MergeResult", "Pushed", "RecipeError", "Report", "add", "merge", "plan", "push", "unmerge", "verify"]
