"""The merge history a repository claims to have, drawn: which step took which model in, and which let it go.

The files of `merge_history/` were written by whoever wrote the repository. Nothing here believes or checks them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfmerge.hubserver.gitstore import GitStore
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.pages.reading import read_text


FOLDER = "merge_history"
_FILE = re.compile(rf"{FOLDER}/([0-9]{{1,9}})\.json", re.ASCII)
_MOST_STEPS = 60
_MOST_LANES = 80
_MOST_BYTES = 1 << 20
_MOST_TEXT = 120
_ROW, _COLUMN, _LEFT, _TOP = 26, 54, 270, 46


@dataclass(frozen=True)
class Step:
    """One file of the history: what it says was done, and which models it says are in the merge afterwards."""

    number: int
    file: str
    action: str
    subjects: Sequence[str]
    how: str
    base: str
    models: Sequence[str]
    joined: Sequence[str] = ()
    left: Sequence[str] = ()


@dataclass(frozen=True)
class Bar:
    """A model from the step it joined to the one it left, in the picture's units; `end` is None if it is still in."""

    start: int
    stop: int
    end: int | None


@dataclass(frozen=True)
class Lane:
    """One model of the picture."""

    name: str
    short: str
    y: int
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Graph:
    """Everything the picture needs, in its own units."""

    width: int
    height: int
    left: int
    columns: Sequence[tuple[int, Step]]
    lanes: Sequence[Lane]


@dataclass(frozen=True)
class History:
    """The steps, the newest last; `earlier` counts those that are not shown, `faults` names files nobody can read."""

    steps: Sequence[Step]
    earlier: int
    faults: Sequence[str]
    graph: Graph | None


def read_history(hub: Hub, git: GitStore, commit: str) -> History | None:
    """The history at a commit, None if there is no such folder."""
    found = {}
    for entry in git.entries(commit, FOLDER):
        if (match := _FILE.fullmatch(entry.path)) and not entry.is_folder:
            found[int(match[1])] = entry
    if not found:
        return None
    steps: list[Step] = []
    faults = []
    shown = sorted(found)[-_MOST_STEPS - 1 :]
    for number in shown:
        step = _step(number, found[number].path, read_text(hub, git, found[number], _MOST_BYTES))
        if step is None:
            faults.append(found[number].path)
        else:
            steps.append(step)
    # One more was read than is shown: it says what was in the merge before.
    steps = [_compared(steps[at - 1] if at else None, step) for at, step in enumerate(steps)][-_MOST_STEPS:]
    return History(steps, len(found) - len(steps) - len(faults), faults, _graph(steps) if steps else None)


def _step(number: int, file: str, text: str | None) -> Step | None:
    try:
        raw = json.loads(text or "")
        action, materials = raw["action"], raw["materials"]
        models, subjects = materials["models"], action["models"]
        if not isinstance(models, list) or not isinstance(subjects, list):
            return None
        return Step(
            *(number, file, _text(action["type"]), [_text(one) for one in subjects[:_MOST_LANES]]),
            how=_text(action["how"]),
            base=_name(materials["base"]),
            models=[_name(model) for model in models[:_MOST_LANES]],
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def _name(material: Mapping[str, Any]) -> str:
    pin = material.get("commit") or material.get("digest") or ""
    return _text(material["name"]) + (f"@{pin[:8]}" if isinstance(pin, str) and pin else "")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value if len(value) <= _MOST_TEXT else value[: _MOST_TEXT - 1] + "…"


def _compared(before: Step | None, step: Step) -> Step:
    known = before.models if before is not None else ()
    joined = [name for name in dict.fromkeys(step.models) if name not in known]
    left = [name for name in dict.fromkeys(known) if name not in step.models]
    return Step(
        *(step.number, step.file, step.action, step.subjects, step.how, step.base, step.models),
        joined=joined,
        left=left,
    )


def _graph(steps: Sequence[Step]) -> Graph:
    xs = [_LEFT + _COLUMN * at for at in range(len(steps))]
    names = list(dict.fromkeys(name for step in steps for name in step.models))[:_MOST_LANES]
    lanes = []
    for at, name in enumerate(names):
        bars, start = [], None
        for x, step in zip(xs, steps, strict=True):
            if name in step.models:
                start = x if start is None else start
            elif start is not None:
                bars.append(Bar(start, x, x))
                start = None
        if start is not None:
            bars.append(Bar(start, xs[-1] + _COLUMN // 2, None))
        lanes.append(Lane(name, _shortened(name), _TOP + _ROW * at, bars))
    height = _TOP + _ROW * max(1, len(names))
    return Graph(xs[-1] + _COLUMN, height, _LEFT, list(zip(xs, steps, strict=True)), lanes)


def _shortened(name: str) -> str:
    return name if len(name) <= 36 else f"{name[:20]}…{name[-15:]}"
