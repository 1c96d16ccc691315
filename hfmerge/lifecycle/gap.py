"""The gap between a merge after a subtraction and the merge that never saw the model: a bound, and a measurement."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hfmerge.engine.executor import Outcome, run
from hfmerge.engine.plan import Plan
from hfmerge.recipe.values import FITS
from hfmerge.recipe.weights import values_of


def gap_of(plan: Plan, outcome: Outcome, folder: Path, exact: Plan | None) -> dict[str, float]:
    """The gap of a subtraction: distance to the merge that never saw the models, relative to the merged change.

    Args:
        plan: of the merge, which subtracts models.
        outcome, folder: of its run.
        exact: plan of the merge that never saw the models, to measure the gap as well.

    Returns:
        Scalars of the ledger: `gap_bound` if the method has one and `norm` is not fitted; `gap` if it was measured.
    """
    found = {}
    models = zip(plan.recipe.models, outcome.squared_norms, strict=True)
    # for weights by pattern, the greatest weight counts
    norms = [max(map(abs, values_of(entry.weight))) * math.sqrt(squared) for entry, squared in models]
    bound = plan.method.gap_bound(norms, plan.subtracted)
    if outcome.merged_norm and bound is not None and plan.norm not in FITS:
        found["gap_bound"] = bound * outcome.scale / outcome.merged_norm
    if exact is not None:
        found["gap"] = _measured(exact, folder)
    return found


def _measured(exact: Plan, folder: Path) -> float:
    """`||theta' - theta|| / ||theta - theta_0||` over all parameters; merges again, without the models, for `theta`.

    The models that stay have the same weights in both merges. This holds for learned weights too: they are not learned
    again (unlike in `lifecycle.check_removal.Behaviour`).

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
