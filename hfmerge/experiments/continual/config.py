"""Configuration of a continual experiment: variants of a method, orders of arrival, and the task of each model."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfmerge.errors import HfMergeError, Problem, RecipeError
from hfmerge.evaluation.plots.style import short_names
from hfmerge.evaluation.results import LOWER_IS_BETTER
from hfmerge.evaluation.suite import Suite
from hfmerge.methods import registry
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.recipe.recipe import ModelEntry, Recipe
from hfmerge.validation.values import show
from hfmerge.validation.wording import parameter


@dataclass(frozen=True)
class Variant:
    """One setting that is compared with others.

    Attributes:
        label: what tables call it.
        recipe: with its setting; models in the recipe's own order.
        varied: what a sweep set, by dotted path.
    """

    label: str
    recipe: Recipe
    varied: Mapping[str, Any]


def sweep(recipe: Recipe, label: str, sweeps: Sequence[str]) -> list[Variant]:
    """Every combination of the swept values over a recipe; the recipe itself if nothing is swept.

    Args:
        label: of the recipe.
        sweeps: `method.options.NAME=V1,V2,...`, `method.name=...` or `method.norm=...`.

    Raises:
        RecipeError: a value that the method refuses, or another path.
    """
    axes = []
    for text in sweeps:
        path, equals, values = text.partition("=")
        path = path.strip()
        if not equals or not (path in ("method.name", "method.norm") or path.startswith("method.options.")):
            wanted = "method.options.NAME=V1,V2, method.name=... or method.norm=..."
            raise RecipeError(
                [Problem(parameter("sweeps"), f"{show(text)} is not of the form {wanted}")], "command line"
            )
        axes.append([(path, value.strip()) for value in values.split(",") if value.strip()])
    variants = []
    for chosen in itertools.product(*axes):
        settings = dict(chosen)
        options = [f"{path.removeprefix('method.options.')}={value}" for path, value in chosen if "options" in path]
        made = apply_overrides(
            recipe, method=settings.get("method.name"), options=options, norm=settings.get("method.norm")
        )
        name = ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in chosen)
        names = [part for part in (label, name) if part]
        variants.append(Variant(" ".join(names) if label else name, made, settings))
    return variants


def orders(models: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Different orders of arrival, drawn with a seed; all of them where there are no more.

    Order k is a shuffle by Python's generator seeded with `seed + k`, skipping seeds whose order came before.
    """
    wanted = min(count, math.factorial(models))
    found: dict[tuple[int, ...], None] = {}
    for number in itertools.count(seed):
        if len(found) == wanted:
            return list(found)
        order = list(range(models))
        random.Random(number).shuffle(order)
        found[tuple(order)] = None
    raise AssertionError("there is always another seed")


def pair(suite: Suite, names: Sequence[str], refs: Sequence[str], owners: Mapping[str, str]) -> list[str]:
    """The task of every model, in the models' order.

    A task belongs to the model that `owners` names, else to the one whose classification head the suite names, else to
    the one whose name, without what all names begin with, is the task's, else to the only one whose name has the
    task's in it.

    Args:
        names, refs: of the models, as results and as the recipe have them.
        owners: task -> model.

    Raises:
        RecipeError: a model without a task, or with several; all such faults at once.
    """
    problems: list[Problem] = []
    known = {key: i for i, both in enumerate(zip(names, refs, strict=True)) for key in both}
    tasks_of: dict[int, list[str]] = {i: [] for i in range(len(names))}
    plain_names = [_plain(name.rpartition("--")[2]) for name in names]
    short = [_plain(name) for name in short_names(names)]
    for task in suite.tasks:
        owner = owners.get(task.name, task.head if task.classifies else None)
        if owner is not None:
            plain = owner.partition("@")[0] if owner not in known else owner
            if plain not in known:
                problems.append(Problem(f"task {task.name}", f"{show(owner)} is none of the models"))
                continue
            tasks_of[known[plain]].append(task.name)
            continue
        wanted = _plain(task.name)
        hits = [i for i, name in enumerate(short) if name == wanted]
        hits = hits or [i for i, name in enumerate(plain_names) if wanted in name]
        if len(hits) == 1:
            tasks_of[hits[0]].append(task.name)
    for task_name in owners:
        if task_name not in [task.name for task in suite.tasks]:
            problems.append(Problem(f"task {task_name}", f"is not in {suite.name}"))
    for i, tasks in tasks_of.items():
        if len(tasks) != 1 and not problems:
            what = f"has the tasks {', '.join(tasks)}" if tasks else "has no task"
            todo = parameter("tasks", {"TASK": refs[i]})
            problems.append(Problem(f"models[{i}]", f"{names[i]} {what}; name one: {todo}"))
    for task in suite.tasks:
        if task.metric in LOWER_IS_BETTER:
            problems.append(
                Problem(f"task {task.name}", f"{task.metric} is better when lower; accuracies are compared")
            )
    if problems:
        raise RecipeError(problems, "continual")
    return [tasks_of[i][0] for i in range(len(names))]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def arranged(recipe: Recipe, order: Sequence[int]) -> Recipe:
    """The recipe with some of its models, in another order, and nothing about where it goes."""
    models: tuple[ModelEntry, ...] = tuple(recipe.models[i] for i in order)
    return replace(recipe, models=models, output=None, push_to=None, private=None)


def check_variants(variants: Sequence[Variant]) -> None:
    """All have the same base and models, labels of their own, and methods that take one model after another.

    Raises:
        HfMergeError: names what differs.
    """
    first = variants[0].recipe
    for variant in variants[1:]:
        if (variant.recipe.base, variant.recipe.models) != (first.base, first.models):
            raise HfMergeError(
                f"{variant.label}: other base or models than {variants[0].label}; compare like with like."
            )
    labels = [variant.label for variant in variants]
    if again := [label for label in labels if labels.count(label) > 1]:
        raise HfMergeError(f"{again[0]}: two variants of this name; rename a recipe's file.")
    for variant in variants:
        least, most = registry()[variant.recipe.method.name].arity
        if least > 1 or (most is not None and most < len(first.models)):
            raise HfMergeError(
                f"{variant.label}: {variant.recipe.method.name} merges {least} to {most} models, so they cannot "
                "arrive one after another."
            )
