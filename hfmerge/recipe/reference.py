"""The reference of a recipe: all its keys with their values, defaults and meanings, from where they are declared."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from hfmerge.recipe.keys import RecipeKey, keys_of
from hfmerge.recipe.learning import Learning
from hfmerge.recipe.recipe import ModelEntry, Recipe
from hfmerge.recipe.replay import ReplaySettings


SECTIONS: dict[str, type] = {"": Recipe, "models": ModelEntry, "learn": Learning, "learn.replay": ReplaySettings}
"""Dotted path of a section -> its dataclass; of `models` it is one item."""


@dataclass(frozen=True)
class Described:
    """A key in the words of the reference, which are Markdown.

    Attributes:
        section: in `SECTIONS`.
        values: that it may have.
        flag: of the command line, or None.
    """

    section: str
    name: str
    values: str
    default: str
    meaning: str
    flag: str | None


def recipe_reference() -> Iterator[Described]:
    """All keys, section by section, but the options of methods, which the registry has."""
    for section, declared in SECTIONS.items():
        told = attributes(declared)
        for key in keys_of(declared):
            meaning = told.get(key.name, key.declared.get("help", "")).replace("None:", "unset:")
            yield Described(section, key.name, values_of_key(key), default_of_key(key), meaning, key.flag)


def values_of_key(key: RecipeKey) -> str:
    """The values that a key may have, in words."""
    choices = key.declared.get("choices")
    if choices is None:
        return _words(key.hint, key)
    return ", ".join(f"`{choice}`" for choice in choices) + (" or unset" if key.default is None else "")


def _words(hint: Any, key: RecipeKey) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(part, key) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return "list"
    words = {float: "number", int: "whole number", str: "text", bool: "true or false", type(None): "unset"}
    word = words.get(hint, "mapping")
    if hint not in (int, float):
        return word
    low, high = key.declared.get("minimum"), key.declared.get("maximum")
    bounds = [] if low is None else [f"at least {low:g}"]
    bounds += [] if high is None or high > 2**62 else [f"at most {high:g}"]
    return " ".join([word, ", ".join(bounds)]).strip()


def default_of_key(key: RecipeKey) -> str:
    """What a key is where it is not given, in words."""
    if key.required:
        return "required"
    if dataclasses.is_dataclass(key.default):
        return "its defaults"
    if isinstance(key.default, bool):
        return f"`{str(key.default).lower()}`"
    return "unset" if key.default is None else "none" if key.default == () else f"`{key.default}`"


def attributes(declared: type) -> dict[str, str]:
    """Field -> its text in the docstring of a class."""
    _, _, section = str(inspect.getdoc(declared)).partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.partition("\n\n")[0].splitlines():
        entry = re.fullmatch(r" {4}(\w[\w, ]*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
