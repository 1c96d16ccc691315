"""Writes the files beside the weights: ledger entry, card, licences, carried states, people's own files."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.behaviour import SETTINGS, TEMPLATES, is_in_settings
from hfmerge.checkpoint.digests import folder_digest
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.side_files import is_asset
from hfmerge.checkpoint.streaming.session import streamed_name
from hfmerge.engine.environment import differences
from hfmerge.engine.executor import Outcome
from hfmerge.engine.named_base import name_of_base
from hfmerge.engine.plan import Plan
from hfmerge.engine.run_files import STATE_FOLDER
from hfmerge.errors import HfMergeError, LedgerError, OutputError
from hfmerge.evaluation.plots.embedding import FIGURES, drawn, embed_learning
from hfmerge.hub.download import fetch, pin
from hfmerge.hub.reference import ModelRef
from hfmerge.ledger.card import (
    FILE,
    card_facts,
    card_pointer,
    combine_cards,
    licence_note,
    parse_card,
    present_site,
    render_card,
)
from hfmerge.ledger.card_sections import RESULTS_PREFIX, with_part, without_scores
from hfmerge.ledger.entry import Entry, Material, MethodUsed, RunScalars, same_prefix, settings_of
from hfmerge.ledger.learned import LearnedWeights
from hfmerge.ledger.repository import Merged, ledger_in, parts_of, state_path
from hfmerge.lifecycle.changes import Change
from hfmerge.recipe.weights import Weight
from hfmerge.validation.folders import SPECIAL, TOOLS
from hfmerge.validation.limits import CARD_BYTES
from hfmerge.validation.strict_json import read_limited
from hfmerge.validation.values import plain_text
from hfmerge.validation.wording import parameter


def record_result(
    change: Change,
    folder: Path,
    outcome: Outcome,
    opened: Merged | None,
    existing: str | None,
    *,
    gap: Mapping[str, float] | None = None,
    copies: Sequence[str | None] = (),
    learned: LearnedWeights | None = None,
) -> tuple[Entry, tuple[str, ...]]:
    """Check that the result loads, and write ledger, card and licences beside it.

    Args:
        folder: folder with the files that the run wrote.
        change: the change that was run.
        opened: the merge that was changed; None for a first merge.
        existing: card of `opened` (see `readable_card`).
        gap: more scalars for the entry.
        learned: the ledger's record of learned weights; None if weights were not learned.
        copies: SHA-256 of the kept copies of the base and the models; empty: no copies are kept.

    Returns:
        The new entry, and warnings.

    Raises:
        HfMergeError: transformers would miss tensors of the result, or find unexpected ones.
    """
    _check_loads(change.plan, folder)
    notes: list[str] = []
    entry = entry_of(change, outcome, opened, notes, gap or {})
    entry = _carry_states_over(entry, opened, folder, notes, only_last=change.plan.method.additive)
    if copies:
        base, *models = (
            dataclasses.replace(one, kept=kept) for one, kept in zip((entry.base, *entry.models), copies, strict=True)
        )
        entry = dataclasses.replace(entry, base=base, models=tuple(models))
    entry = dataclasses.replace(entry, learned=learned)
    write_record(folder, entry, opened, existing)
    undrawn = embed_learning(folder, entry)
    return entry, (*notes, *([undrawn] if undrawn else ()))


def write_record(folder: Path, entry: Entry, opened: Merged | None, existing: str | None) -> None:
    """Write the ledger with a new entry, and the card and the list of licences that follow from it."""
    history = dict(opened.history) if opened else {}
    Entry.from_bytes(entry.to_bytes(), entry.file)  # an entry that the strict reader would refuse is never written
    history[entry.file] = entry.to_bytes()
    for name, data in history.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    entries = (*(opened.entries if opened else ()), entry)
    repo_id = card_pointer(existing).get("repo") if existing is not None else None
    card = render_card(entries, card_facts(entry, repo_id, present_site()))
    # pictures and scores are about the models that were merged before
    former = None if existing is None else without_scores(with_part(existing, FIGURES, None))
    (folder / FILE).write_text(combine_cards(former, card), encoding="utf-8")
    note = licence_note([entry.base, *entry.models])
    if note is not None:
        (folder / "LICENSE.md").write_text(note, encoding="utf-8")


def readable_card(opened: Merged) -> str | None:
    """The card of an existing merge, which may hold text of people. It is read before any work, to find faults
    early."""
    data = opened.read(FILE)
    if data is None:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LedgerError(f"{opened.snapshot.label}: {FILE} is not UTF-8; save it as UTF-8.") from error
    parse_card(text)
    return text


def _check_loads(planned: Plan, folder: Path) -> None:
    """Check that transformers loads the result without missing or unexpected keys, except those of the base itself."""
    from hfmerge.checkpoint.layout.load_check import load_back

    missing, unexpected = load_back(folder, trust_remote_code=planned.recipe.trust_remote_code)
    missing = tuple(key for key in missing if key not in planned.base_layout.missing)
    known = set(planned.base_layout.unexpected)
    unexpected = tuple(key for key in unexpected if key not in known)
    if missing or unexpected:
        what = f"lacks the tensor {missing[0]}" if missing else f"has the unexpected tensor {unexpected[0]}"
        raise HfMergeError(
            f"the merged {planned.base_layout.architecture} {what} when transformers loads it; nothing was written."
        )


def other_arithmetic(planned: Plan, opened: Merged | None, here: Mapping[str, Any]) -> list[str]:
    """Differences between the arithmetic of the kept state that a run starts from, and that of the run; "" if none.

    Args:
        opened: the merge that keeps the state.
        here: environment of the run.
    """
    # other methods' sums have the same bits everywhere
    if planned.prior is None or opened is None or planned.method.needs != "matrix":
        return []
    state = planned.prior.path.name
    made = next((e for e in opened.entries if any(Path(kept.file).name == state for kept in e.states)), opened.last)
    return differences(made.environment, here)


def entry_of(
    change: Change, outcome: Outcome, opened: Merged | None, notes: list[str], gap: Mapping[str, float]
) -> Entry:
    """The ledger entry of a run, without states of earlier steps, kept copies, and the record of learning.

    Args:
        change, opened: see `record_result`.
        notes: list to which warnings are added.
        gap: more scalars.
    """
    previous = opened.last if opened else None
    planned, kept = change.plan, change.kept
    start, recipe = planned.start, planned.recipe
    heads = {model: head for model, head in planned.heads}
    doubtful = {file.name for file in outcome.streamed.unverified} if outcome.streamed is not None else set()
    models = []
    for i, delta in enumerate(planned.deltas):
        files = outcome.source_digests[i + 1]
        if i < start and files is None:
            # the number in a head's name follows from all models
            head_folder = f"heads/{heads[i].slug}" if i in heads else kept[i].head
            models.append(
                dataclasses.replace(
                    kept[i], head=head_folder, untied=i in planned.untied, differing=planned.differing[i]
                )
            )
            continue
        assert files is not None
        weight, norm = recipe.models[i].weight, outcome.squared_norms[i]
        material = _material(delta.source, files, weight, norm, doubtful, notes)
        head = heads.get(i)
        fields: dict[str, Any] = {"head": f"heads/{head.slug}", "labels": tuple(head.labels)} if head else {}
        if recipe.models[i].alias is not None:
            fields["alias"] = recipe.models[i].alias
        if i in planned.subtracted:
            fields["subtracted"] = True
        if i in planned.untied:
            fields["untied"] = True
        if planned.differing[i]:
            fields["differing"] = list(planned.differing[i])
        models.append(Material.from_dict({**material.to_dict(), **fields}))
    base = _material(planned.base, outcome.source_digests[0] or {}, 1.0, None, doubtful, notes)
    method = planned.method
    mixed = other_arithmetic(planned, opened, outcome.environment)
    card = {**_card_settings(planned.base), "architecture": planned.base_layout.architecture}
    settings = settings_of(recipe, card | _template_elsewhere(planned, outcome.products))
    return Entry(
        step=previous.step + 1 if previous else 1,
        parent=previous.digest if previous else None,
        action=change.action,
        subjects=change.subjects,
        how=change.how,
        base=base,
        models=tuple(models),
        # options in the order in which the ledger's file gives them back
        method=MethodUsed(method.name, method.version, dict(sorted(recipe.method.options.items())), planned.norm),
        settings=settings,
        scalars=RunScalars(outcome.scale, outcome.merged_norm, outcome.deviation, **method.scalars(), **gap),
        states=outcome.states,
        products=outcome.products,
        environment={**outcome.environment, **({"fingerprint": None} if mixed else {})},
    )


def _material(
    source: Model,
    files: Mapping[str, str],
    weight: Weight,
    squared_norm: float | None,
    doubtful: Collection[str],
    notes: list[str],
) -> Material:
    """The ledger's record of one source; `doubtful` names streamed files whose digests were not checked."""
    commit = source.snapshot.commit
    under = source.beneath
    beneath = None
    if under is not None:
        own = {name[1:]: value for name, value in files.items() if name.startswith("+")}
        beneath = f"{under.name}@{under.snapshot.commit or 'sha256:' + folder_digest(own)}"
    digest = None if commit else folder_digest({k: v for k, v in files.items() if not k.startswith("+")})
    unchecked = [file for file in source.streams if streamed_name(source.snapshot, file) in doubtful]
    if under is not None:
        unchecked += [f"+{file}" for file in under.streams if streamed_name(under.snapshot, file) in doubtful]
    ledger, parts = parts_of(source.snapshot, notes)
    if under is not None:
        parts = tuple(dict.fromkeys((*parts, *parts_of(under.snapshot, notes)[1])))
    return Material(
        source.name, commit, digest, source.kind, weight, dict(files), beneath, squared_norm,
        license=_license(source), unverified=tuple(sorted(unchecked)), ledger=ledger, contains=parts,
        trained_on=name_of_base(source.adapter) if source.adapter else None,
    )  # fmt: skip


