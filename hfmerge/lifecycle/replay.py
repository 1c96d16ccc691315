"""A replay: merges the sources of a merge again, and compares the files and the whole ledger entry.

`record.entry_of` rebuilds the entry, as it would record a first merge of these sources. Every field is compared,
except those in `NOT_REBUILT`; a field that a later version adds is compared too. A replay takes weights, options and
settings from the ledger. If somebody changed them there, the replay gives other bytes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hfmerge.engine.environment import TOLERANCE, excuses, far_apart
from hfmerge.engine.executor import Outcome, run
from hfmerge.engine.options import RunOptions
from hfmerge.engine.plan import Plan, folder_of
from hfmerge.errors import HfMergeError
from hfmerge.hub.download import fetch
from hfmerge.ledger.entry import Entry, Material
from hfmerge.ledger.repository import Merged
from hfmerge.lifecycle.changes import first_merge, plan_replay
from hfmerge.lifecycle.gap import gap_of
from hfmerge.lifecycle.record import entry_of


Verdict = Literal["ok", "approximate", "failed"]
"""It holds; it holds within the tolerance of other arithmetic; it does not hold."""
Where = tuple[str | int, ...]
"""The place of a value in an entry: keys, and numbers of list items."""
ANY = "*"
_CHAIN = "the place in the chain, which is checked by itself"
_COPIED = "a copy is packed once and taken over by later steps; `verify` compares its file with this digest"
_STREAMED = "what that run streamed and could not compare with its digest; a replay reads and compares whole files"
_ALLOWED = "what the person who ran it allowed; a replay asks the person who runs it now"
NOT_REBUILT: Mapping[Where, str] = {
    ("step",): _CHAIN,
    ("parent",): _CHAIN,
    ("action",): "what was asked of the step before; the result is a function of the rest of the entry",
    ("materials", "base", "kept"): _COPIED,
    ("materials", "models", ANY, "kept"): _COPIED,
    ("materials", "base", "unverified"): _STREAMED,
    ("materials", "models", ANY, "unverified"): _STREAMED,
    ("materials", "models", ANY, "differing"): "what small files said that no weight depends on",
    ("settings", "card", "template_file"): "where small files hold the template, which no weight depends on",
    ("settings", "allow_pickle"): _ALLOWED,
    ("settings", "trust_remote_code"): _ALLOWED,
    ("byproducts", "learned"): "how the weights were found; a replay takes them as they are",
    ("environment",): "where it was made; `environment.excuses` says what of it counts",
}
"""What of an entry does not follow from its sources and its recipe, and why it need not."""
ABSENT = object()
"""In the place of a value that an entry does not have."""
SHARES = ("deviation", "gap", "gap_bound")
"""Scalars that are relative to a change already, and may be zero."""
_SHOWN = 60
"""Letters of a value in a message."""


@dataclass
class _Found:
    """What differs.

    Attributes:
        wrong: what nothing explains.
        alike: weight files that other arithmetic explains.
        states: models after which a kept state has other bytes, where other arithmetic may be the reason. Factors of
            equal matrices may differ as a whole, so no bound tells.
    """

    wrong: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    @property
    def told(self) -> str:
        """What is not there byte for byte."""
        after = ", ".join(map(str, self.states))
        weights = f"{', '.join(self.alike)} within {TOLERANCE:g} of the change but with other bytes"
        states = f"the kept states after models {after} have other bytes, and no bound tells whether that is right"
        return "; ".join([*([weights] if self.alike else []), *([states] if self.states else [])])


def replay(merged: Merged, device: str | None = None) -> tuple[Verdict, list[str]]:
    """Merge again from the sources alone and compare files and entry.

    Bytes and numbers have to agree where the arithmetic is the ledger's. Elsewhere weights may differ by what other
    arithmetic explains, within bounds reckoned from this run, which is the verdict "approximate".

    Args:
        device: where it computes, see `RunOptions.device`.

    Returns:
        The verdict and one line on it; of a failure one for each thing that differs.
    """
    last = merged.last
    try:
        plan = _plan(merged)
        with tempfile.TemporaryDirectory(prefix="hfmerge-replay-") as name:
            folder = Path(name)
            outcome = run(plan, folder, options=RunOptions(device=device))
            made = _beside(last, entry_of(first_merge(plan), outcome, None, [], _gap(merged, plan, outcome, folder)))
            reasons = excuses(last.environment, made.environment)
            differences = _compared(merged, made, folder, _bounds(plan, outcome), explained=bool(reasons))
    except HfMergeError as error:
        return "failed", [str(error)]
    files, sources = f"the replay made {len(last.products)} files", f"from {len(last.models)} sources"
    told = "; ".join(reasons)
    if differences.wrong:
        return "failed", [f"{text} ({told})" if told else text for text in differences.wrong]
    if differences.alike or differences.states:
        return "approximate", [f"{files} {sources}: {differences.told} ({told})"]
    return "ok", [f"{files} with the same bytes {sources}, and {last.file} with the same fields"]


def _plan(merged: Merged) -> Plan:
    """The plan of a replay. Its run also writes the states that the ledger lists."""
    plan, last = plan_replay(merged), merged.last
    if not plan.method.is_fold or plan.recipe.learn is not None:
        return plan
    listed = {state.count for state in last.states} & {*range(1, len(last.models) + 1)}
    return replace(plan, keep=tuple(sorted(listed | {*plan.keep})) if listed else plan.keep)


def _gap(merged: Merged, plan: Plan, outcome: Outcome, folder: Path) -> dict[str, float]:
    """The gap of a subtraction, measured if the ledger says that it was."""
    if not plan.subtracted:
        return {}
    exact = plan_replay(merged, never=True) if merged.last.scalars.gap is not None else None
    return gap_of(plan, outcome, folder, exact)


def _beside(last: Entry, made: Entry) -> Entry:
    """The rebuilt entry in a form that can be compared.

    Folders get the names that they had when they were merged: only their digests identify them. States that the ledger
    does not list go: it need not keep any.
    """

    def named(one: Material, said: Material) -> Material:
        moved = one.commit is None and said.commit is None
        pins = [text.rpartition("@")[2] if text is not None else None for text in (one.beneath, said.beneath)]
        same = pins[0] == pins[1] and str(pins[0]).startswith("sha256:")
        return replace(one, name=said.name if moved else one.name, beneath=said.beneath if same else one.beneath)

    pairs = zip(made.models, last.models, strict=True)
    listed = {state.count for state in last.states}
    return replace(
        made,
        base=named(made.base, last.base),
        models=tuple(named(one, said) for one, said in pairs),
        states=tuple(state for state in made.states if state.count in listed),
    )


def _bounds(plan: Plan, outcome: Outcome) -> dict[str, dict[str, float]]:
    """Weight file -> tensor -> root mean square of the tensor's change; without the tensors copied from the base."""
    found: dict[str, dict[str, float]] = {}
    for param in plan.params:
        change = outcome.changes.get(param.owner or param.key)
        changes = found.setdefault(param.file, {})
        if change is not None:
            changes[param.key.removeprefix(folder_of(param.file))] = change
    return found


