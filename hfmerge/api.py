"""The public verbs. Each wires the parts together and returns a small result; none of them prints."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.card import FILE, card_facts, card_pointer, combine_cards, licence_note, parse_card, render_card, restrictive
from hfmerge.changes import Change, plan_add, plan_unmerge
from hfmerge.digest import sha256_bytes
from hfmerge.errors import HfMergeError, LedgerError, OutputError, PushError, RecipeError, VerificationError
from hfmerge.execute import STATE_FOLDER, Outcome, run
from hfmerge.hub import Pushed, push_folder
from hfmerge.ledger import Entry, KeptState, Material
from hfmerge.merged import LOCAL_SOURCES, Merged, open_merged, state_path
from hfmerge.planning import Plan, make_plan
from hfmerge.recipe import ModelEntry, Recipe, load_recipe
from hfmerge.source import Source, fetch, folder_digest
from hfmerge.verifying import Report, verify_merge
from hfmerge.version import __version__
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
    planned = make_plan(asked, origin=origin)
    with _folder(target, planned, replace=False) as folder:
        entry, seconds, _ = _build(planned, folder, None, None)
        pushed = None
        if target is None:
            pushed = push_folder(folder, str(repo_id), private=_private(asked, private), create_pr=create_pr)
    if target is not None and repo_id is not None:
        pushed = _push_written(Path(target), repo_id, _private(asked, private), create_pr, None)
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
    recover(merged)
    opened = open_merged(str(merged), sources)
    entries = [m if isinstance(m, ModelEntry) else ModelEntry(m) for m in models]
    return _change(opened, lambda: plan_add(opened, entries), output, push_to, create_pr)


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
    recover(merged)
    opened = open_merged(str(merged), sources)
    names = [remove] if isinstance(remove, str) else list(remove)
    return _change(opened, lambda: plan_unmerge(opened, names), output, push_to, create_pr)


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
    _adopt_card(Path(folder), repo_id)
    return pushed


def _recipe(recipe: Recipe | str | Path) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, "recipe"
    return load_recipe(recipe), str(recipe)


def _private(recipe: Recipe, private: bool | None) -> bool | None:
    return recipe.private if private is None else private


@contextlib.contextmanager
def _folder(target: str | Path | None, planned: Plan, *, replace: bool) -> Iterator[Path]:
    """The folder to build in: a workspace that becomes `target`, or a temporary one when the result only goes to the Hub."""
    if target is not None:
        with workspace(Path(target), needed=planned.estimate.disk, replace=replace) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hfmerge-") as name:
        free = shutil.disk_usage(name).free
        if free < planned.estimate.disk:
            raise OutputError(
                f"{name}: {planned.estimate.disk / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; set TMPDIR."
            )
        with full_disk(Path(name)):
            yield Path(name)


def _change(opened: Merged, make: Any, output: str | Path | None, push_to: str | None, create_pr: bool) -> MergeResult:
    target: str | Path | None = output
    if target is None and opened.pinned.folder is not None:
        target = opened.pinned.folder
    if target is None and push_to is None:
        name = opened.pinned.name
        raise PushError(f"{name}: lies on the Hub; say where the result goes: --push-to {name}, or --output FOLDER.")
    start = time.monotonic()
    change: Change = make()
    replace = opened.pinned.folder is not None and target is not None and Path(target).resolve() == opened.pinned.folder
    own = push_to is not None and push_to.lower() == opened.pinned.name.lower()
    parent = opened.pinned.commit if own else None
    with _folder(target, change.plan, replace=replace) as folder:
        entry, seconds, notes = _build(change.plan, folder, opened, change)
        if replace:
            _keep_foreign_files(opened, folder)
        pushed = None
        if target is None:
            pushed = push_folder(folder, str(push_to), create_pr=create_pr, parent_commit=parent)
    if target is not None and push_to is not None:
        pushed = _push_written(Path(target), push_to, None, create_pr, parent)
    return _result(target, entry, change.plan, pushed, start, seconds, notes)


def _keep_foreign_files(opened: Merged, folder: Path) -> None:
    """What people put into a merge's folder, such as notes or `.git`, outlives the replacement of the folder."""
    assert opened.pinned.folder is not None
    former = {name for entry in opened.entries for name in entry.products}
    for name in opened.pinned.files:
        own = name in former or name in (FILE, "LICENSE.md") or name.startswith(f"{STATE_FOLDER}/")
        target = folder / name
        if not own and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(opened.pinned.folder / name, target)


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
    planned: Plan, folder: Path, opened: Merged | None, change: Change | None
) -> tuple[Entry, float, tuple[str, ...]]:
    """Run a plan into `folder`, check that it loads, and add ledger and card; also seconds of the run, and warnings."""
    existing = _card_of(opened) if opened else None
    start = time.monotonic()
    outcome = run(planned, folder)
    seconds = time.monotonic() - start
    _check_loads(planned, folder)
    entry = _entry(planned, outcome, opened, change)
    notes: list[str] = []
    entry = _carry_states_over(entry, opened, folder, notes)
    history = dict(opened.history) if opened else {}
    history[entry.file] = entry.to_bytes()
    for name, data in history.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    entries = (*(opened.entries if opened else ()), entry)
    repo_id = card_pointer(existing).get("repo") if existing is not None else None
    card = render_card(entries, card_facts(entry, repo_id))
    (folder / FILE).write_text(combine_cards(existing, card), encoding="utf-8")
    note = licence_note([entry.base, *entry.models])
    if note is not None:
        (folder / "LICENSE.md").write_text(note, encoding="utf-8")
    _note_local_sources(planned, entry, opened, folder)
    return entry, seconds, tuple(notes)