def _front_matter(source: Model) -> dict[str, Any]:
    if FILE not in source.snapshot.files:
        return {}
    try:
        text = read_limited(fetch(source.snapshot, FILE), CARD_BYTES).decode("utf-8", errors="replace")
        return parse_card(text)[0]
    except (LedgerError, ValueError):
        return {}  # an unreadable card of a source counts as empty; a missing licence gives a warning elsewhere


def _license(source: Model) -> str | None:
    return _said(_front_matter(source).get("license"))


def _said(value: Any) -> str | None:
    """The value of a key in a source's card, if it is a text that the ledger accepts."""
    try:
        return plain_text(value) or None
    except ValueError:
        return None


def _card_settings(base: Model) -> dict[str, Any]:
    front = _front_matter(base)
    library = "sentence-transformers" if "modules.json" in base.snapshot.files else "transformers"
    architectures = base.config.get("architectures") or [""]
    task = "text-generation" if str(architectures[0]).endswith("ForCausalLM") else None
    return {
        "library_name": _said(front.get("library_name")) or library,
        "pipeline_tag": _said(front.get("pipeline_tag")) or task,
    }


def _template_elsewhere(planned: Plan, products: Mapping[str, str]) -> dict[str, str]:
    """The file that holds the chat template, where the name of no file of the merge tells it."""
    at = planned.chosen.get("chat_template", planned.chosen.get("tokenizer", -1))
    source = planned.base if at < 0 else planned.deltas[at].source
    known = TEMPLATES[0] in products or SETTINGS not in products
    return {} if known or not is_in_settings(source.snapshot) else {"template_file": SETTINGS}


