"""Learns the weights of a plan's models by gradient, all models frozen: AdamW on one number a model and layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfmerge.digest import sha256_bytes
from hfmerge.errors import NonFiniteError
from hfmerge.learning.asked import Learning
from hfmerge.learning.space import Space
from hfmerge.learning.students import Student, parameters
from hfmerge.runtime import Ranks


if TYPE_CHECKING:
    from torch import Tensor

BETTER = 1e-4
"""By what share the loss on the rows held out has to fall to count as better."""


@dataclass(frozen=True)
class Anchor:
    """What elastic weight consolidation holds the merge at.

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
            float((self.fisher[key] * (value.detach() - self.merged[key]).square()).double().sum())
            for key, value in merged.items()
        ]
        return self.weight / 2.0 * math.fsum(pieces)

    def pull(self, gradients: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
        """Add the penalty's gradient to that of a loss."""
        for key, gradient in gradients.items():
            gradient.addcmul_(self.fisher[key], merged[key] - self.merged[key], value=self.weight)


@dataclass(frozen=True)
class Found:
    """What learning found.

    Attributes:
        weights: float64 (models, groups), the best that were seen.
        curve: step, loss of its rows, loss of the rows held out (None where none are), and the mean weight of each
            model, at every look.
        steps: that were made.
    """

    weights: Tensor = field(repr=False)
    curve: tuple[tuple[int, float | None, float | None, tuple[float, ...]], ...]
    steps: int


def optimise(
    space: Space,
    students: Sequence[Student],
    start: Tensor,
    asked: Learning,
    ranks: Ranks,
    *,
    anchor: Anchor | None = None,
    tick: Callable[[int], object] = lambda count: None,
) -> Found:
    """Minimise the mean loss of all models over the weights, within their bounds.

    Every process does the rows of some models; only the gradient in the weights crosses processes. Which rows a step
    takes depends on seed, model and step alone.

    Args:
        start: float64 (models, groups).
        anchor: of elastic weight consolidation.
        tick: told of every step.

    Raises:
        NonFiniteError: the loss is not a number.
    """
    import torch

    weights = start.clone().clamp_(asked.low, asked.high)
    weights.grad = torch.zeros_like(weights)
    adam = torch.optim.AdamW([weights], lr=asked.rate, weight_decay=0.0)
    mine = [i for i in range(len(students)) if i % ranks.world == ranks.rank]
    curve: list[tuple[int, float | None, float | None, tuple[float, ...]]] = []
    best, least, waited, step = weights.clone(), math.inf, 0, 0

    def look(last: float | None) -> bool:
        """Note where the weights are; whether it is time to stop."""
        nonlocal best, least, waited
        held = _held_out(space, students, mine, weights, asked, ranks, anchor)
        judged = held if held is not None else last
        curve.append((step, last, held, tuple(round(float(value), 6) for value in weights.mean(1))))
        if judged is None or judged < least * (1.0 - BETTER if least > 0 else 1.0):
            best, waited = weights.clone(), 0
            least = math.inf if judged is None else judged
        else:
            waited += 1
        return waited >= asked.patience

    done = look(None)
    while not done and step < asked.steps:
        loss, gradient = _step(space, students, mine, weights, step, asked, ranks, anchor)
        assert weights.grad is not None
        weights.grad.copy_(gradient)
        adam.step()
        weights.clamp_(asked.low, asked.high)
        step += 1
        tick(1)
        ranks.check()
        if step % asked.every == 0 or step == asked.steps:
            done = look(loss)
    return Found(best, tuple(curve), step)


def _step(
    space: Space,
    students: Sequence[Student],
    mine: Sequence[int],
    weights: Tensor,
    step: int,
    asked: Learning,
    ranks: Ranks,
    anchor: Anchor | None,
) -> tuple[float, Tensor]:
    """Loss of a step's rows, and its gradient in the weights."""
    import torch

    leaves = parameters(space.merged(weights))
    losses = []
    for i in mine:
        with students[i].holding(leaves):
            for kind, (replay, share) in enumerate(students[i].rows):
                numbers = _drawn(len(replay.learned), asked, i, kind, step)
                loss = students[i].loss(replay, numbers, asked.precision) * (share / len(students))
                loss.backward()
                losses.append(float(loss.detach()))
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    if anchor is not None and ranks.main:
        with torch.no_grad():
            whole = {k: gradients[k] if k in gradients else torch.zeros_like(leaf) for k, leaf in leaves.items()}
            anchor.pull(whole, leaves)
            losses.append(anchor.penalty(leaves))
            gradients = whole
    parts = ranks.gather((losses, space.pulled_back(gradients)))
    total = math.fsum(value for part, _ in parts for value in part)
    gradient = torch.stack([part for _, part in parts]).sum(0)
    if not math.isfinite(total) or not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError(f"learn: the loss of step {step + 1} is not finite; choose a smaller rate, or float32.")
    return total, gradient


def _held_out(
    space: Space,
    students: Sequence[Student],
    mine: Sequence[int],
    weights: Tensor,
    asked: Learning,
    ranks: Ranks,
    anchor: Anchor | None,
) -> float | None:
    """Mean loss of the rows that no step learns from; None where there are none."""
    import torch

    held = [
        (i, replay, share, range(len(replay) - replay.held_out, len(replay)))
        for i, student in enumerate(students)
        for replay, share in student.rows
        if replay.held_out
    ]
    if not held:
        return None
    merged = space.merged(weights)
    losses = []
    with torch.no_grad():
        for i, replay, share, numbers in held:
            if i not in mine:
                continue
            with students[i].holding(merged):
                for at in range(0, len(numbers), asked.batch):
                    some = numbers[at : at + asked.batch]
                    part = float(students[i].loss(replay, some, asked.precision))
                    losses.append(part * share * len(some) / len(numbers) / len(students))
        if anchor is not None and ranks.main:
            losses.append(anchor.penalty(merged))
    return math.fsum(value for part in ranks.gather(losses) for value in part)


def _drawn(count: int, asked: Learning, model: int, kind: int, step: int) -> list[int]:
    """Numbers of the rows of one step, in a seeded order: none comes again before as many batches as there are."""
    import torch

    size = min(asked.batch, count)
    rounds = count // size
    question = f"{asked.seed} {model} {kind} {step // rounds}".encode()
    random = torch.Generator().manual_seed(int(sha256_bytes(question)[:15], 16))
    order: list[Any] = torch.randperm(count, generator=random).tolist()
    at = step % rounds * size
    return order[at : at + size]
