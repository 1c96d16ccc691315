"""Typed, strict reading of plain data: one function a kind of value, whose ValueError is the text of the problem.

Recipes are read key by key, so that all their problems are told (`Section`). What a file of a repository says is
checked as a whole by kinds put together (`record`, `table`, `items`), up to its first problem.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from hfmerge.errors import Problem
from hfmerge.validation.limits import TEXT, Limit
from hfmerge.validation.strict_yaml import parse_scalar


T = TypeVar("T")
U = TypeVar("U")
LARGEST = 3.4e38
"""What float32 can hold, rounded down."""
Kind = Callable[[Any], Any]
"""Takes a value that is of a kind; raises ValueError for all others."""


@dataclass(frozen=True)
class Section:
    """One mapping of a recipe while it is read; what is wrong goes to `problems` under its dotted path."""

    data: Mapping[Any, Any]
    path: str
    problems: list[Problem]

    def at(self, key: str) -> str:
        """Dotted path of a key of this section; of the section itself for ""."""
        return f"{self.path}.{key}" if self.path and key else self.path or key

    def report(self, key: str, text: str) -> None:
        """Add a problem with one key."""
        self.problems.append(Problem(self.at(key), text))

    def read(
        self, key: str, kind: Callable[[Any], T], default: U, *, required: bool = False, nullable: bool = False
    ) -> T | U:
        """The value of a key as `kind` reads it, or `default` when it is missing or faulty.

        Args:
            key: of this section.
            kind: reader whose ValueError says what is wrong with a value.
            default: also what null stands for in a `nullable` key; in other keys null is a problem.
            required: a missing key is a problem.
            nullable: null is the same as a missing key.
        """
        if key not in self.data or (nullable and self.data[key] is None):
            if required:
                self.report(key, "is missing")
            return default
        if self.data[key] is None:
            self.report(key, "has no value; give one" + ("" if required else " or remove the key"))
            return default
        try:
            return kind(self.data[key])
        except ValueError as error:
            self.report(key, str(error))
            return default

    def refuse_unknown(self, known: Iterable[str], what: str, hint: Callable[[str], str] | None = None) -> None:
        """Add a problem for each key that is not `known`; a `hint` replaces the search for a near key."""
        known = tuple(known)
        for key in self.data:
            if key in known:
                continue
            remedy = (hint(str(key)) if hint else "") or suggestion(str(key), known)
            self.report(str(key), f"unknown {what}{remedy or '; one of ' + ', '.join(known)}")


def show(value: object) -> str:
    """A value as an error message names it: short, on one line, in YAML's words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, str):
        short = value if len(value) <= 60 else value[:57] + "..."
        return json.dumps(short, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int | float):
        return repr(value) if isinstance(value, float) or abs(value) < 10**30 else "a huge number"
    return f"a {type(value).__name__}"


def suggestion(word: str, words: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest of `words`, blind to case, hyphen and underscore; "" when none is near."""
    plain = {_plain(known): known for known in words}
    near = difflib.get_close_matches(_plain(word), plain, n=1)
    return f'; did you mean "{plain[near[0]]}"?' if near else ""


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")


def text(value: object) -> str:
    """A non-empty line of text (or a path object), trimmed. Raises ValueError."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {show(value)}; quote it if it is meant as text")
    value = value.strip()
    if not value:
        raise ValueError("must not be empty")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        raise ValueError("must be one line without control characters")
    return value


def flag(value: object) -> bool:
    """True or false. Raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {show(value)}")
    return value


def number(value: object) -> float:
    """A finite number; neither a truth value nor text is one. Raises ValueError."""
    if isinstance(value, str):
        quoted = isinstance(parse_scalar(value.strip()), int | float)
        raise ValueError(f"must be a number, not the text {show(value)}{'; remove the quotes' if quoted else ''}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {show(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"must be a finite number, not {show(value)}")
    return result


def factor(value: object) -> float:
    """A number that can multiply a tensor, and so is in the range of float32. Raises ValueError."""
    result = number(value)
    if abs(result) > LARGEST:
        raise ValueError(f"must be in the range of float32, up to {LARGEST:g}, not {show(value)}")
    return result


def whole(value: object) -> int:
    """An integer. Raises ValueError."""
    number(value)
    if not isinstance(value, int):
        raise ValueError(f"must be a whole number, not {show(value)}")
    return value


def one_of(choices: Sequence[Any], aliases: Mapping[str, str] | None = None) -> Callable[[Any], Any]:
    """Reader of one of a few values; `aliases` are not accepted, only explained."""

    def kind(value: object) -> Any:
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        known = [str(choice) for choice in choices]
        word = str(value) if isinstance(value, str | int | float) else ""
        meant = (aliases or {}).get(_plain(word))
        remedy = f'; did you mean "{meant}"?' if meant else suggestion(word, known)
        raise ValueError(f"{show(value)} is not one of {', '.join(known)}{remedy}")

    return kind


def texts(value: object) -> tuple[str, ...]:
    """A list of texts. Raises ValueError."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of texts, not {show(value)}; write [...]")
    result = []
    for i, item in enumerate(value):
        try:
            result.append(text(item))
        except ValueError as error:
            raise ValueError(f"item {i} {error}") from error
    return tuple(result)


