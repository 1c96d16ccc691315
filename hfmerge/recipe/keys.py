"""Keys of a recipe: how a field of a dataclass declares a key, and how a section of keys is read.

A key is a field of a frozen dataclass: `Recipe`, `Learning`, `ReplaySettings`, or a method. The reader, the flag of
the command line, the ledger's settings and the reference page follow from the field.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from hfmerge.validation.strict_yaml import parse_scalar
from hfmerge.validation.values import Kind, Section, nullable, typed


class Declared(TypedDict, total=False):
    """Metadata of the field that is a key; all may be left out.

    Attributes:
        minimum, maximum: of a number, inclusive.
        choices: the values that it may have; `aliases`: words for them that are explained, not accepted.
        kind: reads a value, where type, limits and choices do not say enough; ValueError says what is wrong with it.
        help: of its flag, "" for a flag without; it is the meaning on the reference page too, unless the docstring of
            the class says more. A key of a recipe's top without `help` has no flag made for it.
        metavar: of its flag.
        recorded: whether the ledger's settings hold it: "always", or "set" where it differs from its default, which
            is the only choice for a new key, since older ledgers lack it.
        stored: kind of its value in a ledger, which returns what the recipe holds, where it is another than `kind`.
        result: the bytes of the merged weights depend on it.
        foreign: names that other tools give it, for suggestions.
        unwritten: the field is no key, since no file says it.
    """

    minimum: float
    maximum: float
    choices: tuple[str, ...]
    aliases: dict[str, str]
    kind: Kind
    help: str
    metavar: str
    recorded: Literal["always", "set"]
    stored: Kind
    result: bool
    foreign: tuple[str, ...]
    unwritten: bool


@dataclass(frozen=True)
class RecipeKey:
    """A key, with its type and default.

    Attributes:
        hint: the field's resolved type.
        default: `dataclasses.MISSING` where a value is required; null in a file is the same as a default of None.
        declared: see `Declared`.
    """

    name: str
    hint: Any
    default: Any
    declared: Declared

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def kind(self) -> Kind:
        """Reads a value from a recipe. Raises TypeError for a section, which has a reader of its own."""
        return self.declared.get("kind") or typed(self.hint, self.declared)

    @property
    def stored(self) -> Kind:
        """Reads a value from a ledger."""
        return self.declared.get("stored") or (nullable(self.kind) if self.default is None else self.kind)

    @property
    def flag(self) -> str | None:
        """The command line's flag, or None."""
        return f"--{self.name.replace('_', '-')}" if "help" in self.declared else None

    @property
    def plain_type(self) -> Any:
        """The type without None."""
        if get_origin(self.hint) not in (Union, types.UnionType):
            return self.hint
        inner = [part for part in get_args(self.hint) if part is not type(None)]
        return inner[0] if len(inner) == 1 else self.hint

    def from_flag(self, value: Any) -> Any:
        """What a flag's text would be unquoted in YAML; keys of texts and truth values take it as it is."""
        as_it_is = not isinstance(value, str) or self.plain_type in (bool, str, tuple[str, ...])
        return value if as_it_is else parse_scalar(value)


def keys_of(section: type) -> tuple[RecipeKey, ...]:
    """The keys of a section in their order, from its dataclass."""
    return _keys_of(section)


@lru_cache(maxsize=256)
def _keys_of(section: type) -> tuple[RecipeKey, ...]:
    hints = get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        if field.metadata.get("unwritten"):
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        found.append(RecipeKey(field.name, hints[field.name], default, Declared(**field.metadata)))
    return tuple(found)


def read_key(section: Section, key: RecipeKey) -> Any:
    """Its value, or its default if it is missing or faulty (None if it is required): see `Section.read`."""
    default = None if key.required else key.default
    return section.read(key.name, key.kind, default, required=key.required, nullable=key.default is None)


def read_keys(section: Section, keys: Iterable[RecipeKey]) -> dict[str, Any]:
    """The values of these keys by name; what is wrong goes to the section's problems."""
    return {key.name: read_key(section, key) for key in keys}


def jsonable(value: Any) -> Any:
    """A key's value as JSON holds it."""
    if isinstance(value, tuple):
        return [jsonable(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
