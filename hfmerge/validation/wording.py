"""How a message names a parameter, or a whole call, to its reader: a user of Python or of the command line.

Users of Python and of the command line read the same errors, warnings and notes. The code of a message names
parameters with `parameter` and calls with `call`. The program that shows messages chooses their spelling with
`spelled`. They are spelled when the message is written; its text is not searched later. So names from elsewhere in
the same text stay unchanged, even if they look like parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Spelling:
    """How Python spells parameters and calls."""

    def parameter(self, name: str, value: object) -> str:
        """See `parameter`."""
        return f"`{_argument(name, value)}`"

    def call(self, verb: str, operands: tuple[object, ...], named: dict[str, object]) -> str:
        """See `call`."""
        arguments = [*map(_literal, operands), *(_argument(name, value) for name, value in named.items())]
        return f"`hfmerge.{verb}({', '.join(arguments)})`"


_spellings = [Spelling()]
"""The last one is in use."""


def parameter(name: str, value: object = None) -> str:
    """A parameter of the public functions or of their options, for a message.

    Args:
        name: as in Python, such as `push_to`.
        value: what to pass for it; None: its name alone. A mapping or a list stands for values that are given one by
            one on a command line.

    Returns:
        `` `overwrite=True` `` for users of Python, `--overwrite` for users of the command line.
    """
    return _spellings[-1].parameter(name, value)


def call(verb: str, *operands: object, **named: object) -> str:
    """A call of a public function, for a message, in backticks.

    Args:
        verb: name of the function, such as `unmerge`.
        operands: what is passed by position.
        named: what is passed by name, see `parameter`.

    Returns:
        `` `hfmerge.unmerge('merged', remove='org/name')` `` for users of Python, `` `hfmerge unmerge merged --remove
        org/name` `` for users of the command line.
    """
    return _spellings[-1].call(verb, operands, named)


def size(count: int) -> str:
    """Bytes in the unit that people read: `12 kB`, `3.4 MB`, `1.25 GB`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


@contextlib.contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Have this process, in all its threads, write messages in another spelling."""
    _spellings.append(spelling)
    try:
        yield
    finally:
        _spellings.remove(spelling)


def _argument(name: str, value: object) -> str:
    return name if value is None else f"{name}={_literal(value)}"


def _literal(value: object) -> str:
    """A value as Python reads it; a path as text."""
    return repr(value) if isinstance(value, bool | int | float | list | dict) else repr(str(value))
