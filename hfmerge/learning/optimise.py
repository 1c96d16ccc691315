"""Learns the weights of a plan's models by gradient, all models frozen: AdamW on one number a model and group."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfmerge.engine.device import enough_memory
from hfmerge.engine.ranks import Ranks
from hfmerge.errors import NonFiniteError
from hfmerge.hashing import sha256_bytes
from hfmerge.learning.progress import NOTHING, Progress
from hfmerge.learning.shared_encoder import Part
from hfmerge.learning.shared_encoder import losses as together
from hfmerge.learning.space import Space
from hfmerge.learning.student import Student, parameters
from hfmerge.recipe.learning import Learning
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    import torch
    from torch import Tensor

BETTER = 1e-4
"""By what share the loss on the rows held out has to fall to count as better."""
CALMER = "choose a smaller rate or high, or precision: float32"
PENALTY = "the penalty of elastic weight consolidation"
Look = tuple[int, "float | None", "float | None", tuple[float, ...]]
"""Step, loss of its rows, loss of the rows held out, mean weight of each model."""


@dataclass(frozen=True)
class Anchor:
    """The earlier merge near which elastic weight consolidation keeps the new merge.

    Attributes:
        merged: the merge that models are added to, float32 by stored key of the base.
        fisher: its diagonal Fisher information, likewise.
        weight: of the penalty.
    """

    merged: Mapping[str, Tensor] = field(repr=False)
    fisher: Mapping[str, Tensor] = field(repr=False)
    weight: float

    def penalty(self, merged: Mapping[str, Tensor]) -> float:
        """`weight / 2 * sum F (theta - theta_prev)^2`."""
        pieces = [
            float((self.fisher[key] * (value - self.merged[key]).square()).double().sum())
            for key, value in merged.items()
        ]
        return self.weight / 2.0 * math.fsum(pieces)

    def pull(self, gradients: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
        """Add the penalty's gradient to that of a loss."""
        for key, gradient in gradients.items():
            gradient.addcmul_(self.fisher[key], merged[key] - self.merged[key], value=self.weight)


@dataclass(frozen=True)
class Optimum:
    """The result of the optimisation.

    Attributes:
        weights: float64 (models, groups), the best that were seen.
        curve: step, loss of its rows, loss of the rows held out (None where none are), and the mean weight of each
            model, at every look.
        steps: number of steps that were made.
        fault: why learning ended early; None if it did not.
        idle: groups whose weights did not change, because no loss depends on them.
    """

    weights: Tensor = field(repr=False)
    curve: tuple[Look, ...]
    steps: int
    fault: str | None = None
    idle: tuple[int, ...] = ()


def optimise(
    space: Space,
    students: Sequence[Student],
    start: Tensor,
    learning: Learning,
    ranks: Ranks,
    *,
    anchor: Anchor | None = None,
    progress: Progress = NOTHING,
    tick: Callable[[int], object] = lambda count: None,
) -> Optimum:
    """Minimise the mean loss of all models over the weights, within their bounds.

    Every process does the rows of some models; only the gradient in the weights crosses processes. Which rows a step
    takes depends on seed, model and step alone. A loss that is not a number ends it, with the best weights so far.

    Args:
        start: float64 (models, groups).
        anchor: of elastic weight consolidation.
        progress: progress of a killed run, from which learning continues. It is written at every look.
        tick: called with numbers of steps, those of the killed run included.

    Raises:
        NonFiniteError: the loss is not a number where the weights start.
        HfMergeError: out of memory.
    """
    course = _Course(start.clone().clamp_(learning.low, learning.high), learning)
    before = ranks.on_main(progress.steps)
    if before is not None:
        course.take_up(before)
        tick(course.step)
    work = _Work(space, students, learning, ranks, anchor)
    fault = None
    try:
        if before is None:
            course.look(None, work.held_out(course.weights))
        while course.waited < learning.patience and course.step < learning.steps:
            loss, gradient = work.step(course.weights, course.step)
            course.go(gradient)
            tick(1)
            ranks.check()
            if course.step % learning.every == 0 or course.step == learning.steps:
                course.look(loss, work.held_out(course.weights))
                if ranks.main:
                    progress.keep_steps(course.to_dict())
    except NonFiniteError as error:
        if not course.step:
            raise
        fault = str(error)
    return Optimum(course.best, tuple(course.curve), course.step, fault, course.idle())


