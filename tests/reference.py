"""Plain transcriptions of the published methods in float64, for tests: full bases, loops, no shortcuts, no hfmerge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor

EPS = 2.0**-23
"""Machine epsilon of float32: accumulators are carried in float32, whatever precision is computed in."""

Params = Mapping[str, "Tensor"]


def numerical_rank(singular: Tensor, shape: Sequence[int]) -> int:
    """Number of singular values above `s_1 * eps * max(m, n)`, the rule of `numpy.linalg.matrix_rank` in float32."""
    if singular.numel() == 0:
        return 0
    return int((singular > singular[0] * EPS * max(shape)).sum())


def split_rank(singular: Tensor, alpha: float, rank: int) -> int:
    """r: the first index, from 0, whose share of the sum so far exceeds alpha; the numerical rank for alpha = 1.

    The sum is that of the values that count, so that round-off in the others decides nothing.
    """
    total, running = float(singular[:rank].sum()), 0.0
    for i, value in enumerate(singular[:rank].tolist()):
        running += value
        if alpha < 1.0 and running > alpha * total:
            return i
    return rank


def opcm_projection(total: Tensor, tau: Tensor, alpha: float, variant: str) -> Tensor:
    """What OPCM adds for `tau` after `total`: the components of `tau` in the full singular bases of `total`, masked.

    Source: arXiv 2501.09522, section 4 (`paper`); `code` and `code-no-diagonal` mask the leading block instead.
    """
    import torch

    total, tau = total.double(), tau.double()
    u, singular, vt = torch.linalg.svd(total, full_matrices=True)
    rank = numerical_rank(singular, total.shape)
    if rank == 0:
        return tau
    r = split_rank(singular, alpha, rank)
    components = u.T @ tau @ vt.T
    if variant == "paper":
        components[:r, :] = 0.0
        components[:, :r] = 0.0
    else:
        components[:r, :r] = 0.0
    if variant != "code-no-diagonal":
        for i in range(rank):
            components[i, i] = 0.0
    return u @ components @ vt


def opcm_sum(taus: Sequence[Tensor], alpha: float, variant: str) -> Tensor:
    """The un-normalised accumulator of one matrix after all models."""
    total = taus[0].double()
    for tau in taus[1:]:
        total = total + opcm_projection(total, tau, alpha, variant)
    return total


def opcm_model(base: Params, models: Sequence[Params], matrices: Sequence[str], alpha: float, variant: str) -> Params:
    """Whole models merged by OPCM in its published recursive form, with `lam_t` and the merged weights alone as state.

    `theta_t = theta_0 + (lam_{t-1} (theta_{t-1} - theta_0) + P(tau_t)) / lam_t`, `lam_1 = 1`, one `lam_t` for all
    parameters such that the merged change has the mean norm of the task vectors so far. Parameters that are not in
    `matrices` are not projected.
    """
    origin = {name: value.double() for name, value in base.items()}
    merged = {name: value.double() for name, value in models[0].items()}
    norms = [model_norm(difference(models[0], origin))]
    lam = 1.0
    for model in models[1:]:
        tau = difference(model, origin)
        norms.append(model_norm(tau))
        change = difference(merged, origin)
        update = {
            name: lam * change[name]
            + (opcm_projection(change[name], tau[name], alpha, variant) if name in matrices else tau[name])
            for name in origin
        }
        lam = model_norm(update) / (math.fsum(norms) / len(norms))
        merged = {name: origin[name] + update[name] / lam for name in origin}
    return merged


def difference(model: Params, base: Params) -> dict[str, Tensor]:
    """Task vector of a whole model, float64."""
    return {name: model[name].double() - base[name].double() for name in base}


def model_norm(change: Params) -> float:
    """Frobenius norm over all parameters."""
    return math.sqrt(math.fsum(float((value.double() ** 2).sum()) for value in change.values()))


def linear(thetas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted average of models: "Model soups", arXiv 2203.05482."""
    total = thetas[0].double() * weights[0]
    for theta, weight in zip(thetas[1:], weights[1:], strict=True):
        total = total + theta.double() * weight
    return total / sum(weights)


def task_arithmetic(base: Tensor, thetas: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    """`theta_0 + scale * sum w tau`: arXiv 2212.04089."""
    result = base.double().clone()
    for theta, weight in zip(thetas, weights, strict=True):
        result += scale * weight * (theta.double() - base.double())
    return result


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at share t of the great circle through two flattened tensors; straight where they are parallel."""
    a, b = first.double().reshape(-1).tolist(), second.double().reshape(-1).tolist()
    length_a, length_b = math.sqrt(math.fsum(x * x for x in a)), math.sqrt(math.fsum(x * x for x in b))
    near, far = 1.0 - t, t
    if length_a > 0.0 and length_b > 0.0:
        cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (length_a * length_b)
        if abs(cosine) < 1.0 - 5e-4:
            angle = math.acos(cosine)
            near, far = math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return near * first.double() + far * second.double()


def ties_trim(tau: Sequence[float], density: float) -> list[float]:
    """The `density` share of largest magnitudes, the rest zero; equal magnitudes at the border all stay."""
    keep = max(1, round(density * len(tau)))
    border = sorted((abs(value) for value in tau), reverse=True)[keep - 1]
    return [value if abs(value) >= border else 0.0 for value in tau]


def ties_merge(trimmed: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Elect one sign an element, then average what agrees with it: arXiv 2306.01708, algorithm 1, lines 8 to 15.

    With weights (the paper has none, which is all weights 1) votes are weighted values, the average a weighted one.
    """
    merged = []
    for element in zip(*trimmed, strict=True):
        votes = [weight * value for weight, value in zip(weights, element, strict=True)]
        sign = math.copysign(1.0, math.fsum(votes)) if math.fsum(votes) != 0.0 else 0.0
        agreeing = [(vote, abs(weight)) for vote, weight in zip(votes, weights, strict=True) if vote * sign > 0.0]
        share = math.fsum(weight for _, weight in agreeing)
        merged.append(math.fsum(vote for vote, _ in agreeing) / share if agreeing else 0.0)
    return merged
