"""The public verbs: each opens what it needs, calls one part after another and returns a small result; none prints.

Merging does not import the libraries that only evaluation and inspection need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfmerge.engine.options import DEFAULT, Consent, RunOptions
from hfmerge.engine.plan import Plan
from hfmerge.engine.planner import make_plan
from hfmerge.engine.ranks import processes
from hfmerge.engine.workspace import recover
from hfmerge.errors import LedgerError, OutputError
from hfmerge.ledger.diff import Difference, compare
from hfmerge.ledger.entry import Entry, recipe_of
from hfmerge.ledger.log import Step, steps_of
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.lifecycle.certify import Certificate, given_certificate, make_certificate
from hfmerge.lifecycle.early import all_faults, check_early
from hfmerge.lifecycle.forecast import Forecast, admit_push, forecast, forecast_push
from hfmerge.lifecycle.job import ChangeOptions, run_options
from hfmerge.lifecycle.jobs import (
    JOBS,
    add_job,
    merge_job,
    rebase_job,
    reorder_job,
    replace_job,
    restore_job,
    unmerge_job,
)
from hfmerge.lifecycle.perform import perform
from hfmerge.lifecycle.publish import Pushed, push_folder
from hfmerge.lifecycle.purge import Purged, PurgePlan, purge
from hfmerge.lifecycle.push_target import Destination
from hfmerge.lifecycle.record import adopt_card
from hfmerge.lifecycle.session import AnyRecipe, MergeResult, given_recipe, session
from hfmerge.lifecycle.verify import FurtherChecks, Report, verify_merge
from hfmerge.recipe.recipe import MethodChoice, ModelEntry


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hfmerge.evaluation.evaluator import Settings
    from hfmerge.evaluation.inspection.inspection import Inspection
    from hfmerge.evaluation.results import Matrix
    from hfmerge.evaluation.suite import Suite
    from hfmerge.lifecycle.check_removal import Behaviour

AnyModel = str | Path | Mapping[str, Any] | ModelEntry
"""A model as a verb takes it: a reference, or a model of a recipe."""
AnyMethod = str | Mapping[str, Any] | MethodChoice
"""A method as a verb takes it: a name, or the method of a recipe."""


def plan(
    recipe: AnyRecipe | None = None,
    *,
    base: str | Path | None = None,
    models: Sequence[AnyModel] | None = None,
    method: AnyMethod | None = None,
    **keys: Any,
) -> Plan:
    """Plan a merge from headers alone; downloads no weights.

    Args:
        recipe, base, models, method, keys: as for `merge`.

    Examples:
        >>> plan = hfmerge.plan(base="org/base", models=["org/tuned-a", "org/tuned-b"], method="opcm")
        >>> plan.estimate.download, plan.estimate.memory, plan.estimate.seconds

    Raises:
        RecipeError: every problem of the recipe and its models at once.
    """
    with all_faults(DEFAULT, planning=True):
        given, origin = given_recipe(recipe, base=base, models=models, method=method, **keys)
    return make_plan(given, origin=origin)


def merge(
    recipe: AnyRecipe | None = None,
    *,
    base: str | Path | None = None,
    models: Sequence[AnyModel] | None = None,
    method: AnyMethod | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    options: RunOptions = DEFAULT,
    **more: Any,
) -> MergeResult:
    """Merge models into a new folder, with ledger and card, and publish it if asked.

    Args:
        recipe: the path of a YAML file, its keys as a mapping, or a `Recipe`. None: the other arguments say all.
        base: the model that all others were tuned from: `org/name[@revision]` or a folder.
        models: in order of arrival. Each is a reference, or a mapping such as `{"model": "org/name", "weight": 0.5}`.
        method: its name, or a mapping of name and options, such as `{"name": "opcm", "alpha": 0.4}`.
        output: new folder for the result.
        push_to: repository to publish to.
        options: how the run uses the machine.
        more: `create_pr`, `commit_message`, `overwrite`, `publish_private` (see `ChangeOptions`), and all other keys
            of a recipe, such as `dtype`, `exclude` or `private` (see the reference of recipes). A key that is given
            here counts instead of the recipe's own.

    Examples:
        >>> import hfmerge
        >>> result = hfmerge.merge(
        ...     base="google-bert/bert-base-uncased",
        ...     models=["org/tuned-a", {"model": "org/tuned-b", "weight": 0.5}],
        ...     method="opcm",
        ...     output="merged",
        ... )
        >>> hfmerge.unmerge("merged", "org/tuned-a")

    Raises:
        RecipeError: all problems of the recipe at once. HfMergeError: see `hfmerge.errors`; nothing half-written
            remains.
    """
    keys = {"base": base, "models": models, "method": method, "output": output, "push_to": push_to, **more}
    return perform(*merge_job(recipe, options=options, **keys))


def add(merged: str | Path, models: AnyModel | Sequence[AnyModel], **options: Unpack[ChangeOptions]) -> MergeResult:
    """Merge further models into an existing merge, continuing from its carried state.

    Args:
        merged: `org/name[@revision]` or a folder.
        models: one or several, each as in `merge`.
        options: where the result goes and how the run uses the machine (see `ChangeOptions`).

    Raises:
        RecipeError: what is no model or no weight. HfMergeError: see `hfmerge.errors`; the existing merge stays as it
            was.
    """
    return perform(*add_job(merged, models, **options))


def unmerge(
    merged: str | Path,
    remove: str | Sequence[str],
    *,
    inner_to: str | None = None,
    mode: Literal["exact", "subtract"] = "exact",
    measure: bool = False,
    **options: Unpack[ChangeOptions],
) -> MergeResult:
    """Take models out: the result has the bytes of the merge that never saw them.

    You may repeat a removal that is done. The repetition succeeds and computes nothing. It finishes the clean-up of a
    killed run: it deletes states of the models from the branch of states, deletes folders beside the merge's own, and
    sets the tag. `add`, `replace` and `restore` may be repeated in the same way.

    Args:
        merged, options: as for `add`.
        remove: names as the ledger lists them. A name may also be that of a model inside an inner merge, a merge that
            is a model of this one. The inner merge is then merged again without the model, and replaced.
        inner_to: `org/name` or `./folder` for the new inner merge; None: a folder beside the result.
        mode: "exact" or "subtract". "subtract" is for opcm, mdm_oc_subspace and mdm_oc, whose result depends on the
            order. For opcm and mdm_oc_subspace it reads only the models that leave. It is approximate and not a
            removal: later models stay as they were projected, and the models stay in the state and in the ledger. The
            ledger records the gap.
        measure: for "subtract": also merge again without the models, to measure the gap.

    Raises:
        LedgerError: a name is not in the merge, or no model would be left. HfMergeError: see `hfmerge.errors`.
    """
    return perform(*unmerge_job(merged, remove, inner_to=inner_to, mode=mode, measure=measure, **options))


def replace(
    merged: str | Path, old: str, new: str, *, weight: float | None = None, **options: Unpack[ChangeOptions]
) -> MergeResult:
    """Replace a model by another model or another revision of it.

    The result has the bytes of a merge that had the new model in that place from the start.

    Args:
        merged, options: as for `add`.
        old: name as the ledger lists it.
        new: reference.
        weight: weight of the new model; None: the weight of the old one.

    Raises:
        LedgerError: `old` is not in the merge, or `new` is there already. HfMergeError: see `hfmerge.errors`; the
            merge stays as it was.
    """
    return perform(*replace_job(merged, old, new, weight=weight, **options))


def reorder(merged: str | Path, models: Sequence[str], **options: Unpack[ChangeOptions]) -> MergeResult:
    """Merge the same models in another order.

    Args:
        merged, options: as for `add`.
        models: names of all models, in the new order.

    Raises:
        LedgerError: a name is missing, twice, or not in the merge. HfMergeError: see `hfmerge.errors`.
    """
    return perform(*reorder_job(merged, models, **options))


def rebase(merged: str | Path, base: str, **options: Unpack[ChangeOptions]) -> MergeResult:
    """Merge the same models on another base or another revision of it.

    Args:
        merged, options: as for `add`.
        base: reference.

    Raises:
        LedgerError: `base` is the base already. RecipeError: a model does not fit the new base.
    """
    return perform(*rebase_job(merged, base, **options))


def restore(merged: str | Path, step: int, **options: Unpack[ChangeOptions]) -> MergeResult:
    """Go back to an earlier step: its files come from the Hub's history, and nothing is computed.

    Args:
        merged, options: as for `add`; pushing to the merge's own repository copies the files there, without
            downloading them. Nothing is streamed.
        step: number of the step.

    Raises:
        LedgerError: no such step, or no repository that still holds it.
    """
    return perform(*restore_job(merged, step, **options))


def dry_run(verb: str, *operands: Any, **named: Any) -> Forecast:
    """Say what a verb would do, from headers alone: its way, what it reads, what it needs. Nothing is changed.

    Args:
        verb: "merge", "add", "unmerge", "replace", "reorder", "rebase", "restore" or "push".
        operands, named: the arguments of the verb.

    Examples:
        >>> forecast = hfmerge.dry_run("unmerge", "merged", remove="org/tuned-a")
        >>> forecast.how, forecast.starts, forecast.need.read

    Raises:
        HfMergeError: whatever the verb itself would raise before its work. ValueError: there is no such verb.
    """
    if verb == "push":
        return forecast_push(*operands, **named)
    if verb not in JOBS:
        raise ValueError(f"{verb}: has no dry run; these have: {', '.join(JOBS)}, push.")
    return forecast(*JOBS[verb](*operands, **named))


def history(merged: str | Path) -> tuple[Step, ...]:
    """The steps of a merge, oldest first. For a merge on the Hub each step has the authors and the date of its commit.

    Raises:
        LedgerError: no ledger or a broken one. SourceError: the merge cannot be reached.
    """
    recover(merged)
    return steps_of(open_merged(str(merged)))[0]


def diff(merged: str | Path, before: int | str | Path | None = None, after: int | None = None) -> Difference:
    """Compare two steps of a merge, or the last steps of two merges.

    Args:
        before: number of a step, or another merge. A negative number counts from the end. None: the last step but one.
        after: number of the later step; None: the last.

    Raises:
        LedgerError: no such step.
    """
    opened = _open(merged)
    if isinstance(before, str | Path):
        if after is not None:
            raise LedgerError("diff: compare two steps of one merge, or two merges.")
        return compare(opened.last, _open(before).last)
    if before is None and len(opened.entries) == 1:
        raise LedgerError(f"{opened.snapshot.label}: has only one step; name another merge to compare it with.")
    return compare(_step(opened, -2 if before is None else before), _step(opened, -1 if after is None else after))


def _open(merged: str | Path) -> Merged:
    recover(merged)
    return open_merged(str(merged))


def _step(opened: Merged, number: int) -> Entry:
    count = len(opened.entries)
    at = number - 1 if number > 0 else count + number
    if number == 0 or not 0 <= at < count:
        raise LedgerError(f"{opened.snapshot.label}: has no step {number}; its ledger has steps 1 to {count}.")
    return opened.entries[at]


def unmerge_checked(
    merged: str | Path,
    remove: str | Sequence[str],
    suite: Suite | str | Path,
    *,
    mode: Literal["exact", "subtract"] = "exact",
    measure: bool = False,
    settings: Settings | None = None,
    **options: Unpack[ChangeOptions],
) -> tuple[MergeResult, Behaviour]:
    """`unmerge`, with a suite's scores before and after, beside the base and the merge that never saw the models.

    Args:
        merged, remove, mode, measure, options: as for `unmerge`.
        suite: at least one of its tasks uses the head of a removed model.
        settings: settings of the evaluation.

    Raises:
        HfMergeError: as for `unmerge` and `evaluate`; or no task of the suite belongs to a removed model.
    """
    from hfmerge.lifecycle.check_removal import check_removal

    names = [remove] if isinstance(remove, str) else list(remove)
    if options.get("create_pr") and options.get("output") is None:
        raise OutputError("a pull request cannot be scored; name an output folder as well.")
    run = run_options(options)
    job, _ = unmerge_job(merged, names, mode=mode, measure=measure, **options)
    opened = open_merged(str(merged), job.sources, run.consent)
    with session(run) as here:
        faults, check_readers = check_early(job, opened, here)
        faults.tell()
        check_readers()
    change = partial(unmerge, merged, names, mode=mode, measure=measure, **options)
    return check_removal(opened, names, suite, change, settings, run)


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
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    download: bool = False,
    log: str | Path | None = None,
    accept_rewritten: bool = False,
) -> Report:
    """Check ledger, files and card of a merge; with `replay`, merge again and compare. See `Report.verdict`.

    If this user saw the history of the merge before, the history must continue what was seen.

    Args:
        device: device of a replay, as `RunOptions.device`.
        certificate: also check this certificate of removal, signed by one of the keys in `public_key` or
            `allowed_signers`, unless `allow_unsigned`.
        trust_remote_code, allow_pickle: as in `RunOptions`, for a replay. Without a replay no code is run and no
            pickle is read.
        download: download and hash the files, instead of believing the digests that the Hub lists.
        log: append-only log (see `lifecycle.witness`). The history is checked against it. If all checks pass, a
            record is added.
        accept_rewritten: accept a history that differs from the one seen before, and remember it from now on.

    Raises:
        SourceError: the merge cannot be reached. CertificateError: certificate or keys cannot be read.
        OutputError: the log cannot be written.
    """
    given = None
    if certificate is not None:
        given = given_certificate(
            certificate, public_key=public_key, signers=allowed_signers, unsigned=allow_unsigned
        )  # fmt: skip
    return verify_merge(
        str(merged),
        FurtherChecks(replay, device, download, given),
        sources=sources,
        consent=Consent(trust_remote_code, allow_pickle),
        log=log,
        accept_rewritten=accept_rewritten,
    )


def certify(
    merged: str | Path,
    remove: str,
    *,
    key: str | Path | None = None,
    output: str | Path | None = None,
    days: float | None = None,
    replay: bool = False,
    accept_approximate: bool = False,
    device: str | None = None,
    sources: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    log: str | Path | None = None,
) -> Certificate:
    """Certify that a merge no longer holds a model: an in-toto statement in an envelope (see `lifecycle.certificate`).

    Args:
        remove: the model, as the ledger names it.
        key: ed25519 private key (OpenSSH or PEM); its passphrase is in `HFMERGE_KEY_PASSPHRASE`, or asked for.
        output: file for the certificate.
        days: number of days for which the certificate is valid; None: for ever.
        replay: merge the materials again first; the certificate states that.
        accept_approximate: also certify if the replay is equal only within the tolerance of other arithmetic.
        device: device of a replay, as `RunOptions.device`.
        sources: as for `add`.
        trust_remote_code, allow_pickle: as for `verify`.
        log: as for `verify`.

    Raises:
        CertificateError: the model was never in the merge or still is, or the key cannot be used.
        VerificationError: the merge is not what its ledger says.
    """
    made = make_certificate(
        str(merged), remove, key=key, days=days, replay=replay, accept_approximate=accept_approximate,
        device=device, sources=sources, log=log, consent=Consent(trust_remote_code, allow_pickle),
    )  # fmt: skip
    if output is not None:
        try:
            Path(output).write_bytes(made.envelope.to_bytes())
        except OSError as error:
            raise OutputError(f"{output}: cannot be written ({error.strerror}).") from error
    return made


def purge_history(
    repo_id: str, *, delete_files: bool = False, confirm: Callable[[PurgePlan], bool] | None = None
) -> Purged | None:
    """Squash the history of a published merge for good, since it still holds earlier weights.

    Gives None if `confirm` refuses.

    Args:
        delete_files: also delete the weights of earlier steps from the Hub's storage.
        confirm: called with the plan of the purge before anything changes. False ends the purge.

    Raises:
        VerificationError: the merge is not what its ledger says. HfMergeError: see `hfmerge.errors`.
    """
    return purge(repo_id, delete_files=delete_files, confirm=confirm)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    commit_message: str | None = None,
    publish_private: Sequence[str] = (),
    check: bool = True,
) -> Pushed:
    """Publish a merge folder.

    Args:
        private, create_pr, commit_message, overwrite, publish_private: as for `merge`.
        check: verify the folder first, so that only a folder that its ledger describes is published.

    Raises:
        VerificationError: the folder is not what its ledger says. PushError: see `lifecycle.publish.push_folder`.
    """
    to = Destination(repo_id, private, create_pr, None, overwrite, tuple(publish_private), commit_message)
    recover(folder)
    admit_push(Path(folder), to, check=check)
    pushed = push_folder(Path(folder), to)
    adopt_card(Path(folder), repo_id)
    return pushed


def inspect(
    models: AnyRecipe,
    *,
    matrices: Sequence[str] | None = None,
    spectral: bool = True,
    sources: Mapping[str, str] | None = None,
    options: RunOptions = DEFAULT,
) -> Inspection:
    """Compare models without merging them: similarity, norms, signs, spectra, predicted interference.

    Args:
        models: a recipe as `merge` takes it, or a merge by ID or folder, whose sources are then compared.
        matrices: fnmatch patterns of tensors whose matrices are decomposed; None: all.
        spectral: decompose matrices. False: only one pass over the elements is made.
        sources: as for `add`.
        options: only `max_memory`, `notify`, `trust_remote_code` and `allow_pickle` are used.

    Raises:
        RecipeError: as for `plan`. HfMergeError: see `hfmerge.errors`.
    """
    from hfmerge.evaluation.inspection.inspection import inspect_models

    with session(options) as here:
        if isinstance(models, str | Path) and not str(models).endswith((".yaml", ".yml")):
            ref = here.pinned(str(models))
            opened = here.each(lambda: open_merged(ref, sources))
            recipe, origin = recipe_of(opened.last, opened.refs, options.consent), opened.snapshot.label
            ran = opened.last.ran_code
        else:
            recipe, origin = given_recipe(models, options.consent)
            recipe, ran = here.pinned_recipe(recipe), False
        return inspect_models(
            recipe, origin=origin, matrices=matrices, spectral=spectral, options=options, ranks=here.ranks,
            code_was_run=ran,
        )  # fmt: skip


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
        heads: task -> model whose head is used, instead of the one that the suite names; "*" stands for all tasks.
        settings: limit, seed, batch size, device, cache (see `Settings`).
        progress: show a bar with the time left.

    Raises:
        RecipeError: all problems of the suite. HeadError: a model has no head for a task.
        SourceError: a model or data set cannot be reached or read.
    """
    from hfmerge.evaluation.evaluator import evaluate_suite

    with processes() as ranks:
        return evaluate_suite(
            models, suite, tasks=tasks, heads=heads, settings=settings, ranks=ranks, progress=progress
        )
