"""Diagonal Fisher information of a merged model on replay rows, for elastic weight consolidation.

Source: "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796; carried over steps as in "Progress &
Compress", arXiv 1805.06370 (`F = gamma F_before + F_now`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.learning.student import Student, parameters


if TYPE_CHECKING:
    from torch import Generator, Tensor

FISHER_ROWS = 16
"""Rows of each model that the information is taken from; each takes a pass of its own."""


def fisher(
    students: Sequence[Student], merged: Mapping[str, Tensor], *, seed: int, tick: Callable[[int], object]
) -> dict[str, Tensor]:
    """The expected squared gradient of the log-likelihood of the merged model's own outputs, by stored key.

    Exact gradients of single rows, whose squares are summed up: one row is one pass. Answers are drawn from the merged
    model's distribution. The mean over rows, and over models.

    Args:
        merged: where it is taken, by stored key of the base.
        seed: of rows and answers.
        tick: told of every row.

    Returns:
        float32, as `merged`, not negative.
    """
    import torch

    total = {key: torch.zeros_like(value) for key, value in merged.items()}
    for number, student in enumerate(students):
        replay = student.rows[0][0]
        random = torch.Generator().manual_seed(seed + number)
        learned = list(replay.learned)
        picked = torch.randperm(len(learned), generator=random)[:FISHER_ROWS].tolist()
        for row in picked:
            leaves = parameters(merged, student.model.device)
            inputs, targets = replay.batch([learned[row]], str(student.model.device))
            with student.holding(leaves):
                logits = student.logits(inputs, "float32").float()
                if replay.scores == "tokens":
                    places = targets["positions"][0]
                    logits = logits[0, places[places >= 0].long()]
                _likelihood(replay.scores, logits.reshape(-1, logits.shape[-1]), random).backward()
            for key, leaf in leaves.items():
                if leaf.grad is not None:
                    gradient = leaf.grad.cpu()
                    total[key].addcmul_(gradient, gradient, value=1.0 / (len(picked) * len(students)))
            tick(1)
    return total


def _likelihood(scores: str, logits: Tensor, random: Generator) -> Tensor:
    """Log-likelihood of answers drawn from what the logits say; of a regression its gradient at unit variance."""
    import torch
    from torch.nn.functional import logsigmoid

    if scores == "labels":
        drawn = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=random).to(logits.device)
        return (drawn * logsigmoid(logits) + (1 - drawn) * logsigmoid(-logits)).sum()
    if scores == "values":
        noise = torch.randn(logits.shape, generator=random).to(logits.device)
        return (noise * logits).sum()
    answers = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=random).to(logits.device)
    return logits.log_softmax(-1).gather(1, answers).sum()


def save_fisher(values: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file of float32 tensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: values[key].contiguous().cpu() for key in sorted(values)}, path)


def load_fisher(path: Path) -> dict[str, Tensor]:
    """Inverse of `save_fisher`."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found