def _card_of(opened: Merged) -> str | None:
    """The card of an existing merge, which may hold text of people; checked to be readable before any work."""
    data = opened.read(FILE)
    if data is None:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LedgerError(f"{opened.pinned.label}: {FILE} is not UTF-8; save it as UTF-8.") from error
    parse_card(text)
    return text


def _check_loads(planned: Plan, folder: Path) -> None:
    """The rule: transformers loads the result with no key missing or unexpected that the base does not also have so."""
    from hfmerge.checkpoint.loadback import load_back

    missing, unexpected = load_back(folder, trust_remote_code=planned.recipe.trust_remote_code)
    missing = tuple(key for key in missing if key not in planned.base_layout.missing)
    known = set(planned.base_layout.unexpected)
    unexpected = tuple(key for key in unexpected if key not in known)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} too many"
        raise HfMergeError(
            f"the merged {planned.base_layout.architecture} {what} when transformers loads it; not written."
        )


def _entry(planned: Plan, outcome: Outcome, opened: Merged | None, change: Change | None) -> Entry:
    previous = opened.last if opened else None
    kept = change.kept if change else ()
    start = planned.prior.count if planned.prior else 0
    heads = {model: head for model, head in planned.heads}
    models = []
    for i, delta in enumerate(planned.deltas):
        files = outcome.source_digests[i + 1]
        if i < start and files is None:
            models.append(kept[i])
            continue
        assert files is not None
        material = _material(delta.source, files, planned.weights[i], outcome.squared_norms[i])
        head = heads.get(i)
        fields = {"head": f"heads/{head.slug}", "labels": tuple(head.labels)} if head else {}
        models.append(Material.from_dict({**material.to_dict(), **fields}))
    base = _material(planned.base, outcome.source_digests[0] or {}, 1.0, None)
    recipe, method = planned.recipe, planned.method
    settings = {
        "dtype": recipe.dtype,
        "include": list(recipe.include),
        "exclude": list(recipe.exclude),
        "vocabulary": recipe.vocabulary,
        "state": recipe.state,
        "allow_nonfinite": recipe.allow_nonfinite,
        "allow_pickle": recipe.allow_pickle,
        "trust_remote_code": recipe.trust_remote_code,
        "card": {**_card_settings(planned.base), "architecture": planned.base_layout.architecture},
    }
    return Entry(
        step=previous.step + 1 if previous else 1,
        parent=sha256_bytes(previous.to_bytes()) if previous else None,
        action=change.action if change else "merge",
        subjects=change.subjects if change else tuple(delta.source.name for delta in planned.deltas),
        how=change.how if change else f"merged {len(models)} models in order of arrival",
        base=base,
        models=tuple(models),
        method={
            "name": method.name,
            "version": method.version,
            "options": recipe.method.options,
            "norm": planned.norm,
        },
        settings=settings,
        scalars={"scale": outcome.scale, "merged_norm": outcome.merged_norm},
        states=tuple(KeptState(s.count, s.sha256, s.nbytes) for s in outcome.states),
        products=outcome.products,
        environment=_environment(),
    )


