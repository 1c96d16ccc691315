"""How far a merge that a model was subtracted from is from the one that never saw it: a bound, and a measurement."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfmerge.execute import run
from hfmerge.ledger import Material
from hfmerge.methods import MergeMethod
from hfmerge.planned import Plan
from hfmerge.weights import values_of


def gap_bound(method: MergeMethod, models: Sequence[Material], subtracted: Sequence[int]) -> float | None:
    """`MergeMethod.gap_bound` from the norms in the ledger, times the weights (the greatest of those by pattern).

    Args:
        method: of the merge.
        models: of the merge, in order of arrival, the subtracted ones among them.
        subtracted: their indices.
    """
    norms = [max(map(abs, values_of(model.weight))) * math.sqrt(model.squared_norm or 0.0) for model in models]
    return method.gap_bound(norms, subtracted)


def measured_gap(exact: Plan, folder: Path) -> float:
    """`||theta' - theta|| / ||theta - theta_0||` over all parameters; merges again, without the models, for `theta`.

    The models that stay have the same weights in both, learned ones too: learned without the models that leave they
    would be others (see `evaluation.checking.Behaviour`).

    Args:
        exact: plan of the merge that never saw the models.
        folder: holds the weight files of the merge that they were subtracted from.
    """
    import torch
    from safetensors import safe_open

    squares = []
    with tempfile.TemporaryDirectory(prefix="hfmerge-gap-") as name:
        outcome = run(exact, Path(name))
        for file in sorted(exact.slots()):
            with safe_open(folder / file, "pt") as one, safe_open(Path(name) / file, "pt") as other:
                for key in sorted(one.keys()):
                    apart = one.get_tensor(key).double() - other.get_tensor(key).double()
                    squares.append(float(torch.linalg.vector_norm(apart)) ** 2)
    distance = math.sqrt(math.fsum(squares))
    return distance / outcome.merged_norm if outcome.merged_norm else math.inf