def _carry_states_over(
    entry: Entry, opened: Merged | None, folder: Path, notes: list[str], *, only_last: bool
) -> Entry:
    """Earlier kept states that still are the beginning of the merge stay, if the recipe keeps states of every step.

    Where it keeps the last one alone, an earlier one stays if this run could not keep its own.
    """
    setting = entry.settings["state"]
    if opened is None or setting == "none" or ((setting == "last" or only_last) and entry.states):
        return entry
    if opened.last.base.identity != entry.base.identity:
        return entry
    have = {state.count for state in entry.states}
    states = list(entry.states)
    for state in opened.last.states:
        if state.count in have or not same_prefix(opened.last, entry.models, state.count):
            continue
        path = state_path(opened.snapshot, state, [])
        if path is not None:
            (folder / STATE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / state.file)
            states.append(state)
        else:
            notes.append(f"{state.file} (after model {state.count}) is missing or corrupt, and is no longer kept.")
    return dataclasses.replace(entry, states=tuple(sorted(states, key=lambda s: s.count)))


def local_sources(planned: Plan, entry: Entry, opened: Merged | None) -> dict[str, str]:
    """Identity of each folder that was merged -> where it lies on this machine."""
    places: dict[str, str] = {}
    known = dict(opened.refs) if opened else {}
    for material, source in zip(
        (entry.base, *entry.models), (planned.base, *(d.source for d in planned.deltas)), strict=True
    ):
        for place, identity in ((source, material.identity), (source.beneath, material.beneath)):
            if place is not None and place.snapshot.commit is None and identity is not None:
                places[identity] = known.get(identity, str(place.snapshot.folder))
    return places


