"""Metrics by name, each with a 95 % confidence interval: Wilson's or a seeded bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfmerge.errors import HfMergeError
from hfmerge.evaluation.results import Score


if TYPE_CHECKING:
    from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """How predictions are compared with answers.

    Attributes:
        compute: predictions, answers (arrays of equal length) -> value.
        regression: compares numbers instead of classes.
        proportion: a share of rows that are right, whose interval is Wilson's.
        redrawn: the same value for many draws of the rows at once: predictions and answers of every pair that occurs,
            and how often each draw has each pair (draws, pairs) -> values; None: draw by draw.
    """

    compute: Callable[[Any, Any], float]
    regression: bool = False
    proportion: bool = False
    redrawn: Callable[[Any, Any, Any], Any] | None = None


def scored(name: str, predictions: Sequence[Any], answers: Sequence[Any], *, seed: int) -> Score:
    """The value of a metric with its interval.

    Args:
        name: one of `METRICS`.
        predictions, answers: class numbers or numbers, row by row. For `perplexity`: the negative log-likelihoods
            and token counts of the pieces.
        seed: of the bootstrap.

    Raises:
        HfMergeError: no rows.
    """
    import numpy as np

    metric = METRICS[name]
    got, true = np.asarray(predictions), np.asarray(answers)
    if not len(true):
        raise HfMergeError("no rows to score.")
    value = metric.compute(got, true)
    if metric.proportion:
        low, high = wilson(value, len(true))
        return Score(value, len(true), low, high, name, "wilson")
    low, high = bootstrap(metric, got, true, seed)
    return Score(value, len(true), low, high, name, "bootstrap")


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` rows."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def bootstrap(metric: Metric, got: NDArray[Any], true: NDArray[Any], seed: int) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of a metric over rows drawn with replacement; draws without a value are left out."""
    import numpy as np

    generator, count = np.random.default_rng(seed), len(true)
    if metric.redrawn is not None:
        pairs, often = np.unique(np.stack([got, true]), axis=1, return_counts=True)
        values = metric.redrawn(pairs[0], pairs[1], generator.multinomial(count, often / count, RESAMPLES))
    else:
        draws = (generator.integers(0, count, count) for _ in range(RESAMPLES))
        values = np.asarray([metric.compute(got[rows], true[rows]) for rows in draws])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _accuracy(got: Any, true: Any) -> float:
    return float((got == true).mean())


def _f1(got: Any, true: Any) -> float:
    """Of class 1, the second of the data set's labels, against all others."""
    from sklearn.metrics import f1_score

    return float(f1_score(true == 1, got == 1, zero_division=0.0))


def _f1_redrawn(got: Any, true: Any, often: Any) -> Any:
    return _f1_of(got, true, often, 1)


def _macro_f1(got: Any, true: Any) -> float:
    import numpy as np
    from sklearn.metrics import f1_score

    return float(f1_score(true, got, labels=np.unique(true), average="macro", zero_division=0.0))


def _macro_f1_redrawn(got: Any, true: Any, often: Any) -> Any:
    """A class that a draw has no row of is no part of its mean."""
    import numpy as np

    classes = np.unique(true)
    values = np.stack([_f1_of(got, true, often, k) for k in classes])
    there = np.stack([often[:, true == k].sum(1) > 0 for k in classes])
    return (values * there).sum(0) / there.sum(0)


def _f1_of(got: Any, true: Any, often: Any, label: int) -> Any:
    """F1 of one class against all others, for each draw; 0 where the class is neither there nor predicted."""
    import numpy as np

    both = often[:, (got == label) & (true == label)].sum(1)
    either = often[:, got == label].sum(1) + often[:, true == label].sum(1)
    return 2 * both / np.maximum(either, 1)


def _matthews(got: Any, true: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    if (got == true[0]).all() and (true == true[0]).all():
        return 0.0  # what scikit-learn says too, with a warning
    return float(matthews_corrcoef(true, got))


def _matthews_redrawn(got: Any, true: Any, often: Any) -> Any:
    """Gorodkin's R_K from counts; 0 where all predictions or all answers are the same, as scikit-learn has it."""
    import numpy as np

    classes = np.unique(np.concatenate([got, true]))
    right, count = often[:, got == true].sum(1), often.sum(1).astype(float)
    guessed = np.stack([often[:, got == k].sum(1) for k in classes]).astype(float)
    actual = np.stack([often[:, true == k].sum(1) for k in classes]).astype(float)
    spread = np.sqrt((count**2 - (guessed**2).sum(0)) * (count**2 - (actual**2).sum(0)))
    return np.where(spread > 0, (right * count - (guessed * actual).sum(0)) / np.where(spread > 0, spread, 1), 0.0)


def _pearson(got: Any, true: Any) -> float:
    """nan where one side does not vary."""
    import numpy as np

    a, b = got - got.mean(), true - true.mean()
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / spread) if spread > 0 else math.nan


def _spearman(got: Any, true: Any) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(got), rankdata(true))


def _perplexity(nll: Any, tokens: Any) -> float:
    return float(math.exp(min(700.0, nll.sum() / tokens.sum())))


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(_accuracy, proportion=True),
    "accuracy_norm": Metric(_accuracy, proportion=True),
    "f1": Metric(_f1, redrawn=_f1_redrawn),
    "macro_f1": Metric(_macro_f1, redrawn=_macro_f1_redrawn),
    "matthews": Metric(_matthews, redrawn=_matthews_redrawn),
    "pearson": Metric(_pearson, regression=True),
    "spearman": Metric(_spearman, regression=True),
    "perplexity": Metric(_perplexity),
}
"""Computed here; `lm-eval` and `mteb` bring their own."""
