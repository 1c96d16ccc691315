"""Frozen dataclasses as JSON values and back, by their type hints; each field is checked as it is read.

A dataclass is an object with all its fields, a mapping by text is an object, a tuple is a list, a path is its text.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hfmerge.errors import HfMergeError
from hfmerge.validation.values import one_of, show, suggestion


Special = Mapping[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]]
"""Class -> how its instances, those of its subclasses too, become JSON values and come back (raising ValueError)."""
_FORMS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text"),
    type(None): ((type(None),), "null"),
    Path: ((str,), "text"),
    tuple: ((list,), "a list"),
}
"""What a type is written as, and how an error calls that; all others are objects."""
_PLAIN = (str, int, float, bool, type(None))


def to_json_value(value: Any, special: Special) -> Any:
    """A dataclass, or anything that its fields may hold, as JSON values. Raises TypeError for anything else."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        return [to_json_value(one, special) for one in value]
    for kind, (write, _) in special.items():
        if isinstance(value, kind):
            return write(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_json_value(getattr(value, name), special) for name in _hints(type(value))}
    if isinstance(value, Mapping):
        return {key: to_json_value(one, special) for key, one in value.items()}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no plain data")


def from_json_value(value: Any, hint: Any, special: Special) -> Any:
    """What `to_json_value` was given, of the type that the hint says. Raises ValueError, with the place in it."""
    if hint is Any:
        return value
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        fitting = [one for one in inner if type(value) in _form(one)[0]]
        if not fitting:
            raise ValueError(f"must be {' or '.join(_form(one)[1] for one in inner)}, not {show(value)}")
        return from_json_value(value, fitting[0], special)
    if kind is Literal:
        return one_of(inner)(value)
    accepted, called = _form(hint)
    if type(value) not in accepted:
        raise ValueError(f"must be {called}, not {show(value)}")
    if kind in special:
        return special[kind][1](value)
    if kind is tuple:
        if inner[-1] is not ... and len(value) != len(inner):
            raise ValueError(f"must have {len(inner)} items, not {len(value)}")
        hints = inner if inner[-1] is not ... else inner[:1] * len(value)
        return tuple(_at(i, *pair, special) for i, pair in enumerate(zip(value, hints, strict=True)))
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, special)
    if isinstance(value, dict):
        return {key: _at(key, one, inner[1], special) for key, one in value.items()}
    return Path(value) if kind is Path else value


def _dataclass(value: Mapping[str, Any], kind: Any, special: Special) -> Any:
    hints = _hints(kind)
    for name in value:
        if name not in hints:
            raise ValueError(f"has the unknown field {show(name)}{suggestion(name, hints)}")
    for name in hints:
        if name not in value:
            raise ValueError(f"lacks the field {name}")
    fields = {name: _at(name, value[name], hint, special) for name, hint in hints.items()}
    try:
        return kind(**fields)
    except HfMergeError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _at(place: str | int, value: Any, hint: Any, special: Special) -> Any:
    try:
        return from_json_value(value, hint, special)
    except ValueError as error:
        where = f"item {place}" if isinstance(place, int) else place if place.isidentifier() else show(place)
        raise ValueError(f"{where}: {error}") from error


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    """The fields of a dataclass and what they hold."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _form(hint: Any) -> tuple[tuple[type, ...], str]:
    return _FORMS.get(get_origin(hint) or hint, ((dict,), "a mapping"))