def adopt_card(folder: Path, repo_id: str) -> None:
    """After a push the folder's card names its repository too."""
    entries, _ = ledger_in(pin(ModelRef(str(folder), None, None, folder)))
    path = folder / FILE
    text = combine_cards(
        path.read_text(encoding="utf-8"), render_card(entries, card_facts(entries[-1], repo_id, present_site()))
    )
    path.write_text(text, encoding="utf-8")


def keep_foreign_files(opened: Merged, folder: Path) -> None:
    """Copy the files of people, such as notes or `.git`, into the folder that replaces a merge's folder.

    Links stay links, so that nothing is read through them.
    """
    here = opened.snapshot.folder
    assert here is not None
    for name in _foreign(opened):
        target = folder / name
        if is_asset(name) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here / name, target, follow_symlinks=False)
    tools = [name for name in TOOLS if os.path.lexists(here / name)]
    for name in sorted({*tools} - {*_no_files(str(here), tools)}):
        (folder / name).parent.mkdir(exist_ok=True)
        if (here / name).is_dir() and not (here / name).is_symlink():
            shutil.copytree(here / name, folder / name, symlinks=True, ignore=_no_files)
        else:
            shutil.copy2(here / name, folder / name, follow_symlinks=False)


def refuse_unknown_files(opened: Merged) -> None:
    """Refuse a folder that will be replaced, if it holds files that would be lost or copied without notice.

    Raises:
        OutputError: there is such a file; names the first one.
    """
    for name in _foreign(opened):
        if not is_asset(name):
            raise OutputError(
                f"{opened.snapshot.label}: holds {name}, which the ledger does not know and this change would lose; "
                f"move it out of the folder, or name another {parameter('output')}."
            )


def _foreign(opened: Merged) -> Iterator[str]:
    """Files in a merge's folder that hfmerge did not put there."""
    own = {name for entry in opened.entries for name in (entry.file, *entry.products)} | {FILE, "LICENSE.md"}
    own |= {*drawn(readable_card(opened))}
    for name in opened.snapshot.files:
        if name not in own and not name.startswith((f"{STATE_FOLDER}/", RESULTS_PREFIX)):
            yield name


def _no_files(folder: str, names: list[str]) -> list[str]:
    """Pipes, sockets and devices, which are not copied."""
    kinds = {name: os.lstat(os.path.join(folder, name)).st_mode for name in names}
    return [name for name, mode in kinds.items() if stat.S_IFMT(mode) in SPECIAL]
