"""A job: what one verb is asked to do, as data; `perform` carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.lifecycle.push_target import Destination, destination
from hfmerge.recipe.recipe import ModelEntry, Recipe
from hfmerge.recipe.weights import Weight


if TYPE_CHECKING:
    from typing_extensions import Unpack

Action = Literal["merge", "add", "unmerge", "subtract", "replace", "reorder", "rebase", "restore"]


@dataclass(frozen=True)
class Job:
    """One action, and where its result goes.

    Attributes:
        action: what is done, in the words of a ledger entry.
        merged: reference of the merge that is changed; None for "merge".
        recipe: of "merge".
        origin: name of the recipe in messages.
        models: that join, in order of arrival: of "add"; of "replace" the new one.
        names: of models of the merge: those that leave ("unmerge", "subtract"), the one that is replaced, or all in
            their new order ("reorder").
        base: reference of the new base ("rebase").
        step: number of the step to go back to ("restore").
        weight: of the new model of "replace"; None: that of the old one.
        measure: of "subtract", also merge again without the models, to measure the gap.
        parts: of "unmerge", place of a model that is itself a merge -> reference of that merge without the models;
            None: nothing would be left of it, so it leaves as a whole.
        inner_to: of "unmerge", where such an inner merge goes: `org/name` or a folder; None: beside the result.
        overwrite, publish_private: for where an inner merge goes, as `to` has them for the result.
        output: folder of the result; None: in the place of a merge that is a folder, or only on the Hub.
        to: where the result is published; None: nowhere.
        sources: name of a model that was merged from a folder -> where that lies now.
        stream: see `Recipe.stream`.
    """

    action: Action
    merged: str | None = None
    recipe: Recipe | None = None
    origin: str = "recipe"
    models: tuple[ModelEntry, ...] = ()
    names: tuple[str, ...] = ()
    base: str | None = None
    step: int | None = None
    weight: Weight | None = None
    measure: bool = False
    parts: Mapping[int, str | None] = field(default_factory=dict)
    inner_to: str | None = None
    overwrite: bool = False
    publish_private: tuple[str, ...] = ()
    output: str | None = None
    to: Destination | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    stream: bool = False


class ChangeOptions(TypedDict, total=False):
    """What every verb that changes a merge may be told beside what it changes.

    Attributes:
        output: a new folder; without it a folder is replaced in one rename, and a Hub ID needs `push_to`.
        push_to: repository; pushing to the merge's own guards against a concurrent push.
        create_pr: publish as a pull request.
        overwrite: replace in `push_to` what hfmerge did not make as part of this merge: a base or source, a model.
        publish_private: names of inputs, private or gated or gone, of which the result may all the same go where more
            people may read it (see `hub.privacy`). Without, a new repository is private if an input is.
        sources: name of a model that was merged from a folder -> where that lies now.
        stream: read weights from the Hub as they are needed, and do not keep them.
        options: how the run uses the machine.
    """

    output: str | Path | None
    push_to: str | None
    create_pr: bool
    overwrite: bool
    publish_private: Sequence[str]
    sources: Mapping[str, str] | None
    stream: bool
    options: RunOptions


def run_options(given: ChangeOptions) -> RunOptions:
    """How the run uses the machine."""
    return given.get("options", DEFAULT)


def change_job(action: Action, merged: str | Path, **given: Unpack[ChangeOptions]) -> Job:
    """The job of a verb that changes a merge; `dataclasses.replace` adds what it changes.

    Raises:
        TypeError: an option that no verb knows.
    """
    if unknown := given.keys() - ChangeOptions.__annotations__.keys():
        raise TypeError(f"{action}() has no option {sorted(unknown)[0]!r}")
    output, overwrite = given.get("output"), given.get("overwrite", False)
    public = tuple(given.get("publish_private", ()))
    return Job(
        action,
        merged=str(merged),
        overwrite=overwrite,
        publish_private=public,
        output=None if output is None else str(output),
        to=destination(
            given.get("push_to"),
            create_pr=given.get("create_pr", False),
            overwrite=overwrite,
            publish_private=public,
        ),
        sources=given.get("sources") or {},
        stream=given.get("stream", False),
    )