def _compared(
    merged: Merged, made: Entry, folder: Path, bounds: Mapping[str, Mapping[str, float]], *, explained: bool
) -> _Found:
    """Every field of the ledger's last entry beside the rebuilt one's.

    Args:
        folder: holds what was made.
        bounds: see `_bounds`.
        explained: the arithmetic differs, so that weights and numbers may.
    """
    found = _Found()
    for path, ours, theirs in _apart(json.loads(merged.last.to_bytes()), json.loads(made.to_bytes())):
        if path[0] == "products" and len(path) == 2:
            name = str(path[1])
            reason = _why_different(merged, folder, name, bounds.get(name) if explained else None)
            if reason is None:
                found.alike.append(name)
            else:
                found.wrong.append(f"the replay gives {name} other bytes{reason}")
        elif explained and path[:2] == ("byproducts", "states") and path[-1] == "sha256":
            found.states.append(made.states[int(path[2])].count)
        elif not (explained and _near(str(path[-1]), ours, theirs)):
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
            found.wrong.append(f"{where} is {_shown(ours)} in {merged.last.file}, {_shown(theirs)} in the replay")
    return found


def _apart(ours: Any, theirs: Any, path: Where = ()) -> Iterator[tuple[Where, Any, Any]]:
    """The places where two entries differ, and both values; places in `NOT_REBUILT` are left out."""
    if any(_matches(path, pattern) for pattern in NOT_REBUILT):
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from _apart(ours.get(key, ABSENT), theirs.get(key, ABSENT), (*path, key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _apart(one, other, (*path, i))
    elif path[-1:] == ("deviation",) and ours is ABSENT:
        return  # a run that continued from the last state read no model, so it measured no deviation
    # as text, so that True is not 1, and NaN is NaN
    elif ours is ABSENT or theirs is ABSENT or json.dumps(ours) != json.dumps(theirs):
        yield path, ours, theirs


def _matches(path: Where, pattern: Where) -> bool:
    return len(path) == len(pattern) and all(own in (ANY, part) for own, part in zip(pattern, path, strict=True))


def _near(name: str, claimed: Any, made: Any) -> bool:
    """Whether other arithmetic explains a number."""
    if not (isinstance(claimed, float) and isinstance(made, float) and math.isfinite(made)):
        return False
    bound = TOLERANCE if name in SHARES else TOLERANCE * abs(made)
    return name in (*SHARES, "squared_norm", "scale", "merged_norm") and abs(claimed - made) <= bound


def _why_different(merged: Merged, folder: Path, name: str, bounds: Mapping[str, float] | None) -> str | None:
    """What is wrong with a product whose digest differs; None if other arithmetic explains it.

    Args:
        bounds: see `far_apart`; None: only the same bytes will do.
    """
    if not (folder / name).is_file():
        return ", or not at all"
    if bounds is None or name not in merged.last.products or name not in merged.snapshot.files:
        return ""
    reason = far_apart(fetch(merged.snapshot, name), folder / name, bounds)
    return None if reason is None else f": {reason}"


def _shown(value: Any) -> str:
    """A value on one line, in plain letters, shortened."""
    text = "nothing" if value is ABSENT else json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
