"""A job: the request of one verb, as data. `perform` carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.errors import Problem, RecipeError
from hfmerge.lifecycle.push_target import Destination, destination
from hfmerge.recipe import values
from hfmerge.recipe.recipe import ModelEntry, Recipe
from hfmerge.recipe.weights import Weight


if TYPE_CHECKING:
    from typing_extensions import Unpack

Action = Literal["merge", "add", "unmerge", "subtract", "replace", "reorder", "rebase", "restore"]


@dataclass(frozen=True)
class Job:
    """One action, and where its result goes.

    Attributes:
        action: the action, as a ledger entry names it.
        merged: reference of the merge that is changed; None for "merge".
        recipe: of "merge".
        origin: name of the recipe in messages.
        models: models that join, in order of arrival ("add"), or the new model ("replace").
        names: names of models of the merge: models that leave ("unmerge", "subtract"), the model that is replaced
            ("replace"), or all models in their new order ("reorder").
        base: reference of the new base ("rebase").
        step: number of the step to go back to ("restore").
        weight: weight of the new model ("replace"); None: the weight of the old model.
        measure: also merge again without the models, to measure the gap ("subtract").
        parts: index of an inner merge -> reference of this merge without the removed models; None if no model would be
            left in it, so that it is removed as a whole ("unmerge").
        inner_to: target of a new inner merge: `org/name` or a folder; None: beside the result ("unmerge").
        overwrite, publish_private: for the target of an inner merge; `to` holds them for the result.
        output: folder of the result. None: the folder of the merge is replaced, or the result is only on the Hub.
        to: repository to which the result is published; None: it is not published.
        sources: name of a model that was merged from a folder -> present path of this folder.
        stream: see `Recipe.stream`.
        state: which carried states are kept from this change on (see `Recipe.state`); None: as before.
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
    state: str | int | None = None


class ChangeOptions(TypedDict, total=False):
    """Options of every verb that changes a merge.

    Attributes:
        output: a new folder for the result. None: a merge that is a folder is replaced in one rename; a merge given
            by Hub ID needs `push_to`.
        push_to: repository to publish to. A push to the merge's own repository fails if somebody pushed meanwhile.
        create_pr: publish as a pull request.
        overwrite: allow `push_to` to replace files that are not of this merge, such as a base, a source or a model.
        commit_message: first line of the commit that publishes; None: what was done.
        publish_private: names of private, gated or deleted inputs whose merge may have more readers than the input
            has (see `hub.privacy`). Otherwise a new repository is private if an input is private.
        sources: name of a model that was merged from a folder -> present path of this folder.
        stream: read weights from the Hub as they are needed, and do not keep them.
        state: which carried states are kept from now on: "none", "last", "all", or after every k-th model; None: as
            before.
        options: how the run uses the machine.
    """

    output: str | Path | None
    push_to: str | None
    create_pr: bool
    commit_message: str | None
    overwrite: bool
    publish_private: Sequence[str]
    sources: Mapping[str, str] | None
    stream: bool
    state: str | int | None
    options: RunOptions


def run_options(keywords: ChangeOptions) -> RunOptions:
    """How the run uses the machine."""
    return keywords.get("options", DEFAULT)


def change_job(action: Action, merged: str | Path, **given: Unpack[ChangeOptions]) -> Job:
    """The job of a verb that changes a merge; `dataclasses.replace` adds what it changes.

    Raises:
        TypeError: an unknown option. RecipeError: no such setting of states.
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
            commit_message=given.get("commit_message"),
            overwrite=overwrite,
            publish_private=public,
        ),
        sources=given.get("sources") or {},
        stream=given.get("stream", False),
        state=_state(given.get("state"), action),
    )


def _state(given: str | int | None, origin: str) -> str | int | None:
    try:
        return None if given is None else values.state(given)
    except ValueError as error:
        raise RecipeError([Problem("state", str(error))], origin) from error
