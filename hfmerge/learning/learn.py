"""Turns a plan with a `learn` section into the same plan with learned weights; writes rows and Fisher information."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.engine.device import CPU, accelerator, name_of, place_for, repeatable
from hfmerge.engine.model_match import some
from hfmerge.engine.plan import KeptState, Plan, state_file
from hfmerge.engine.ranks import Ranks
from hfmerge.errors import HfMergeError
from hfmerge.evaluation.models import Subject, kind_of, open_subject
from hfmerge.evaluation.suite import load_suite
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hub.progress_bar import progress_bar
from hfmerge.learning.fisher import FISHER_ROWS, fisher, load_fisher, save_fisher
from hfmerge.learning.labelled import labelled_rows, task_of
from hfmerge.learning.optimise import Anchor, Optimum, memory_for, optimise
from hfmerge.learning.progress import Progress
from hfmerge.learning.replay.dataset import Replay, load_replay, save_replay
from hfmerge.learning.replay.generate import generate
from hfmerge.learning.space import Space
from hfmerge.learning.student import Student, check_tokens, references, source_reference, students
from hfmerge.ledger.learned import LearnedWeights
from hfmerge.ledger.repository import Merged, state_path
from hfmerge.recipe.learning import HELD_BYTES, Learning
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from torch import Tensor

DIGITS = 4
"""Decimal digits of learned weights: differences in the last bits between machines do not reach the ledger."""
PRIVACY = "replay rows are made from a model and may reflect the data it was trained on"


@dataclass(frozen=True, eq=False)
class Learned:
    """The result of learning, which is kept beside the weights.

    Attributes:
        replays: of each model in order; None where it has none.
        fisher: carried Fisher information, or None.
        optimum: weights and curve; None where the weights stayed as they were.
        how: one line on how the weights were found.
        groups: names of the groups of parameters that have a weight of their own.
        device: name of the device that learned: "cpu", or the model of an accelerator.
    """

    replays: tuple[Replay | None, ...]
    fisher: Mapping[str, Tensor] | None = field(repr=False)
    optimum: Optimum | None
    how: str
    groups: tuple[str, ...] = ()
    device: str = CPU

    def keep(self, folder: Path) -> LearnedWeights:
        """Write replay rows and Fisher information into the output; what the ledger records of learning."""
        (folder / "merge_state").mkdir(exist_ok=True)
        rows = []
        for replay in self.replays:
            if replay is not None:
                save_replay(replay, folder / state_file(replay.digest))
            rows.append(None if replay is None else replay.to_dict())
        kept = None
        if self.fisher is not None:
            place = folder / "merge_state" / "fisher"
            save_fisher(self.fisher, place)
            kept = sha256_file(place)
            place.rename(folder / state_file(kept))
        curve = () if self.optimum is None else tuple((*look[:3], list(look[3])) for look in self.optimum.curve)
        steps = 0 if self.optimum is None else self.optimum.steps
        return LearnedWeights(self.how, self.groups, steps, curve, tuple(rows), kept, self.device)


def learn(
    plan: Plan,
    ranks: Ranks,
    *,
    journal: Path | None = None,
    shelf: Path | None = None,
    opened: Merged | None = None,
    action: str = "merge",
    notify: Callable[[str], object] | None = None,
    device: str | None = None,
) -> tuple[Plan, Learned]:
    """The plan with the weights that its recipe's `learn` asks for.

    Args:
        journal: folder of the run's journal, in which the progress of learning is noted; None: it is not noted.
        shelf: see `RunOptions.rows`.
        opened: the merge that is changed; None for a first merge.
        action: the action of the change. "add" starts from the learned weights of `opened`. "unmerge" keeps them or
            learns new ones, as the recipe says. "subtract" keeps them.
        notify: called with one line on what is about to happen.
        device: see `RunOptions.device`.

    Raises:
        HfMergeError: see `place_for`, `students`, `generate`, `labelled_rows`, `optimise`.
    """
    learning = plan.recipe.learn
    assert learning is not None
    if plan.method.leaps_at_zero:
        learning = dataclasses.replace(learning, low=max(learning.low, 10.0**-DIGITS))
    warnings: list[str] = []
    # rows of an adapter are those of the base it lies on
    earlier = {} if opened is None or action == "rebase" else _earlier(opened, warnings)
    if action == "subtract" or (action == "unmerge" and not learning.relearn):
        replays = tuple(_found(earlier, plan, ref) for ref in references(plan))
        how = "weights were kept as they had been learned beside all models of the step before"
        return _warned(plan, warnings), Learned(replays, None, None, how, device=_device(opened))
    check_tokens(plan)
    place = ranks.each(lambda: place_for(device or CPU))
    if notify is not None and ranks.main:
        for line in _of_devices(opened, device, place):
            notify(line)
    progress = Progress(journal, _question(opened, action, name_of(place)), shelf)
    with contextlib.ExitStack() as stack:
        stack.enter_context(repeatable(place))
        replays, rows = _rows(plan, learning, earlier, progress, ranks, notify, place)
        space = stack.enter_context(Space(plan, groups=learning.groups, budget=HELD_BYTES, scratch=journal))
        keys = [param.key for param in space.params]
        with memory_for(learning):
            merge = students(plan, keys, rows, checkpointing=learning.checkpointing, place=place)
        count = len(opened.last.models) if opened is not None and action == "add" else 0
        start = _start(space, plan, learning, count)
        anchor = None
        if count and learning.ewc:
            anchor = _anchor(space, merge, start, count, opened, learning, ranks, warnings)
        if notify is not None and ranks.main:
            begun = progress.steps()
            from_there = "" if begun is None else f"; {begun['step']} were made by a run that was interrupted"
            notify(f"learning {start.numel()} weights, at most {learning.steps} steps{from_there}")
        optimum = _optimised(space, merge, start, learning, ranks, anchor, progress)
        information = _information(space, merge, optimum, anchor, learning, ranks) if learning.ewc else None
    entries = tuple(
        dataclasses.replace(entry, weight=space.weights_of(optimum.weights, i, DIGITS))
        for i, entry in enumerate(plan.recipe.models)
    )
    how = _how(learning, optimum, count, place)
    warnings += _faults(optimum, space)
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, models=entries))
    return _warned(plan, warnings), Learned(replays, information, optimum, how, space.groups, name_of(place))


def _faults(optimum: Optimum, space: Space) -> Iterator[str]:
    """What the user should know of how learning ended."""
    if optimum.fault is not None:
        yield f"{optimum.fault} No further steps were made: the weights are the best of the {optimum.steps} before."
    if optimum.idle:
        names = some([space.groups[i] for i in optimum.idle])
        yield f"learn: no loss depends on {names}; the weights there stay where they started."


def _warned(plan: Plan, warnings: Sequence[str]) -> Plan:
    return dataclasses.replace(plan, warnings=(*plan.warnings, *warnings))


def _question(opened: Merged | None, action: str, device: str) -> str:
    """What learning goes on from and where it computes, beyond what the run's journal is for."""
    before = None if opened is None else opened.last.learned
    return sha256_bytes(canonical_json([action, None if before is None else before.to_dict(), device]))