class _Course:
    """Where the steps stand.

    Args:
        weights: float64 (models, groups), where they start.
    """

    def __init__(self, weights: Tensor, learning: Learning):
        import torch

        self.weights = self.best = weights
        self.step, self.waited = 0, 0
        self.curve: list[Look] = []
        self._least, self._learning = math.inf, learning
        self._adam = torch.optim.AdamW([weights], lr=learning.rate, weight_decay=0.0)

    def go(self, gradient: Tensor) -> None:
        """One step."""
        self.weights.grad = gradient
        self._adam.step()
        self.weights.clamp_(self._learning.low, self._learning.high)
        self.step += 1

    def look(self, last: float | None, held: float | None) -> None:
        """Note where the weights are, and whether they are the best so far.

        Args:
            last: loss of the last step's rows, before it.
            held: loss of the rows held out; None where none are.
        """
        judged = held if held is not None else last
        means = tuple(round(float(value), 6) for value in self.weights.mean(1))
        self.curve.append((self.step, last, held, means))
        if judged is None or judged < self._least * (1.0 - BETTER if self._least > 0 else 1.0):
            self.best, self.waited = self.weights.clone(), 0
            self._least = math.inf if judged is None else judged
        else:
            self.waited += 1

    def idle(self) -> tuple[int, ...]:
        """Groups whose gradient was zero in every step, by the mean of its squares; none before the first."""
        squares = self._adam.state[self.weights].get("exp_avg_sq")
        return () if squares is None else tuple((squares == 0).all(0).nonzero()[:, 0].tolist())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; all that the next step depends on."""
        moments = self._adam.state_dict()["state"][0]
        return {
            "step": self.step, "waited": self.waited, "curve": self.curve,
            "least": None if math.isinf(self._least) else self._least,
            "weights": self.weights.tolist(), "best": self.best.tolist(),
            "adam": {name: value.tolist() for name, value in moments.items()},
        }  # fmt: skip

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Inverse of `to_dict`."""
        import torch

        self.step, self.waited = state["step"], state["waited"]
        self.curve = [(step, last, held, tuple(means)) for step, last, held, means in state["curve"]]
        self._least = math.inf if state["least"] is None else state["least"]
        self.weights.copy_(torch.tensor(state["weights"], dtype=torch.float64))
        self.best = torch.tensor(state["best"], dtype=torch.float64)
        moments = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["adam"].items()}
        self._adam.load_state_dict({"state": {0: moments}, "param_groups": self._adam.state_dict()["param_groups"]})


