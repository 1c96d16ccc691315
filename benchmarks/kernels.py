"""Times one OPCM step on one matrix, in parts, on one thread; prints one JSON object for `spectral.py` and `opcm.py`.

`python -m benchmarks.kernels RUNS ROWSxCOLUMNS [ROWSxCOLUMNS ...]`. Accumulator and task vector are like those of the
generated fine-tunes: half low-rank with a decaying spectrum, half dense noise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfmerge.methods.opcm import project
from hfmerge.methods.spectral import cleared_by_gram, cleared_by_sketch, cleared_by_svd, split


if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 0.5
VARIANTS = ("code", "code-no-diagonal", "paper")


def best(runs: int, work: Callable[[], Any]) -> float:
    """Least seconds of some runs: what the processor can do when nothing disturbs it."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(runs: int) -> dict[str, float]:
    """Floating-point operations per second of a large product of square matrices, by dtype."""
    import torch

    found = {}
    for name in ("float64", "float32"):
        left, right = (torch.randn(2048, 2048, dtype=getattr(torch, name)) for _ in range(2))
        found[name] = 2 * 2048**3 / best(max(3, runs), lambda a=left, b=right: a @ b)
    return found


def task_vector(rows: int, columns: int, seed: int) -> Tensor:
    """Float64 change of unit norm, in the manner of `models.py`."""
    import torch

    from benchmarks.kinds import KINDS
    from benchmarks.models import task_vector as generated

    base = torch.ones(rows, columns)
    return generated(KINDS["clip-vision"], "matrix", base, seed).double()


def measure(rows: int, columns: int, runs: int) -> dict[str, Any]:
    """One shape.

    Returns:
        seconds: of the whole projection (`exact`), of its Gram product and its eigenvectors, of a projection by full
            singular value decomposition and by sketch; flops: of the matrix products in `exact`; deviation: of the
            sketch, relative to the task vector, by variant; r, n: leading and all directions.
    """
    import torch

    if rows < columns:
        rows, columns = columns, rows
    shape = (rows, columns)
    total = task_vector(rows, columns, 0) + task_vector(rows, columns, 1)
    tau = task_vector(rows, columns, 2)
    gram = total.T @ total
    r, rank = split(torch.linalg.svdvals(total), shape, ALPHA)
    if cleared_by_gram(total, tau, shape, ALPHA, "code") is None:
        raise SystemExit("the Gram matrix of this accumulator is not trusted; nothing to time")
    seconds = {
        "exact": best(runs, lambda: project(total, tau, shape, ALPHA, "code")),
        "gram": best(runs, lambda: total.T @ total),
        "eigenvectors": best(runs, lambda: torch.linalg.eigh(gram)),
        "svd": best(1, lambda: cleared_by_svd(total, tau, shape, ALPHA, "code")),
    }
    deviation = {}
    if cleared_by_sketch(total, tau, shape, ALPHA, "code") is not None:
        seconds["sketch"] = best(runs, lambda: project(total, tau, shape, ALPHA, "code", "randomized"))
        for variant in VARIANTS:
            exact = project(total, tau, shape, ALPHA, variant)
            found = project(total, tau, shape, ALPHA, variant, "randomized")
            deviation[variant] = float((found - exact).norm() / tau.norm())
    m, n, tail = rows, columns, rank - r
    products = 3 * m * n * n + r * n * n + 3 * r * r * n + r * n * n + 2 * tail * n * n
    return {"seconds": seconds, "flops": 2.0 * products, "deviation": deviation, "r": r, "n": n}


def main() -> None:
    """Measure the shapes of the command line."""
    import torch

    torch.set_num_threads(1)
    runs = int(sys.argv[1])
    shapes = {word: tuple(int(size) for size in word.split("x")) for word in sys.argv[2:]}
    found = {word: measure(rows, columns, runs) for word, (rows, columns) in shapes.items()}
    print(json.dumps({"ceilings": ceilings(runs), "shapes": found}))


if __name__ == "__main__":
    main()
