"""Numbers of continual merging, from scores alone: accuracy, transfer, forgetting, unmerge fidelity.

Notation. `R[t][i]` is the score of task `i` after step `t`, both from 0 in order of arrival, so that model `i` arrives
at step `i`; scores are shares (0..1), higher is better. `T` is the number of tasks. `b[i]` is the base's score on task
`i` with that task's head, `s[i]` the score of the fine-tuned model alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


Row = Mapping[int, float]
"""Scores after one step, by place of the task."""


def accuracy(scores: Sequence[Row], step: int) -> float:
    """ACC: `1/(t+1) sum_{i<=t} R[t][i]`, the mean over the tasks seen so far.

    Source: GEM, arXiv 1706.08840, section 2, there for the last step.
    """
    return _mean([scores[step][i] for i in range(step + 1)])


def backward_transfer(scores: Sequence[Row], *, over_all: bool = False) -> float | None:
    """BWT: `1/(T-1) sum_{i<T-1} (R[T-1][i] - R[i][i])`; None for one task.

    Source: GEM, arXiv 1706.08840, section 2; used for merging by MINGLE, arXiv 2505.11883.

    Args:
        over_all: divide by T instead, as over all tasks of which the last contributes zero (arXiv 2604.22464).
    """
    last = len(scores) - 1
    if last == 0:
        return None
    return math.fsum(scores[last][i] - scores[i][i] for i in range(last)) / (last + over_all)


def forward_transfer(scores: Sequence[Row], base: Row) -> float | None:
    """FWT of GEM: `1/(T-1) sum_{i>=1} (R[i-1][i] - b[i])`, the gain on a task before its model arrives.

    Source: GEM, arXiv 1706.08840, section 2, with the base's encoder under the task's head for the untrained model.
    None for one task.
    """
    count = len(scores)
    return None if count == 1 else _mean([scores[i - 1][i] - base[i] for i in range(1, count)])


def learning_gap(scores: Sequence[Row], alone: Row) -> float:
    """What MINGLE, arXiv 2505.11883, calls FWT: `1/T sum_i (R[i][i] - s[i])`, what a task loses on arrival."""
    return _mean([scores[i][i] - alone[i] for i in range(len(scores))])


def forgetting(scores: Sequence[Row]) -> float | None:
    """`1/(T-1) sum_{i<T-1} (max_{i<=t<T-1} R[t][i] - R[T-1][i])`; None for one task. Negative: old tasks gained.

    Source: Chaudhry et al., "Riemannian Walk", arXiv 1801.10112; t begins at the task's arrival.
    """
    last = len(scores) - 1
    if last == 0:
        return None
    return _mean([max(scores[t][i] for t in range(i, last)) - scores[last][i] for i in range(last)])


def normalised_accuracy(scores: Sequence[Row], alone: Row) -> float | None:
    """`1/T sum_i R[T-1][i] / s[i]`; None where a model alone scores nothing.

    Source: KnOTS, arXiv 2410.19735.
    """
    last = scores[-1]
    if any(alone[i] <= 0.0 for i in range(len(scores))):
        return None
    return _mean([last[i] / alone[i] for i in range(len(scores))])


@dataclass(frozen=True)
class Fidelity:
    """Comparison of a merge after a removal with the merge that never saw the model.

    Never merged, `theta_never`, means the same recipe and order without the model, merged anew from its sources, with
    weights learned anew where weights are learned; `theta_0` is the base, `a_i` the score on task `i`, `k` the removed
    model's task.

    Attributes:
        removed: name of the model.
        identical: both have the same bytes of weights.
        distance: `||theta_unmerged - theta_never|| / ||theta_never - theta_0||` over all weights.
        retained_gap: `1/(T-1) sum_{i!=k} |a_i(theta_unmerged) - a_i(theta_never)|`.
        residual: `a_k(theta_unmerged) - a_k(theta_never)` on the removed task; 0 if nothing of it is left.
        retained: mean score of the others after removal.
        removed_score: `a_k(theta_unmerged)`.
        seconds: of the removal.
    """

    removed: str
    identical: bool
    distance: float
    retained_gap: float
    residual: float
    retained: float
    removed_score: float
    seconds: float


def fidelity(
    removed: str,
    task: int,
    unmerged: Row,
    never: Row,
    *,
    identical: bool,
    distance: float,
    seconds: float,
) -> Fidelity:
    """Compare scores after a removal with those of the merge that never saw the model.

    Args:
        task: place of the removed model's task.
        unmerged, never: scores on all tasks.
    """
    others = [i for i in sorted(never) if i != task]
    return Fidelity(
        removed,
        identical,
        distance,
        _mean([abs(unmerged[i] - never[i]) for i in others]),
        unmerged[task] - never[task],
        _mean([unmerged[i] for i in others]),
        unmerged[task],
        seconds,
    )


@dataclass(frozen=True)
class Drop:
    """The loss of score on an earlier task when a model arrives.

    Attributes:
        old, new: places of the two models in the recipe.
        cosine: of their task vectors.
        drop: `R[t-1][old] - R[t][old]`, t the arrival of `new`, mean over the orders in which `new` came later.
        orders: how many those were.
    """

    old: int
    new: int
    cosine: float
    drop: float
    orders: int


def drops(
    cosine: Sequence[Sequence[float | None]], orders: Sequence[Sequence[int]], scores: Sequence[Sequence[Row]]
) -> list[Drop]:
    """Similarity and damage of every pair of models, in the recipe's order.

    Args:
        cosine: of task vectors, models in the recipe's order.
        orders: of arrival, each of places in the recipe.
        scores: of each order, after each step, by place in the recipe.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for order, rows in zip(orders, scores, strict=True):
        for t in range(1, len(order)):
            for old in order[:t]:
                found.setdefault((old, order[t]), []).append(rows[t - 1][old] - rows[t][old])
    result = []
    for old, new in sorted(found):
        similar = cosine[old][new]
        if similar is not None:
            result.append(Drop(old, new, similar, _mean(found[old, new]), len(found[old, new])))
    return result


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's, of two numbers over several cases; None for fewer than three cases, or where one does not vary."""
    if len(pairs) < 3:
        return None
    first, second = (_mean([pair[side] for pair in pairs]) for side in (0, 1))
    products = [((a - first), (b - second)) for a, b in pairs]
    spread = math.sqrt(math.fsum(a * a for a, _ in products) * math.fsum(b * b for _, b in products))
    return math.fsum(a * b for a, b in products) / spread if spread > 0.0 else None


def ranked(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Both numbers as ranks, equal ones with their mean rank: `correlation` of them is Spearman's."""
    sides = []
    for side in (0, 1):
        values = sorted(pair[side] for pair in pairs)
        sides.append([values.index(p[side]) + (values.count(p[side]) - 1) / 2 for p in pairs])
    return list(zip(*sides, strict=True))


def mean_and_deviation(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation (divided by n - 1; None for fewer than two) of the values there are."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "std": None, "n": 0}
    mean = _mean(found)
    squares = math.fsum((value - mean) ** 2 for value in found)
    return {"mean": mean, "std": math.sqrt(squares / (len(found) - 1)) if len(found) > 1 else None, "n": len(found)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
