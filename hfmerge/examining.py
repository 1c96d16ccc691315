"""More public verbs: those that look at models and merges, prove what they hold, and publish them; wiring only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from hfmerge.admitting import admit_change
from hfmerge.api import unmerge
from hfmerge.certifying import Certificate, given_certificate, make_certificate
from hfmerge.errors import OutputError, VerificationError
from hfmerge.evaluation.checking import Behaviour, check_removal
from hfmerge.evaluation.results import Matrix
from hfmerge.evaluation.running import Settings, evaluate_suite
from hfmerge.evaluation.suite import Suite
from hfmerge.hub import Pushed, push_folder
from hfmerge.inspecting import Inspection, inspect_models
from hfmerge.ledger import recipe_of
from hfmerge.merged import open_merged
from hfmerge.options import DEFAULT, Consent, RunOptions
from hfmerge.purging import Purged, PurgePlan, purge
from hfmerge.recipe import Recipe
from hfmerge.recording import adopt_card
from hfmerge.removal import parts
from hfmerge.running import MergeResult, given_recipe, pinned_recipe, pinned_ref
from hfmerge.runtime import Ranks, processes
from hfmerge.targets import Destination, admit, check_readers, destination, with_snapshots
from hfmerge.verifying import Report, verify_merge
from hfmerge.workspace import recover


def unmerge_checked(
    merged: str | Path,
    remove: str | Sequence[str],
    suite: Suite | str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    publish_private: Sequence[str] = (),
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
        merged, remove, output, push_to, create_pr, overwrite, publish_private, sources, stream, mode, measure,
            options: as for `unmerge`.

    Raises:
        HfMergeError: as `unmerge` and `evaluate`; or no task of the suite belongs to a removed model.
    """
    names = [remove] if isinstance(remove, str) else list(remove)
    if create_pr and output is None:
        raise OutputError("--check: a pull request cannot be scored; name an --output as well.")
    change = partial(
        unmerge, merged, names, output=output, push_to=push_to, create_pr=create_pr, overwrite=overwrite,
        publish_private=publish_private, sources=sources, stream=stream, mode=mode, measure=measure, options=options,
    )  # fmt: skip
    opened = open_merged(str(merged), sources, options.consent)
    to = destination(push_to, create_pr=create_pr, overwrite=overwrite, publish_private=publish_private)
    admit_change(opened, to, Ranks(), options, without=names if mode == "exact" else ())()
    return check_removal(opened, names, suite, change, settings, options)


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

    A history that was seen before must go on from what was seen.

    Args:
        device: where a replay computes, as `RunOptions.device`.
        certificate: also check this certificate of removal, signed by one of the keys in `public_key` or
            `allowed_signers`, unless `allow_unsigned`.
        trust_remote_code, allow_pickle: what a replay may do with the sources, as of `RunOptions`; without a replay
            nothing is run or unpickled.
        download: hash what the Hub serves, instead of believing the digests that it lists.
        log: an append-only log (see `witness`) to check the history against; if all holds, a record is added.
        accept_rewritten: take a history that is not the one seen before as the true one from now on.

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
        replay=replay,
        device=device,
        sources=sources,
        consent=Consent(trust_remote_code, allow_pickle),
        download=download,
        also=partial(given.checks, replay=replay) if given is not None else None,
        log=log,
        certificate=given.sha256 if given is not None else None,
        accept_rewritten=accept_rewritten,
    )


def certify(
    merged: str | Path,
    removed: str,
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
    """Certify that a merge no longer holds a model: an in-toto statement in a DSSE envelope (see `certificate`).

    Args:
        removed: the model, as the ledger names it.
        key: ed25519 private key (OpenSSH or PEM); its passphrase is in `HFMERGE_KEY_PASSPHRASE`, or asked for.
        output: file for the certificate.
        days: validity; None: for ever.
        replay: merge the materials again first, and state that.
        accept_approximate: certify also what comes out equal only within the tolerance of other arithmetic.
        device: where a replay computes, as `RunOptions.device`.
        sources: as for `add`.
        trust_remote_code, allow_pickle: as for `verify`.
        log: as for `verify`.

    Raises:
        CertificateError: the model was never in the merge or still is, or the key cannot be used.
        VerificationError: the merge is not what its ledger says.
    """
    made = make_certificate(
        str(merged), removed, key=key, days=days, replay=replay, accept_approximate=accept_approximate,
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
    """Squash a published merge's history, which still holds earlier weights, for good; None if `confirm` refuses.

    Args:
        delete_files: also delete the weights of earlier steps from the Hub's storage.
        confirm: shown what would be done, and what would be left, before anything changes.

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
    publish_private: Sequence[str] = (),
    check: bool = True,
) -> Pushed:
    """Publish a merge folder.

    Args:
        private, create_pr, overwrite, publish_private: as for `merge`.
        check: verify the folder first, so that nothing is published that its ledger does not describe.

    Raises:
        VerificationError: the folder is not what its ledger says. PushError: see `hub.push_folder`.
    """
    to = Destination(repo_id, private, create_pr, None, overwrite, tuple(publish_private))
    recover(folder)
    opened = open_merged(str(Path(folder).absolute()))
    inputs = with_snapshots(parts(opened.last), opened.refs)
    level, _ = admit(to, inputs, history=opened.history)
    check_readers(to, level, inputs)
    if check:
        report = verify_merge(str(folder))
        if not report.ok:
            raise VerificationError(f"{folder}: not pushed; {report.culprits[0]}")
    pushed = push_folder(Path(folder), to)
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
        options: `max_memory`, `notify` and what it allows count.

    Raises:
        RecipeError: as for `plan`. HfMergeError: see `hfmerge.errors`.
    """
    with processes() as ranks:
        if not isinstance(models, Recipe) and not str(models).endswith((".yaml", ".yml")):
            ref = pinned_ref(str(models), ranks)
            opened = ranks.each(lambda: open_merged(ref, sources))
            asked, origin = recipe_of(opened.last, opened.refs, options.consent), opened.pinned.label
            ran = opened.last.ran_code
        else:
            asked, origin = given_recipe(models, options.consent)
            asked, ran = pinned_recipe(asked, ranks), False
        return inspect_models(
            asked, origin=origin, matrices=matrices, spectral=spectral, options=options, ranks=ranks, code_was_run=ran
        )


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