def _device(opened: Merged | None) -> str:
    """What computed the weights of an existing merge, by its name."""
    learned = None if opened is None else opened.last.learned
    return CPU if learned is None or learned.device is None else learned.device


def _how(learning: Learning, optimum: Optimum, count: int, place: str) -> str:
    """What the ledger says about the learning; `count` models had learned weights before."""
    how = f"weights learned by {learning.loss}, {optimum.steps} steps"
    how += f", from those of the first {count} models" if count else ""
    how += f", on {name_of(place)}" if place != CPU else ""
    return how + (", stopped early" if optimum.fault is not None else "")


def _of_devices(opened: Merged | None, learning: str | None, place: str) -> list[str]:
    """What to tell of where weights are learned."""
    lines = []
    if learning is None and (kind := accelerator()) is not None:
        lines.append(
            "learning on the CPU, which gives one result on machines of a kind; "
            f"{parameter('device', kind)} would be faster."
        )
    if opened is not None and opened.last.learned and _device(opened) != name_of(place):
        lines.append(
            f"the weights so far were learned on {_device(opened)}, and now on {name_of(place)}: their last digits "
            "may be others than one of them alone would find."
        )
    return lines


def _start(space: Space, plan: Plan, learning: Learning, count: int) -> Tensor:
    """Where the weights start: the first `count` where they are; a new model's at the one given for it, if any."""
    weights = [entry.weight for entry in plan.recipe.models]
    level = plan.method.usual_weight(len(weights)) if learning.start is None else learning.start
    return space.start([w if i < count or (count and w != 1.0) else level for i, w in enumerate(weights)])