def _material(source: Source, files: Mapping[str, str], weight: float, squared_norm: float | None) -> Material:
    commit = source.pinned.commit
    under = source.beneath
    beneath = None
    if under is not None:
        own = {name[1:]: value for name, value in files.items() if name.startswith("+")}
        beneath = f"{under.name}@{under.pinned.commit or 'sha256:' + folder_digest(own)}"
    digest = None if commit else folder_digest({k: v for k, v in files.items() if not k.startswith("+")})
    return Material(
        source.name, commit, digest, source.kind, weight, dict(files), beneath, squared_norm, license=_license(source)
    )


def _front_matter(source: Source) -> dict[str, Any]:
    if FILE not in source.pinned.files:
        return {}
    try:
        return parse_card(fetch(source.pinned, FILE).read_text(encoding="utf-8", errors="replace"))[0]
    except LedgerError:
        return {}  # somebody else's card that nobody can read says nothing, and a missing licence is warned of


def _license(source: Source) -> str | None:
    value = _front_matter(source).get("license")
    return str(value) if isinstance(value, str) and value else None


def _card_settings(base: Source) -> dict[str, Any]:
    front = _front_matter(base)
    library = "sentence-transformers" if "modules.json" in base.pinned.files else "transformers"
    return {"library_name": front.get("library_name") or library, "pipeline_tag": front.get("pipeline_tag")}


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    return {
        "hfmerge": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "device": "cpu",
        "machine": platform.machine(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads_per_matrix": 1,
    }


def _carry_states_over(entry: Entry, opened: Merged | None, folder: Path, notes: list[str]) -> Entry:
    """Earlier kept states that still are the beginning of the merge stay, if the recipe keeps states of every step."""
    if opened is None or entry.settings["state"] in ("none", "last"):
        return entry
    import dataclasses

    from hfmerge.ledger import same_prefix

    have = {state.count for state in entry.states}
    states = list(entry.states)
    for state in opened.last.states:
        if state.count in have or not same_prefix(opened.last, entry.models, state.count):
            continue
        path = state_path(opened.pinned, state, [])
        if path is not None:
            (folder / STATE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / state.file)
            states.append(state)
        else:
            notes.append(f"{state.file} (after model {state.count}) is missing or corrupt, and is no longer kept.")
    return dataclasses.replace(entry, states=tuple(sorted(states, key=lambda s: s.count)))


def _note_local_sources(planned: Plan, entry: Entry, opened: Merged | None, folder: Path) -> None:
    """Remember, beside the state and never pushed, where folders that were merged lie on this machine."""
    places: dict[str, str] = {}
    known = dict(opened.refs) if opened else {}
    for material, source in zip(
        (entry.base, *entry.models), (planned.base, *(d.source for d in planned.deltas)), strict=True
    ):
        for place, identity in ((source, material.identity), (source.beneath, material.beneath)):
            if place is not None and place.pinned.folder is not None and identity is not None:
                places[identity] = known.get(identity, str(place.pinned.folder))
    if places:
        path = folder / LOCAL_SOURCES
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(places, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.chmod(path, 0o600)


def _push_written(
    folder: Path, repo_id: str, private: bool | None, create_pr: bool, parent_commit: str | None
) -> Pushed:
    """Publish a folder that is complete already: a failure costs nothing but the push."""
    try:
        pushed = push_folder(folder, repo_id, private=private, create_pr=create_pr, parent_commit=parent_commit)
    except HfMergeError as error:
        raise PushError(f"{error} The merge itself is in {folder}; `hfmerge push {folder} {repo_id}` tries again.") from error
    _adopt_card(folder, repo_id)
    return pushed


def _adopt_card(folder: Path, repo_id: str) -> None:
    """After a push the folder's card names its repository too."""
    from hfmerge.ledger import FOLDER, check_chain

    entries = check_chain(
        {f"{FOLDER}/{p.name}": p.read_bytes() for p in (folder / FOLDER).glob("*.json")}, str(folder)
    )
    path = folder / FILE
    text = combine_cards(path.read_text(encoding="utf-8"), render_card(entries, card_facts(entries[-1], repo_id)))
    path.write_text(text, encoding="utf-8")


__all__ = ["MergeResult", "Pushed", "RecipeError", "Report", "add", "merge", "plan", "push", "unmerge", "verify"]