@dataclass(frozen=True, eq=False)
class _Work:
    """Losses and gradients of all models, each process computing those of some."""

    space: Space
    students: Sequence[Student]
    learning: Learning
    ranks: Ranks
    anchor: Anchor | None

    def step(self, weights: Tensor, step: int) -> tuple[float, Tensor]:
        """Loss of a step's rows, and its gradient in the weights.

        Raises:
            NonFiniteError: one of them is not finite; on all processes.
        """
        import torch

        parts = self.ranks.together(lambda: self._step(weights, step))
        total = math.fsum(loss for losses, _ in parts for _, loss in losses)
        gradient = torch.stack([part for _, part in parts]).sum(0)
        bad = [place for losses, _ in parts for place, loss in losses if not math.isfinite(loss)]
        if bad or not bool(torch.isfinite(gradient).all()):
            where = "; ".join(bad) or "the gradient"
            raise NonFiniteError(f"learn: in step {step + 1} the loss is not finite ({where}); {CALMER}.")
        return total, gradient

    def held_out(self, weights: Tensor) -> float | None:
        """Mean loss of the rows that no step learns from; None where there are none.

        Raises:
            NonFiniteError: it is not finite; on all processes.
        """
        if not any(replay.held_out for student in self.students for replay, _ in student.rows):
            return None
        losses = [pair for part in self.ranks.together(lambda: self._held_out(weights)) for pair in part]
        bad = [place for place, loss in losses if not math.isfinite(loss)]
        if bad:
            raise NonFiniteError(f"learn: the loss on rows held out is not finite ({'; '.join(bad)}); {CALMER}.")
        return math.fsum(loss for _, loss in losses)

    @property
    def _device(self) -> torch.device:
        return self.students[0].model.device

    def _mine(self) -> list[tuple[int, Student]]:
        return [pair for pair in enumerate(self.students) if pair[0] % self.ranks.world == self.ranks.rank]

    def _step(self, weights: Tensor, step: int) -> tuple[list[tuple[str, float]], Tensor]:
        """This process's part of a step: losses and what they are of; the gradient."""
        import torch

        losses = []
        with memory_for(self.learning):
            merged = self.space.merged(weights)
            leaves = parameters(merged, self._device)
            parts, counts = [], []
            for i, student in self._mine():
                for kind, (replay, share) in enumerate(student.rows):
                    parts.append(Part(student, replay, _drawn(len(replay.learned), self.learning, i, kind, step)))
                    counts.append(share / len(self.students))
            for some in self._at_once(parts):
                with contextlib.ExitStack() as stack:
                    for student in dict.fromkeys(part.student for part in parts[some]):
                        stack.enter_context(student.holding(leaves))
                    raw = together(parts[some], self.learning.precision)
                    values = [loss * count for loss, count in zip(raw, counts[some], strict=True)]
                    torch.stack(values).sum().backward()
                for part, value in zip(parts[some], values, strict=True):
                    losses.append((f"{part.student.name}, rows {list(part.rows)}", float(value.detach())))
            gradients = {key: leaf.grad.cpu() for key, leaf in leaves.items() if leaf.grad is not None}
            if self.anchor is not None and self.ranks.main:
                gradients = {k: gradients[k] if k in gradients else torch.zeros_like(v) for k, v in merged.items()}
                self.anchor.pull(gradients, merged)
                losses.append((PENALTY, self.anchor.penalty(merged)))
            return losses, self.space.pulled_back(gradients)

    def _at_once(self, parts: Sequence[Part]) -> list[slice]:
        """Which parts go through the models together: all, or where memory is to be saved each by itself."""
        size = 1 if self.learning.checkpointing else max(len(parts), 1)
        return [slice(at, at + size) for at in range(0, len(parts), size)]

    def _held_out(self, weights: Tensor) -> list[tuple[str, float]]:
        """This process's part of the loss on rows held out."""
        import torch

        losses = []
        with memory_for(self.learning), torch.no_grad():
            merged = self.space.merged(weights)
            placed = {key: value.to(self._device) for key, value in merged.items()}
            for _, student in self._mine():
                with student.holding(placed):
                    for replay, share in student.rows:
                        rows = range(len(replay) - replay.held_out, len(replay))
                        for at in range(0, len(rows), self.learning.batch):
                            some = rows[at : at + self.learning.batch]
                            part = float(student.loss(replay, some, self.learning.precision))
                            counts = share * len(some) / len(rows) / len(self.students)
                            losses.append((f"{student.name}, rows {list(some)}", part * counts))
            if self.anchor is not None and self.ranks.main:
                losses.append((PENALTY, self.anchor.penalty(merged)))
        return losses


def memory_for(learning: Learning) -> contextlib.AbstractContextManager[None]:
    """As `enough_memory`, with what learning could do with less of."""
    lower = [f"batch (now {learning.batch}) or replay.batch_size (now {learning.replay.batch_size})"]
    lower += [] if learning.checkpointing else ["or set checkpointing: true"]
    lower += [] if learning.precision == "bfloat16" else ["or precision: bfloat16"]
    device = parameter("device")
    return enough_memory("learn", f"lower {', '.join(lower)}, or use more processes or another {device}")


def _drawn(count: int, learning: Learning, model: int, kind: int, step: int) -> list[int]:
    """Numbers of the rows of one step, in a seeded order: none comes again before as many batches as there are."""
    import torch

    size = min(learning.batch, count)
    rounds = count // size
    question = f"{learning.seed} {model} {kind} {step // rounds}".encode()
    random = torch.Generator().manual_seed(int(sha256_bytes(question)[:15], 16))
    order: list[Any] = torch.randperm(count, generator=random).tolist()
    at = step % rounds * size
    return order[at : at + size]