def _rows(
    plan: Plan,
    learning: Learning,
    earlier: Mapping[str, Replay],
    progress: Progress,
    ranks: Ranks,
    notify: Callable[[str], object] | None,
    place: str,
) -> tuple[tuple[Replay | None, ...], list[list[tuple[Replay, float]]]]:
    """Replay rows of each model, and all rows of each that are learned from; made by rank 0 for all."""
    suite = load_suite(learning.suite) if learning.suite is not None else None
    replays: list[Replay | None] = []
    rows: list[list[tuple[Replay, float]]] = []
    refs = references(plan)
    if notify is not None and ranks.main and learning.replays:
        notify(f"making replay rows of {len(refs)} models; {PRIVACY}")

    def made(model: int, ref: str, names: Sequence[str]) -> tuple[Replay | None, list[tuple[Replay, float]]]:
        subject = open_subject(ref, device=place, dtype="float32", copies=plan.copies)
        task = task_of(suite, names) if suite is not None else None
        if suite is not None and task is None and learning.loss == "labels":
            raise HfMergeError(f"learn: {suite.name} has no task with the head of {names[0]}; take loss mixed.")
        few = []
        if suite is not None and task is not None:
            # first, as they cost little and may be at fault
            part = labelled_rows(task, suite, subject, split=learning.split, rows=learning.rows, seed=learning.seed)
            few = [(part, 1.0)]
        own = _found(earlier, plan, ref) if learning.replays else None
        if own is None and learning.replays:
            own = progress.replay(model, _named(subject), learning.replay)
        if own is None and learning.replays:
            spare = None
            if learning.replay.generator == "masked":
                spare = open_subject(
                    source_reference(plan.base.snapshot), device=subject.device, dtype="float32", copies=plan.copies
                )
            own = generate(subject, kind_of(subject), learning.replay, spare=spare, progress=True, notify=notify)
            progress.keep_replay(model, learning.replay, own)
        subject.forget()
        return own, [(own, 1.0), *few] if own is not None else few

    def within(*given: Any) -> tuple[Replay | None, list[tuple[Replay, float]]]:
        with memory_for(learning):
            return made(*given)

    for model, (delta, ref) in enumerate(zip(plan.deltas, refs, strict=True)):
        names = (delta.source.name, delta.source.slug)
        own, learned_from = ranks.on_main(partial(within, model, ref, names))
        replays.append(own)
        rows.append(learned_from)
    return tuple(replays), rows


def _optimised(
    space: Space,
    merge: Sequence[Student],
    start: Tensor,
    learning: Learning,
    ranks: Ranks,
    anchor: Anchor | None,
    progress: Progress,
) -> Optimum:
    with progress_bar(learning.steps, "Learning", "step", shown=ranks.main) as bar:
        course = partial(optimise, space, merge, start, learning, ranks, anchor=anchor, progress=progress)
        return ranks.each(lambda: course(tick=bar.update))


def _anchor(
    space: Space,
    merge: Sequence[Student],
    start: Tensor,
    count: int,
    opened: Merged | None,
    learning: Learning,
    ranks: Ranks,
    warnings: list[str],
) -> Anchor | None:
    """The merge that models are added to, with its Fisher information, as carried or taken anew; on rank 0."""
    import torch

    assert opened is not None
    before = start.clone()
    before[count:] = 0.0

    def made() -> Anchor | None:
        if not ranks.main:
            return None
        merged = space.merged(before)
        digest = None if opened.last.learned is None else opened.last.learned.fisher
        path = None if digest is None else state_path(opened.snapshot, KeptState(0, digest, 0), warnings)
        if path is not None:
            known = load_fisher(path)
            # of what no model changed before nothing is known, and nothing is held
            held = {key: known[key] if key in known else torch.zeros_like(value) for key, value in merged.items()}
            return Anchor(merged, held, learning.ewc)
        return Anchor(merged, _fisher(merge[:count], merged, learning), learning.ewc)

    return ranks.each(made)


def _information(
    space: Space, merge: Sequence[Student], optimum: Optimum, anchor: Anchor | None, learning: Learning, ranks: Ranks
) -> dict[str, Tensor] | None:
    """Fisher information of the new merge, with what is carried of the earlier ones; on rank 0."""

    def made() -> dict[str, Tensor] | None:
        if not ranks.main:
            return None
        new = _fisher(merge, space.merged(optimum.weights), learning)
        if anchor is not None:
            for key, value in new.items():
                value.add_(anchor.fisher[key], alpha=learning.gamma)
        return new

    return ranks.each(made)


def _fisher(merge: Sequence[Student], merged: Mapping[str, Tensor], learning: Learning) -> dict[str, Tensor]:
    total = sum(min(FISHER_ROWS, len(one.rows[0][0].learned)) for one in merge)
    with progress_bar(total, "Fisher information", "row") as bar:
        with memory_for(learning):
            return fisher(merge, merged, seed=learning.seed, tick=bar.update)


def _earlier(opened: Merged, warnings: list[str]) -> dict[str, Replay]:
    """Kept replay rows of a merge, by the model they were made from."""
    found = {}
    for row in () if opened.last.learned is None else opened.last.learned.replay:
        path = None if row is None else state_path(opened.snapshot, KeptState(0, row["sha256"], 0), warnings)
        if path is not None:
            replay = load_replay(path)
            found[replay.source] = replay
    return found


def _found(earlier: Mapping[str, Replay], plan: Plan, ref: str) -> Replay | None:
    """The kept rows of a model as it is now; None where there are none."""
    if not earlier:
        return None
    return earlier.get(_named(open_subject(ref, copies=plan.copies)))


def _named(subject: Subject) -> str:
    """As replay rows name the model they were made from."""
    info = subject.info
    return f"{info.label}@{info.commit or 'sha256:' + info.digest}"
