"""Matches answers with heads by label name: the row of the head for each value of a data set's label column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.errors import HeadError, HfMergeError
from hfmerge.evaluation.suite import Task


@dataclass(frozen=True)
class Answers:
    """The answers of a task's rows.

    Attributes:
        names: label names, in the data set's order.
        values: for each row its number in `names`.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def used(self) -> list[str]:
        """The names that some row has."""
        return [self.names[i] for i in sorted(set(self.values))]


def named_answers(task: Task, feature: Any, values: Sequence[Any], where: str) -> Answers:
    """The answers of rows whose labels have names: in the data, in its description, or in the suite.

    Args:
        feature: of the label column, as `datasets` describes it.
        values: of that column.

    Raises:
        HfMergeError: a row without an answer, or numbers without names.
    """
    listed = [str(name) for name in getattr(feature, "names", None) or ()]
    found = []
    for i, value in enumerate(values):
        if value is None or value == -1:
            raise HfMergeError(f"{where}: row {i} has no label ({task.label} is {value}); use a split with answers.")
        own = listed[value] if listed and not isinstance(value, str) else str(value)
        if task.labels is not None:
            if own not in task.labels and str(value) not in task.labels:
                known = ", ".join(list(task.labels)[:8])
                raise HfMergeError(f"{where}: row {i} has the label {own}, which `labels` does not list ({known}).")
            own = task.labels.get(own) or task.labels[str(value)]
        elif not listed and not isinstance(value, str):
            raise HfMergeError(
                f"{where}: {task.label} holds numbers without names; name them under `labels` in the suite, or say "
                "`by_index: true` if they are the head's rows."
            )
        found.append(own)
    names = tuple(dict.fromkeys(task.labels.values()) if task.labels else listed or sorted(set(found)))
    numbers = {name: i for i, name in enumerate(names)}
    return Answers(names, tuple(numbers[name] for name in found))


def numbered_answers(task: Task, values: Sequence[Any], names: Sequence[str], where: str) -> Answers:
    """The answers of rows whose labels are numbers of `names`, or those names.

    Raises:
        HfMergeError: outside of the names.
    """
    known = {name: i for i, name in enumerate(names)}
    found = []
    for i, value in enumerate(values):
        number = known.get(value, -1) if isinstance(value, str) else value
        if not isinstance(number, int) or not 0 <= number < len(names):
            what = "has no label" if value is None or value == -1 else "has a label outside of the range"
            raise HfMergeError(f"{where}: row {i} {what} ({task.label} is {value!r}; there are {len(names)} labels).")
        found.append(int(number))
    return Answers(tuple(names), tuple(found))


def numbers(task: Task, values: Sequence[Any], where: str) -> list[float]:
    """Answers of a regression task.

    Raises:
        HfMergeError: a row without a number.
    """
    result = []
    for i, value in enumerate(values):
        if isinstance(value, str) or value is None:
            raise HfMergeError(f"{where}: row {i}: {task.label} is {value!r}; {task.metric} needs numbers.")
        result.append(float(value))
    return result


def head_rows(names: Sequence[str], head: Sequence[str], where: str, owner: str) -> dict[str, int]:
    """Label name of the data -> row of the head: equal names, else names equal but for case, `_`, `-` and spaces.

    Raises:
        HeadError: a name that the head does not have, or has twice.
    """
    exact = {name: i for i, name in enumerate(head)}
    plain: dict[str, list[int]] = {}
    for i, name in enumerate(head):
        plain.setdefault(_plain(name), []).append(i)
    result = {}
    for name in names:
        near = [exact[name]] if name in exact else plain.get(_plain(name), [])
        if len(near) != 1:
            shown = f"{', '.join(list(head)[:8])}{', ...' if len(head) > 8 else ''}"
            remedy = "name them as the head does under `labels` in the suite"
            if all(re.fullmatch(r"LABEL_\d+", label) for label in head):
                remedy = "list LABEL_0, ... in the data's order under `labels`, or say `by_index: true`"
            raise HeadError(f"{where}: no label {name!r} in the head of {owner}, which has {shown}; {remedy}.")
        result[name] = near[0]
    return result


def fits(names: Sequence[str], head: Sequence[str]) -> bool:
    """Whether a head has all these label names."""
    return {_plain(name) for name in names} <= {_plain(name) for name in head}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())
