"""Rows of text that a classifier knows: random words moved, by a seeded search, towards every class alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfmerge.evaluation.batches import length_batches, padded
from hfmerge.learning.replay.words import Vocabulary


if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

SHARPNESS = 16.0
"""Power of the class's probability against which words are weighed: the greater, the more a row says and the less it
looks like random words."""
SHARE = 8
"""One in so many tokens of a row is drawn anew in a step."""


@dataclass(frozen=True)
class Schedule:
    """How rows are moved towards classes.

    Attributes:
        steps: of each row, at most.
        batch_size: rows that go through the model together.
        generator: the random numbers.
        tick: told how many rows have made a step.
    """

    steps: int
    batch_size: int
    generator: Generator
    tick: Callable[[int], object]


def search(
    model: PreTrainedModel,
    rows: Sequence[Any],
    known: Tensor,
    vocabulary: Vocabulary,
    log_chances: Callable[[Tensor], Tensor],
    schedule: Schedule,
    *,
    confidence: float,
) -> tuple[list[Any], int]:
    """Rows moved towards the classes, as many towards each.

    What is searched for is the distribution of random words times `p(class | words) ** SHARPNESS`: words stay as
    common as they are wherever the class does not care. In a step some tokens of a row are drawn anew from what the
    slope of log p at their embeddings says of that distribution, and the new row is kept as Metropolis keeps it, with
    probability min(1, (p(class | new) / p(class | old)) ** SHARPNESS). The way back is not reckoned with, so that this
    is a search and no exact sampler. A row that has reached `confidence` is left alone; the others are what they are
    after `steps`.

    Args:
        rows: int32 arrays, with the tokens around a text.
        known: logits of the rows, (rows, classes).
        log_chances: logits -> logarithm of the probability of each class.
        confidence: of its class that a row need not exceed.

    Returns:
        int32 arrays, in the rows' order; and how many of them reached `confidence`.
    """
    import torch

    model.requires_grad_(False)
    current, wanted = list(rows), shared_out(log_chances(known))
    goal = math.log(confidence) if confidence > 0 else float("-inf")

    def look(some: list[Any], classes: Tensor) -> tuple[list[float], list[Tensor]]:
        return _look(model, some, classes, vocabulary.pad, log_chances, schedule)

    reached, slopes = look(current, wanted) if schedule.steps else ([], [])
    generator = schedule.generator
    for _ in range(schedule.steps):
        left = [i for i in range(len(current)) if reached[i] < goal]
        if not left:
            break
        moved = [_moved(current[i], slopes[i], model, vocabulary, generator) for i in left]
        scores, sides = look(moved, wanted[left])
        chances = torch.rand(len(left), generator=generator, dtype=torch.float64).log().tolist()
        for i, row, score, slope, chance in zip(left, moved, scores, sides, chances, strict=True):
            if chance < SHARPNESS * (score - reached[i]):
                current[i], reached[i], slopes[i] = row, score, slope
    return current, sum(score >= goal for score in reached) if schedule.steps else len(current)


def shared_out(known: Tensor) -> Tensor:
    """A class for each row, as many rows for each class (or one more), the likeliest pairs first.

    Args:
        known: (rows, classes), the greater the likelier.

    Returns:
        int64 (rows,).
    """
    import torch

    rows, classes = known.shape
    each, spare = divmod(rows, classes)
    found, held = [-1] * rows, [0] * classes
    for pair in known.flatten().argsort(descending=True, stable=True).tolist():
        row, kind = divmod(pair, classes)
        # rows that do not divide evenly go to the classes that come to it first, one each
        if found[row] < 0 and held[kind] < each + (spare > 0):
            spare -= held[kind] == each
            held[kind] += 1
            found[row] = kind
    return torch.tensor(found)


def _look(
    model: PreTrainedModel,
    rows: Sequence[Any],
    wanted: Tensor,
    pad: int,
    log_chances: Callable[[Tensor], Tensor],
    schedule: Schedule,
) -> tuple[list[float], list[Tensor]]:
    """Logarithm of the probability of each row's class, and its slope at the embedding of every token."""
    import torch

    seen: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    scores, slopes = [0.0] * len(rows), [torch.empty(0)] * len(rows)
    hook = model.get_input_embeddings().register_forward_hook(catch)
    try:
        for batch in length_batches([len(row) for row in rows], schedule.batch_size):
            tokens, mask = padded([rows[i] for i in batch], pad, str(model.device))
            logits = model(input_ids=tokens, attention_mask=mask).logits.float()
            reached = log_chances(logits).gather(1, wanted[batch].to(logits.device)[:, None])[:, 0]
            (slope,) = torch.autograd.grad(reached.sum(), seen.pop())
            for k, (i, score) in enumerate(zip(batch, reached.tolist(), strict=True)):
                scores[i], slopes[i] = score, slope[k, : len(rows[i])].clone()
            schedule.tick(len(batch))
    finally:
        hook.remove()
    return scores, slopes


def _moved(row: Any, slope: Tensor, model: PreTrainedModel, vocabulary: Vocabulary, generator: Generator) -> Any:
    """A copy of a row with some of its tokens drawn anew."""
    import torch

    first, room = len(vocabulary.before), len(row) - len(vocabulary.before) - len(vocabulary.after)
    places = first + torch.randperm(room, generator=generator)[: 1 + room // SHARE]
    table = model.get_input_embeddings().weight.detach()[: len(vocabulary.weights)]
    gains = (slope[places.to(slope.device)] @ table.T).float().cpu()
    chances = (vocabulary.weights.log() + SHARPNESS * gains).softmax(-1)
    moved = row.copy()
    moved[places.numpy()] = torch.multinomial(chances, 1, generator=generator)[:, 0].numpy()
    return moved