def typed(hint: Any, limits: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Reader for a type hint: float, int, bool, str, tuple[str, ...], Literal[...], or one of these `| None`.

    Args:
        hint: the resolved type.
        limits: may hold `minimum` and `maximum`, both inclusive, or `choices` and `aliases`: see `one_of`.

    Raises:
        TypeError: a hint of another kind, which is a fault of the method's code and not of the recipe.
    """
    if "choices" in limits:
        return one_of(limits["choices"], limits.get("aliases"))
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        if len(inner) == 1:
            return typed(inner[0], limits)
    if get_origin(hint) is Literal:
        return one_of(get_args(hint))
    readers: dict[Any, Callable[[Any], Any]] = {
        **{float: factor, int: whole, bool: flag, str: text, tuple[str, ...]: texts}
    }
    if hint not in readers:
        raise TypeError(f"an option of type {hint} cannot be written in a recipe")

    def kind(value: object) -> Any:
        result = readers[hint](value)
        low, high = limits.get("minimum"), limits.get("maximum")
        if low is not None and result < low:
            raise ValueError(f"must be at least {low}, not {show(value)}")
        if high is not None and result > high:
            raise ValueError(f"must be at most {high}, not {show(value)}")
        return result

    return kind


def plain_text(value: object) -> str:
    """Any text of bounded length, empty or of several lines too. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {show(value)}")
    TEXT.check(len(value))
    return value


def line(value: object) -> str:
    """Text on one line, as it stands. Raises ValueError."""
    found = plain_text(value)
    if not found:
        raise ValueError("must not be empty")
    if not found.isprintable():
        text(f"-{found}-")  # raises the error; the dashes keep blanks at the ends from being one
    return found


def amount(value: object) -> int:
    """A whole number, not below zero and not beyond 64 bits. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"must be a whole number of at least 0, not {show(value)}")
    return value


def sha256(value: object) -> str:
    """A SHA-256 in lower-case hexadecimal digits. Raises ValueError."""
    if not isinstance(value, str) or not _SHA256(value):
        raise ValueError(f"must be 64 hexadecimal digits, not {show(value)}")
    return value


def commit(value: object) -> str:
    """The full name of a commit on the Hub. Raises ValueError."""
    if not isinstance(value, str) or not _COMMIT(value):
        raise ValueError(f"must be 40 hexadecimal digits, not {show(value)}")
    return value


def hub_id(value: object) -> str:
    """A repository ID by the Hub's grammar: `org/name` or `name`. Raises ValueError."""
    if not isinstance(value, str) or not _HUB_ID(value) or "--" in value or ".." in value or value.endswith(".git"):
        raise ValueError(f"must be a Hub ID org/name, not {show(value)}")
    return value


def hub_model(value: object) -> str:
    """A model on the Hub: `org/name`, or `org/name/folder` for a folder of the repository. Raises ValueError."""
    parts = str(value).split("/", 2)
    hub_id("/".join(parts[:2]) if isinstance(value, str) else value)
    if len(parts) > 2 and ({"@", "+"} & {*safe_path(parts[2])}):
        raise ValueError(f"must be a model org/name or org/name/folder, not {show(value)}")
    return str(value)


def folder_name(value: object) -> str:
    """The name of one folder, which is no path. Raises ValueError."""
    name = line(value)
    if name in (".", "..") or "/" in name or "\\" in name or len(name) > 255:
        raise ValueError(f"must be the name of a folder, not {show(name)}")
    return name


def safe_path(value: object) -> str:
    """The path of a file inside of a repository, and not where git keeps its settings. Raises ValueError."""
    path = line(value)
    if {"", ".", "..", ".git"} & {*path.lower().split("/")} or "\\" in path or len(path) > 1_000:
        raise ValueError(f"must be a path inside of the repository, not {show(path)}")
    return path


_SHA256 = re.compile("[0-9a-f]{64}").fullmatch
_COMMIT = re.compile("[0-9a-f]{40}").fullmatch
_HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}(?<![.-])/)?[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII).fullmatch


def nullable(kind: Kind) -> Kind:
    """Kind of null or a value of another kind."""
    return lambda value: None if value is None else kind(value)


def items(kind: Kind, most: Limit | None = None) -> Kind:
    """Kind of a list, each item of one kind."""

    def check(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list, not {show(value)}")
        if most is not None:
            most.check(len(value))
        for i, item in enumerate(value):
            _within(f"item {i}", kind, item)
        return value

    return check


def table(key: Kind, kind: Kind, most: Limit | None = None) -> Kind:
    """Kind of a mapping from keys of one kind to values of one kind."""

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a mapping, not {show(value)}")
        if most is not None:
            most.check(len(value))
        for name, item in value.items():
            _within(f"the key {show(name)}", key, name)
            _within(name, kind, item)
        return value

    return check


def record(required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, *, strict: bool = True) -> Kind:
    """Kind of a mapping with these keys.

    Args:
        required: keys that are there, with the kinds of their values.
        optional: keys that may be there.
        strict: no other keys may be there.
    """
    known = {**required, **(optional or {})}

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a mapping, not {show(value)}")
        for name in required:
            if name not in value:
                raise ValueError(f"lacks the key {name}")
        for name, item in value.items():
            if name in known:
                _within(name, known[name], item)
            elif strict:
                raise ValueError(f"has the unknown key {show(name)}{suggestion(name, known)}")
        return value

    return check


def _within(place: str, kind: Kind, value: Any) -> None:
    try:
        kind(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
