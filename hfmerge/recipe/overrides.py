"""Command-line flags as a recipe, alone or over one from a file, with the same checks and the same errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hfmerge.errors import Problem
from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.recipe import Recipe, check_recipe
from hfmerge.recipe.united import without_united
from hfmerge.validation.strict_yaml import parse_scalar
from hfmerge.validation.values import show


def apply_overrides(
    recipe: Recipe | None,
    *,
    models: Sequence[str] | None = None,
    method: str | None = None,
    options: Sequence[str] = (),
    weights: Sequence[float | str] | None = None,
    aliases: Mapping[str, str] | None = None,
    norm: float | str | None = None,
    learn: Sequence[str] | None = None,
    **values: Any,
) -> Recipe:
    """A recipe with command-line flags over it; a flag that is None leaves the recipe's value.

    Text for `weights`, `norm`, options, and keys that are not plain text is read like an unquoted YAML value.

    Args:
        recipe: to start from; None: from nothing.
        models: replace the recipe's, with weight 1 each unless `weights` are given too.
        method: replaces name, options and norm of the recipe's method, unless it is the same method.
        options: `name=value`; each replaces the option of this name of the recipe's method.
        weights: one weight per model, in the order of the models.
        aliases: model, as the recipe or `models` has it -> its alias.
        learn: `name=value` replaces a key of the recipe's `learn`, `replay.name=value` a key of its `replay`. An empty
            list: as the recipe says, or the defaults of `learn`.
        values: all other keys of a recipe, by name.

    Raises:
        RecipeError: all problems of the result, under the origin "command line".
    """
    keys = {key.name: key for key in keys_of(Recipe)}
    overrides = {name: value for name, value in values.items() if value is not None}
    problems: list[Problem] = []
    data = recipe.to_dict() if recipe else {}
    without_united(data, overrides)
    data |= {name: keys[name].from_flag(value) if name in keys else value for name, value in overrides.items()}
    if models is not None:
        data["models"] = [{"model": model} for model in models]
    if weights is not None:
        entries = data.get("models", [])
        if len(weights) == len(entries):
            numbers = [parse_scalar(weight) if isinstance(weight, str) else weight for weight in weights]
            data["models"] = [{**entry, "weight": weight} for entry, weight in zip(entries, numbers, strict=True)]
        else:
            text = f"{len(weights)} given for {len(entries)} models; give one a model, in their order"
            problems.append(Problem("weights", text))
    if aliases:
        data["models"] = with_aliases(data.get("models", []), aliases, problems)
    choice = data.get("method", {})
    if method is not None and method != choice.get("name"):
        choice = {"name": method}
    choice |= _option_flags(options, problems)
    if norm is not None:
        choice["norm"] = parse_scalar(norm) if isinstance(norm, str) else norm
    if choice:
        data["method"] = choice
    if learn is not None:
        chosen: dict[str, Any] = {**(data.get("learn") or {})}
        for name, value in _option_flags(learn, problems, "learn").items():
            if name.startswith("replay."):
                chosen["replay"] = {**chosen.get("replay", {}), name.removeprefix("replay."): value}
            else:
                chosen[name] = value
        data["learn"] = chosen
    result = check_recipe(data, "command line", problems, None)
    return dataclasses.replace(result, notes=recipe.notes if recipe else ())


def with_aliases(
    entries: Sequence[Mapping[str, Any]], aliases: Mapping[str, str], problems: list[Problem]
) -> list[dict[str, Any]]:
    """The models of a recipe with their aliases; one that names no model is a problem."""
    given = [str(entry["model"]) for entry in entries]
    for model in aliases:
        if model not in given:
            text = f"{show(model)} is none of the models {', '.join(given)}; write it as it is given"
            problems.append(Problem("models", text))
    return [
        {**entry, "alias": aliases[model]} if model in aliases else {**entry}
        for entry, model in zip(entries, given, strict=True)
    ]


def _option_flags(options: Sequence[str], problems: list[Problem], place: str = "method") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for option in options:
        name, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not name:
            problems.append(Problem(place, f"option {show(option)} is not of the form name=value"))
        elif place == "method" and name in ("name", "norm"):
            problems.append(Problem(f"method.{name}", "is not an option; it has a flag of its own"))
        elif name in result:
            problems.append(Problem(f"{place}.{name}", "given twice; keep one"))
        else:
            result[name] = parse_scalar(value)
    return result
