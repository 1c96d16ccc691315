"""How far a merge that a model was subtracted from is from the one that never saw it: a bound, and a measurement."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfmerge.execute import run
from hfmerge.ledger import Material
from hfmerge.planned import Plan


def gap_bound(models: Sequence[Material], subtracted: Sequence[int]) -> float:
    """Greatest possible Frobenius norm of `S' - S`: accumulators of OPCM with models subtracted and never seen.

    Model k came in as `P_k(tau_k)`, of which `tau_k` is subtracted: off by at most `||tau_k||`, as a projection leaves
    no more than there was. Each later model t was projected off other directions than it would have been, and two
    orthogonal projections of one vector differ by at most its norm: `||tau_t||`. Norms are those of the ledger, times
    the weights.

    Args:
        models: of the merge, in order of arrival, the subtracted ones among them.
        subtracted: their indices.
    """
    norms = [abs(model.weight) * math.sqrt(model.squared_norm or 0.0) for model in models]
    first = min(subtracted)
    # the first one already makes every later projection another one
    return math.fsum(norms[first:])


def measured_gap(exact: Plan, folder: Path) -> float:
    """`||theta' - theta|| / ||theta - theta_0||` over all parameters; merges again, without the models, for `theta`.

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
