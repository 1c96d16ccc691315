"""The public verbs. Each wires the parts together and returns a small result; none of them prints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from hfmerge.certifying import Certificate, make_certificate, verify_certified
from hfmerge.changes import plan_add, plan_subtract, plan_unmerge
from hfmerge.digesting import Digester
from hfmerge.disks import for_machines
from hfmerge.errors import LedgerError, OutputError, RecipeError, VerificationError
from hfmerge.evaluation.checking import Behaviour, check_removal
from hfmerge.evaluation.results import Matrix
from hfmerge.evaluation.running import Settings, evaluate_suite
from hfmerge.evaluation.suite import Suite
from hfmerge.hub import Pushed, push_folder
from hfmerge.inspecting import Inspection, inspect_models
from hfmerge.ledger import recipe_of
from hfmerge.merged import open_merged
from hfmerge.nesting import find_removal, without_parts
from hfmerge.options import DEFAULT, RunOptions
from hfmerge.planned import Plan
from hfmerge.planning import make_plan
from hfmerge.publishing import Destination, publish, with_disks
from hfmerge.purging import Purged, PurgePlan, purge
from hfmerge.recipe import ModelEntry, Recipe, load_recipe
from hfmerge.recording import adopt_card
from hfmerge.revising import plan_without
from hfmerge.running import (
    MergeResult,
    apply_change,
    build,
    device_name,
    folder_for,
    opened_merge,
    pinned_recipe,
    pinned_ref,
    push_written,
    result_of,
    weights_found,
)
from hfmerge.runtime import processes
from hfmerge.verifying import Report, verify_merge


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
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Merge the models of a recipe into a new folder, with ledger and card, and publish it if asked.

    Args:
        recipe: a `Recipe` or the path of a YAML file.
        output, push_to, private: instead of the recipe's.
        create_pr: publish as a pull request.
        options: how the run uses the machine.

    Raises:
        HfMergeError: see `hfmerge.errors`; nothing half-written remains.
    """
    asked, origin = _recipe(recipe)
    target, repo_id = output or asked.output, push_to or asked.push_to
    if target is None and repo_id is None:
        raise OutputError(f"{origin}: says neither `output` nor `push_to`; name a folder or a repository.")
    start = time.monotonic()
    private = asked.private if private is None else private
    destination = Destination(repo_id, private, create_pr) if repo_id is not None else None
    with processes() as ranks, Digester() as digester:
        # one process hashes what is here while it plans; several share the hashing later
        early = digester.start if ranks.world == 1 else None
        ranks = with_disks(ranks, target, options.storage)
        pinned = pinned_recipe(asked, ranks)
        planned = ranks.each(partial(make_plan, pinned, origin=origin, on_source=early))
        device = device_name(planned, ranks, options)
        planned = for_machines(planned, ranks, device)
        with folder_for(target, planned, ranks, device, replace=False, resume=options.resume) as place:
            planned, learned = weights_found(planned, place, ranks, options)
            entry, seconds, notes, outcome = build(
                planned, place, ranks, None, None, digester, options, learned=learned
            )  # fmt: skip
            pushed = publish(planned, place.folder, ranks, destination) if target is None and destination else None
        if target is not None and destination is not None:
            pushed = ranks.on_main(partial(push_written, Path(target), destination))
        return result_of(target, entry, planned, pushed, start, seconds, notes, world=ranks.world, outcome=outcome)


