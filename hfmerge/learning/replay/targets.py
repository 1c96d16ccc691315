"""Soft outputs of a model on replay rows: their stored form, and the divergence of another model from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor

LEAST = -100.0
"""Least log-probability that is told apart from zero probability."""


def token_targets(logits: Tensor, positions: Tensor, top: int) -> dict[str, Tensor]:
    """The likeliest tokens at some places of rows, with the logarithm of the mass of all others.

    Args:
        logits: (rows, length, vocabulary).
        positions: int (rows, places), -1 where a row has fewer.
        top: how many tokens; fewer than the vocabulary has.

    Returns:
        int32 `positions` (rows, places), int32 `tokens` and float16 `log_probabilities` (rows, places, top), float32
        `rest` (rows, places).
    """
    import torch

    scores = _at(logits, positions).float().log_softmax(-1)
    values, tokens = scores.topk(min(top, scores.shape[-1] - 1), -1)
    rest = scores.scatter(-1, tokens, float("-inf")).logsumexp(-1)
    return {
        "positions": positions.to(torch.int32),
        "tokens": tokens.to(torch.int32),
        "log_probabilities": values.clamp_min(LEAST).to(torch.float16),
        "rest": rest.clamp_min(LEAST),
    }


def divergence(scores: str, targets: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """How far a model's outputs are from the kept ones: Kullback-Leibler divergence of the kept distribution from the
    model's, in nats, 0 where both are equal. It can be differentiated.

    Tokens that were not kept count as one event, which bounds the divergence over the whole vocabulary from below.
    Independent labels give the sum over them, places of language models the mean over a row's; the values of a
    regression give half their squared distance, which is the divergence of normal distributions of variance 1.

    Args:
        scores: see `dataset.Replay`.
        targets: of some rows.
        logits: of the model on the inputs of the same rows, (rows, classes) or (rows, length, vocabulary).

    Returns:
        float32 (rows,).
    """
    import torch
    from torch.nn.functional import logsigmoid

    if scores == "tokens":
        return _token_divergence(targets, logits)
    kept, predicted = targets["logits"], logits.float()
    if scores == "classes":
        wanted = kept.log_softmax(-1)
        return (wanted.exp() * (wanted - predicted.log_softmax(-1))).sum(-1)
    if scores == "labels":
        sides = [torch.sigmoid(s * kept) * (logsigmoid(s * kept) - logsigmoid(s * predicted)) for s in (1, -1)]
        return (sides[0] + sides[1]).sum(-1)
    return (kept - predicted).square().sum(-1) / 2


def _token_divergence(targets: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    import torch

    positions = targets["positions"]
    found = _at(logits, positions).float().log_softmax(-1).gather(-1, targets["tokens"].long())
    # at most what float32 tells from a mass of 1, so that neither the logarithm nor its slope is infinite
    mass = found.logsumexp(-1).clamp_max(-1e-6)
    others = torch.log(-torch.expm1(mass))
    wanted, rest = targets["log_probabilities"].float(), targets["rest"]
    # what rounding to float16 took from the mass or added to it
    total = torch.cat([wanted, rest[..., None]], -1).logsumexp(-1)
    wanted, rest = wanted - total[..., None], rest - total
    apart = (wanted.exp() * (wanted - found)).sum(-1) + rest.exp() * (rest - others)
    counted = positions >= 0
    return torch.where(counted, apart, 0.0).sum(-1) / counted.sum(-1).clamp_min(1)


def _at(logits: Tensor, positions: Tensor) -> Tensor:
    """(rows, places, vocabulary) of some places; the first stands in for places that a row has not."""
    import torch

    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[rows, positions.to(logits.device, torch.int64).clamp_min(0)]
