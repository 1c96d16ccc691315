"""The jobs that the public verbs ask for, from the arguments of the verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.errors import LedgerError
from hfmerge.lifecycle.early import all_faults
from hfmerge.lifecycle.job import ChangeOptions, Job, change_job, run_options
from hfmerge.lifecycle.push_target import destination
from hfmerge.lifecycle.session import AnyRecipe, given_recipe
from hfmerge.recipe.recipe import ModelEntry, read_models


if TYPE_CHECKING:
    from typing_extensions import Unpack

JobAndOptions = tuple[Job, RunOptions]
"""A job, and how its run uses the machine."""
PUBLISHING = ("create_pr", "commit_message", "overwrite", "publish_private")
"""Arguments of `merge` that say how it is published, and are no keys of a recipe."""


def merge_job(recipe: AnyRecipe | None = None, *, options: RunOptions = DEFAULT, **more: Any) -> JobAndOptions:
    """Of `api.merge`."""
    allowed = {name: more.pop(name) for name in PUBLISHING if name in more}
    with all_faults(options, **allowed):
        given, origin = given_recipe(recipe, options.consent, **more)
    to = destination(given.push_to, private=given.private, **allowed)
    return Job("merge", recipe=given, origin=origin, output=given.output, to=to), options


def add_job(merged: str | Path, models: Any, **options: Unpack[ChangeOptions]) -> JobAndOptions:
    """Of `api.add`."""
    job = change_job("add", merged, **options)
    return dataclasses.replace(job, models=read_models(models, "add")), run_options(options)


def unmerge_job(
    merged: str | Path,
    remove: str | Sequence[str],
    *,
    inner_to: str | None = None,
    mode: Literal["exact", "subtract"] = "exact",
    measure: bool = False,
    **options: Unpack[ChangeOptions],
) -> JobAndOptions:
    """Of `api.unmerge`."""
    if measure and mode == "exact":
        raise LedgerError("unmerge: there is no gap to measure unless models are subtracted (mode: subtract).")
    names = (remove,) if isinstance(remove, str) else tuple(remove)
    job = change_job("subtract" if mode == "subtract" else "unmerge", merged, **options)
    return dataclasses.replace(job, names=names, inner_to=inner_to, measure=measure), run_options(options)


def replace_job(
    merged: str | Path, old: str, new: str, *, weight: float | None = None, **options: Unpack[ChangeOptions]
) -> JobAndOptions:
    """Of `api.replace`."""
    job = change_job("replace", merged, **options)
    return dataclasses.replace(job, names=(old,), models=(ModelEntry(new),), weight=weight), run_options(options)


def reorder_job(merged: str | Path, models: Sequence[str], **options: Unpack[ChangeOptions]) -> JobAndOptions:
    """Of `api.reorder`."""
    return dataclasses.replace(change_job("reorder", merged, **options), names=tuple(models)), run_options(options)


def rebase_job(merged: str | Path, base: str, **options: Unpack[ChangeOptions]) -> JobAndOptions:
    """Of `api.rebase`."""
    return dataclasses.replace(change_job("rebase", merged, **options), base=base), run_options(options)


def restore_job(merged: str | Path, step: int, **options: Unpack[ChangeOptions]) -> JobAndOptions:
    """Of `api.restore`."""
    return dataclasses.replace(change_job("restore", merged, **options), step=step), run_options(options)


JOBS: Mapping[str, Callable[..., JobAndOptions]] = {
    **{"merge": merge_job, "add": add_job, "unmerge": unmerge_job, "replace": replace_job},
    **{"reorder": reorder_job, "rebase": rebase_job, "restore": restore_job},
}
"""Name of a verb -> its job."""