def add(
    merged: str | Path,
    models: Sequence[str | ModelEntry],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Merge further models into an existing merge, continuing from its carried state.

    Args:
        merged: `org/name[@revision]` or a folder.
        models: references, or entries with a weight.
        output: a new folder; without it a folder is replaced in one rename, and a Hub ID needs `push_to`.
        push_to: repository; pushing to the merge's own guards against a concurrent push.
        sources: name of a model that was merged from a folder -> where that lies now.
        stream: see `Recipe.stream`.
        options: as for `merge`.

    Raises:
        HfMergeError: see `hfmerge.errors`; the existing merge stays as it was.
    """
    given = [m if isinstance(m, ModelEntry) else ModelEntry(m) for m in models]
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks)
        entries = [ModelEntry(pinned_ref(entry.model, ranks), entry.weight) for entry in given]
        make = partial(plan_add, opened, entries, stream=stream)
        return apply_change(opened, make, ranks, output, push_to, create_pr, options)


def unmerge(
    merged: str | Path,
    remove: str | Sequence[str],
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    inner_to: str | None = None,
    mode: Literal["exact", "subtract"] = "exact",
    measure: bool = False,
    options: RunOptions = DEFAULT,
) -> MergeResult:
    """Take models out: the result has the bytes of the merge that never saw them.

    Args:
        merged, output, push_to, create_pr, sources, stream, options: as for `add`.
        mode: "subtract" is for methods whose result depends on the order: opcm and mdm_oc_subspace, of which nothing
            but the models that leave is read, and mdm_oc. It is approximate and no removal: what later models were
            projected off stays, and so do the models in the state and in the ledger, which records the gap.
        measure: of a subtraction, also merge again without the models, to measure the gap.
        remove: names as the ledger lists them; also of models within a merge that was merged, which is then merged
            again without them and replaced.
        inner_to: `org/name` or `./folder` for such an inner merge; None: a folder beside the result.

    Raises:
        LedgerError: not in the merge, or nothing would be left. HfMergeError: see `hfmerge.errors`.
    """
    names = [remove] if isinstance(remove, str) else list(remove)
    if measure and mode == "exact":
        raise LedgerError("unmerge: there is no gap to measure unless models are subtracted (mode: subtract).")
    with processes() as ranks:
        opened = opened_merge(merged, sources, ranks)
        if mode == "subtract":
            make = partial(plan_subtract, opened, names, measure=measure, stream=stream)
            return apply_change(opened, make, ranks, output, push_to, create_pr, options)
        removal = find_removal(opened.last, names)
        if not removal.within:
            make = partial(plan_unmerge, opened, names, stream=stream)
            return apply_change(opened, make, ranks, output, push_to, create_pr, options)
    inner = partial(unmerge, stream=stream, options=dataclasses.replace(options, resume=None))
    folder = Path(output) if output is not None else opened.pinned.folder
    gone, parts = without_parts(opened, removal, inner, inner_to=inner_to, folder=folder)
    with processes() as ranks:
        make = partial(plan_without, opened, gone, parts, removal.subjects, stream=stream)
        return apply_change(opened, make, ranks, output, push_to, create_pr, options)


def unmerge_checked(
    merged: str | Path,
    remove: str | Sequence[str],
    suite: Suite | str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    sources: Mapping[str, str] | None = None,
    stream: bool = False,
    mode: Literal["exact", "subtract"] = "exact",
    measure: bool = False,
    settings: Settings | None = None,
    options: RunOptions = DEFAULT,
) -> tuple[MergeResult, Behaviour]:
    """`unmerge`, with a suite's scores before and after, beside the base and the merge that never saw the models.

    Args:
        suite: one of whose tasks says that its head is that of a removed model.
        settings: of the evaluation.
        merged, remove, output, push_to, create_pr, sources, stream, mode, measure, options: as for `unmerge`.

    Raises:
        HfMergeError: as `unmerge` and `evaluate`; or no task of the suite belongs to a removed model.
    """
    names = [remove] if isinstance(remove, str) else list(remove)
    if create_pr and output is None:
        raise OutputError("--check: a pull request cannot be scored; name an --output as well.")
    change = partial(
        unmerge, merged, names, output=output, push_to=push_to, create_pr=create_pr, sources=sources, stream=stream,
        mode=mode, measure=measure, options=options,
    )  # fmt: skip
    return check_removal(open_merged(str(merged), sources), names, suite, change, settings)


def verify(
    merged: str | Path,
    *,
    replay: bool = False,
    device: str | None = None,
    sources: Mapping[str, str] | None = None,
    certificate: str | Path | None = None,
    public_key: str | Path | None = None,
    allowed_signers: str | Path | None = None,
    allow_unsigned: bool = False,
) -> Report:
    """Check ledger, files and card of a merge; with `replay`, merge again and compare bytes. See `Report.ok`.

    Args:
        device: where a replay computes, as `RunOptions.device`.
        certificate: also check this certificate of removal, signed by one of the keys in `public_key` or
            `allowed_signers`, unless `allow_unsigned`.

    Raises:
        SourceError: the merge cannot be reached. CertificateError: certificate or keys cannot be read.
    """
    if certificate is None:
        return verify_merge(str(merged), replay=replay, device=device, sources=sources)
    return verify_certified(
        str(merged),
        certificate,
        public_key=public_key,
        signers=allowed_signers,
        unsigned=allow_unsigned,
        replay=replay,
        device=device,
        sources=sources,
    )


def certify(
    merged: str | Path,
    removed: str,
    *,
    key: str | Path | None = None,
    output: str | Path | None = None,
    days: float | None = None,
    replay: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Certificate:
    """Certify that a merge no longer holds a model: an in-toto statement in a DSSE envelope (see `certificate`).

    Args:
        removed: the model, as the ledger names it.
        key: ed25519 private key (OpenSSH or PEM); its passphrase is in `HFMERGE_KEY_PASSPHRASE`, or asked for.
        output: file for the certificate.
        days: validity; None: for ever.
        replay: merge the materials again first, and state that.
        sources: as for `add`.

    Raises:
        CertificateError: the model was never in the merge or still is, or the key cannot be used.
        VerificationError: the merge is not what its ledger says.
    """
    made = make_certificate(str(merged), removed, key=key, days=days, replay=replay, sources=sources)
    if output is not None:
        try:
            Path(output).write_bytes(made.envelope.to_bytes())
        except OSError as error:
            raise OutputError(f"{output}: cannot be written ({error.strerror}).") from error
    return made


def purge_history(
    repo_id: str, *, delete_files: bool = False, confirm: Callable[[PurgePlan], bool] | None = None
) -> Purged | None:
    """Squash a published merge's history, which still holds earlier weights, for good; None if `confirm` refuses.

    Args:
        delete_files: also delete the weights of earlier steps from the Hub's storage.
        confirm: shown what would be done, and what would be left, before anything changes.

    Raises:
        VerificationError: the merge is not what its ledger says. HfMergeError: see `hfmerge.errors`.
    """
    return purge(repo_id, delete_files=delete_files, confirm=confirm)


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


def inspect(
    models: Recipe | str | Path,
    *,
    matrices: Sequence[str] | None = None,
    spectral: bool = True,
    sources: Mapping[str, str] | None = None,
    options: RunOptions = DEFAULT,
) -> Inspection:
    """Compare models without merging them: similarity, norms, signs, spectra, predicted interference.

    Args:
        models: a `Recipe`, the path of a YAML file, or a merge by ID or folder, whose sources are then compared.
        matrices: fnmatch patterns of tensors to take apart; None: all.
        spectral: take matrices apart at all; without it only one pass over the elements is made.
        sources: as for `add`.
        options: `max_memory` and `notify` count.

    Raises:
        RecipeError: as for `plan`. HfMergeError: see `hfmerge.errors`.
    """
    with processes() as ranks:
        if not isinstance(models, Recipe) and not str(models).endswith((".yaml", ".yml")):
            ref = pinned_ref(str(models), ranks)
            opened = ranks.each(lambda: open_merged(ref, sources))
            asked, origin = recipe_of(opened.last, opened.refs), opened.pinned.label
        else:
            asked, origin = _recipe(models)
            asked = pinned_recipe(asked, ranks)
        return inspect_models(asked, origin=origin, matrices=matrices, spectral=spectral, options=options, ranks=ranks)


def evaluate(
    models: Sequence[str | Path],
    suite: Suite | str | Path,
    *,
    tasks: Sequence[str] | None = None,
    heads: Mapping[str, str] | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> Matrix:
    """Score models on the tasks of a suite: one matrix, with confidence intervals.

    Args:
        models: full models, adapters and merges, by ID or folder.
        suite: a `Suite`, the path of a YAML file, or the name of a ready suite.
        tasks: names; None: all of the suite.
        heads: task -> whose head is used, before what the suite says; "*" stands for all tasks.
        settings: limit, seed, batch size, device, cache (see `Settings`).
        progress: show a bar with the time left.

    Raises:
        RecipeError: all problems of the suite. HeadError: a model has no head for a task.
        SourceError: a model or data set cannot be reached or read.
    """
    with processes() as ranks:
        return evaluate_suite(
            models, suite, tasks=tasks, heads=heads, settings=settings, ranks=ranks, progress=progress
        )


def _recipe(recipe: Recipe | str | Path) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, "recipe"
    return load_recipe(recipe), str(recipe)


__all__ = [
    "Certificate",
    "Inspection",
    "MergeResult",
    "PurgePlan",
    "Purged",
    "Pushed",
    "RecipeError",
    "Report",
    "RunOptions",
    "add",
    "certify",
    "evaluate",
    "inspect",
    "merge",
    "plan",
    "purge_history",
    "push",
    "unmerge",
    "verify",
]
