"""Regular expressions of strangers, matched without backtracking: the work grows with pattern and text, no faster.

An adapter's configuration gives ranks and alphas by regular expressions on module names, and `re` may take for ever on
one of thirty characters. Here an expression becomes a machine of states, of which all that are possible are followed
at once, and what follows a set of states is remembered. Look-around and references to groups, which such a machine
cannot have, are refused; what is accepted matches exactly what `re` matches.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hfmerge.validation.limits import PATTERN, PATTERN_STATES, PATTERN_STEPS


_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_BEGIN = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_END = ("AT_END", "AT_END_STRING")
_CATEGORIES = {
    f"CATEGORY_{sign}{name}": re.compile(text)
    for name, small in (("DIGIT", "d"), ("SPACE", "s"), ("WORD", "w"))
    for sign, text in (("", f"\\{small}"), ("NOT_", f"\\{small.upper()}"))
}
Test = Callable[[str], bool]


class _Work:
    """What has been done for the patterns of one configuration, all together."""

    def __init__(self) -> None:
        self._steps = 0

    def add(self, steps: int) -> None:
        """Count steps. Raises ValueError: beyond the limit."""
        self._steps += steps
        PATTERN_STEPS.check(self._steps)


class _Machine:
    """The states of one expression: each reads a character, goes on to others, or holds only at an end of the text."""

    def __init__(self, expression: str, work: _Work):
        self._work = work
        self._reads: dict[int, tuple[Test, int]] = {}
        self._jumps: dict[int, tuple[int, ...]] = {}
        self._places: dict[int, tuple[bool, int]] = {}  # whether it is the beginning, and the next state
        self._made = 1  # state 0 is the end
        self._known: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}
        try:
            tree = _parser.parse(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("sets flags, which no known adapter does")
        self._start = self._sequence(tree, 0)

    def _new(self) -> int:
        self._made += 1
        PATTERN_STATES.check(self._made)
        return self._made - 1

    def _sequence(self, tree: Iterable[tuple[Any, Any]], after: int) -> int:
        self._new()  # so that what is empty counts too, however often it is repeated
        for code, value in reversed(list(tree)):
            after = self._part(str(code), value, after)
        return after

    def _part(self, code: str, value: Any, after: int) -> int:
        """The state at which one part begins, if what follows it begins at `after`."""
        if code in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            state = self._new()
            self._reads[state] = _test(code, value), after
            return state
        if code == "BRANCH":
            return self._fork([self._sequence(tree, after) for tree in value[1]])
        if code == "SUBPATTERN" and not value[1] and not value[2]:
            return self._sequence(value[3], after)
        if code == "AT" and str(value) in (*_BEGIN, *_END):
            state = self._new()
            self._places[state] = str(value) in _BEGIN, after
            return state
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, tree = value
            return self._repeated(least, most, tree, after)
        raise ValueError(f"uses {code.lower().replace('_', ' ')}, which is not matched here")

    def _repeated(self, least: int, most: int, tree: Any, after: int) -> int:
        PATTERN_STATES.check(least)
        if most == _parser.MAXREPEAT:
            loop = self._fork([after])
            self._jumps[loop] = (self._sequence(tree, loop), after)
            start = loop
        else:
            PATTERN_STATES.check(most)
            start = after
            for _ in range(most - least):
                start = self._fork([self._sequence(tree, start), after])
        for _ in range(least):
            start = self._sequence(tree, start)
        return start

    def _fork(self, targets: Sequence[int]) -> int:
        state = self._new()
        self._jumps[state] = tuple(targets)
        return state

    def _reached(self, states: Iterable[int], *, first: bool, last: bool) -> frozenset[int]:
        """All states that are possible without reading on."""
        found, rest = set[int](), list(states)
        while rest:
            state = rest.pop()
            if state in found:
                continue
            self._work.add(1)
            found.add(state)
            rest += self._jumps.get(state, ())
            if state in self._places:
                beginning, after = self._places[state]
                if first if beginning else last:
                    rest.append(after)
        return frozenset(found)

    def matches(self, text: str) -> bool:
        """Whether the expression fits the text from its beginning to its end."""
        self._work.add(len(text))
        states = self._reached([self._start], first=True, last=not text)
        for i, character in enumerate(text, 1):
            key = (states, character, i == len(text))
            if key not in self._known:
                self._work.add(len(states))
                tests = (self._reads[state] for state in states if state in self._reads)
                after = [target for test, target in tests if test(character)]
                self._known[key] = self._reached(after, first=False, last=i == len(text))
            states = self._known[key]
        return 0 in states


def _test(code: str, value: Any) -> Test:
    if code == "ANY":
        return lambda character: character != "\n"
    if code == "LITERAL":
        return lambda character: ord(character) == value
    if code == "NOT_LITERAL":
        return lambda character: ord(character) != value
    negated = bool(value) and str(value[0][0]) == "NEGATE"
    tests = [_member(str(kind), one) for kind, one in value[negated:]]
    return lambda character: any(test(character) for test in tests) != negated


def _member(kind: str, value: Any) -> Test:
    if kind == "RANGE":
        return lambda character: value[0] <= ord(character) <= value[1]
    if kind == "CATEGORY":
        category = _CATEGORIES[str(value)]
        return lambda character: category.fullmatch(character) is not None
    return lambda character: ord(character) == value


class Patterns:
    """The patterns of one adapter's configuration: each is read once, and the work of all together has a limit."""

    def __init__(self) -> None:
        self._work = _Work()
        self._tests: dict[str, Test] = {}

    def fits(self, pattern: str, module: str) -> bool:
        """Whether a pattern means a module, as PEFT says: the whole path, or its end.

        Raises:
            ValueError: the pattern is not a regular expression, cannot be matched here, or is beyond a limit.
        """
        return self._fits(rf"(.*\.)?({pattern})$", pattern, module)

    def is_all_of(self, pattern: str, module: str) -> bool:
        """Whether a pattern means the whole path of a module, as a text under `target_modules` does.

        Raises:
            ValueError: see `fits`.
        """
        return self._fits(rf"({pattern})$", pattern, module)

    def _fits(self, expression: str, pattern: str, module: str) -> bool:
        if expression not in self._tests:
            self._tests[expression] = _reader(expression, pattern, self._work)
        self._work.add(1)
        return self._tests[expression](module)


def _reader(expression: str, pattern: str, work: _Work) -> Test:
    PATTERN.check(len(pattern))
    if re.fullmatch(r"\^?[\w-]+(\.[\w-]+)*", pattern):  # names, where a dot is any character
        known = re.compile(expression)
        return lambda module: known.match(module) is not None
    return _Machine(expression, work).matches
