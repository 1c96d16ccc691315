"""Spells the parameters and calls that messages name as flags and commands of the command line."""

from __future__ import annotations

import argparse
import shlex

from hfmerge.validation.wording import Spelling


_OTHERWISE = {"days": "expires"}
"""Parameters that have another name on the command line."""


class Flags(Spelling):
    """Parameters as the flags of a parser's commands."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        """Collect the flags of all commands; what may be given several times is in Python a list of that name."""
        self.known: dict[str, str] = {}
        for action in _actions(parser):
            long = [text for text in action.option_strings if text.startswith("--")]
            if long:
                plural = f"{action.dest}s" if isinstance(action, argparse._AppendAction) else action.dest
                self.known |= {action.dest: long[0], plural: long[0]}
        self.known |= {name: self.known[flag] for name, flag in _OTHERWISE.items()}

    def parameter(self, name: str, value: object) -> str:
        """`--flag`, or `--flag VALUE` for each value; as in Python if there is no such flag."""
        return " ".join(self._words(name, value)) if name in self.known else super().parameter(name, value)

    def call(self, verb: str, operands: tuple[object, ...], named: dict[str, object]) -> str:
        """The command of that name, so quoted that a shell may be given it whatever the values hold."""
        given = [word for one in operands for word in _values(one)]
        flags = [word for name, value in named.items() for word in self._words(name, value)]
        return f"`{shlex.join(['hfmerge', verb.replace('_', '-'), *given, *flags])}`"

    def _words(self, name: str, value: object) -> list[str]:
        flag = self.known[name]
        return [word for one in _values(value) for word in (flag, one)] or [flag]


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All actions of a parser and of the parsers of its commands."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [one for sub in action.choices.values() for one in _actions(sub)]
    return found


def _values(value: object) -> list[str]:
    """What is given to a flag, one by one; nothing for a switch, and where only the flag's name is meant."""
    if value is None or value is True:
        return []
    if isinstance(value, dict):
        return [f"{name}={one}" for name, one in value.items()]
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]
