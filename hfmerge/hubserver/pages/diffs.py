"""What a commit changed, line by line, as far as a page can show it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dulwich.diff_tree import tree_changes

from hfmerge.hubserver.gitstore import GitStore, parse_pointer
from hfmerge.hubserver.pages.rendering import human_size


MOST_FILES = 100
_MOST_BYTES = 256 << 10
_MOST_LINES = 3000
# Lines of one side between the first and the last difference: comparing them takes the product of both.
_MOST_COMPARED = 1000
_AROUND = 3


@dataclass(frozen=True)
class FileDiff:
    """One file: `kind` is `added`, `deleted` or `changed`; lines come with their sign, a note stands for them."""

    path: str
    kind: str
    note: str
    lines: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Diff:
    """The files of a change; `more` says that there are others."""

    files: Sequence[FileDiff]
    more: bool


def diff_commits(git: GitStore, old: str | None, new: str) -> Diff:
    """What is different in `new`; everything if there is no older commit."""
    before = None if old is None else git.tree_id(old)
    changes = list(islice(tree_changes(git.objects, before, git.tree_id(new)), MOST_FILES + 1))
    files, left = [], _MOST_LINES
    for change in changes[:MOST_FILES]:
        gone = change.old.sha if change.old is not None else None
        come = change.new.sha if change.new is not None else None
        place = change.new if change.new is not None and change.new.path else change.old
        path = (place.path if place is not None else b"").decode("utf-8", "replace")
        kind = "added" if gone is None else "deleted" if come is None else "changed"
        note, lines = _compared(git, gone, come, left) if left > 0 else ("not shown here, after so many lines", [])
        left -= len(lines)
        files.append(FileDiff(path, kind, note, lines))
    return Diff(files, len(changes) > MOST_FILES)


def _compared(git: GitStore, old: bytes | None, new: bytes | None, left: int) -> tuple[str, list[tuple[str, str]]]:
    sides = [b"" if oid is None else git.read(oid.decode()) for oid in (old, new)]
    pointers = [parse_pointer(data) for data in sides]
    if any(pointers):
        sizes = [human_size(p.size if p else len(d)) for p, d in zip(pointers, sides, strict=True)]
        sizes = [size for size, oid in zip(sizes, (old, new), strict=True) if oid is not None]
        return f"large file, {' → '.join(sizes)}", []
    if max(map(len, sides)) > _MOST_BYTES:
        return "too long to be compared here", []
    try:
        one, other = (data.decode("utf-8").splitlines() for data in sides)
    except UnicodeDecodeError:
        return "not a text", []
    if b"\0" in sides[0] + sides[1]:
        return "not a text", []
    lines = list(islice(_lines(one, other), left + 1))
    if len(lines) > left:
        return "the rest is too long to be shown here", lines[:left]
    return "" if lines else "other line ends, or empty", lines


def _lines(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Signs and lines: only what differs and three lines around it."""
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    start = max(0, head - _AROUND)
    ends = [len(lines) - max(0, tail - _AROUND) for lines in (old, new)]
    one, other = old[start : ends[0]], new[start : ends[1]]
    if len(one) == len(other) == 0 or list(old) == list(new):
        return
    if max(len(one), len(other)) > _MOST_COMPARED:
        yield "@", f"lines {start + 1} to {ends[1]}, in whole"
        yield from (("-", line) for line in one)
        yield from (("+", line) for line in other)
        return
    for group in difflib.SequenceMatcher(None, one, other).get_grouped_opcodes(_AROUND):
        yield "@", f"line {start + group[0][3] + 1}"
        for tag, a, b, c, d in group:
            if tag == "equal":
                yield from ((" ", line) for line in one[a:b])
            else:
                yield from (("-", line) for line in one[a:b])
                yield from (("+", line) for line in other[c:d])
