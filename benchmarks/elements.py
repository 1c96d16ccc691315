"""Times the steps of an elementwise merge on pieces of tensors: what an element costs, and so a merge at best.

Four models, bfloat16, pieces as large as hfmerge's own, float32 arithmetic; each step on one core alone, and on as
many as there are threads, which share caches and memory. The least of some runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks import common
from benchmarks.common import Row


MODELS = 4
REPEATS = 4
"""Calls of a step in a run, so that threads overlap."""
STEPS = (
    "SHA-256 of the stored bytes",
    "to float32, less the base",
    "squared norm",
    "`linear`: sum of four changes",
    "`ties`: k-th magnitude of a million elements",
    "`ties`: trim, elect, average",
    "base plus change, rounded, once for all four",
)


def steps() -> list[Callable[[], Any]]:
    """What does each of `STEPS` once for all models, on tensors of its own."""
    import torch

    from hfmerge.engine.partition import TILE
    from hfmerge.methods.ties import ties
    from hfmerge.methods.trimming import KthMagnitude, flat_pieces, kth_magnitude, thinned
    from hfmerge.task_vector import Dense

    torch.set_num_threads(1)
    seed = torch.Generator().manual_seed(7)
    base = torch.randn(TILE, generator=seed)
    stored = [(base + 1e-2 * torch.randn(TILE, generator=seed)).bfloat16() for _ in range(MODELS)]
    written = [model.view(torch.uint8).numpy() for model in stored]
    changes = [model.float().sub_(base) for model in stored]
    ties, taus = ties(), [Dense(change) for change in changes]
    limits = [kth_magnitude(change, ties.density) for change in changes]

    def summed() -> Any:
        total = changes[0] * 0.25
        for change in changes[1:]:
            total.add_(change, alpha=0.25)
        return total

    def searched() -> None:
        """Through a tensor of as many pieces as there are models; a larger one costs less, for its sample."""
        search = KthMagnitude([thinned(change, MODELS * TILE) for change in changes], MODELS * TILE, ties.density)
        for change in changes:
            for part in flat_pieces(change):
                search.add(part)
        search.settle()

    return [
        lambda: [hashlib.sha256(data).digest() for data in written],
        lambda: [model.float().sub_(base) for model in stored],
        lambda: [float(change.square().sum()) for change in changes],
        summed,
        searched,
        lambda: ties.combine(taus, [1.0] * MODELS, lambda: base, limits),
        lambda: (base + changes[0]).bfloat16(),
    ]


def measure(runs: int, threads: int) -> list[float]:
    """Least seconds of a call of each step, on so many threads at once, an element of a model."""
    from hfmerge.cli.program import reuse_freed_memory
    from hfmerge.engine.partition import TILE

    # as the command line does
    reuse_freed_memory()
    own = [steps() for _ in range(threads)]
    found = []
    for step in range(len(STEPS)):
        times = []
        for _ in range(runs):
            ready = threading.Barrier(threads + 1)

            def work(mine: Callable[[], Any], ready: threading.Barrier = ready) -> None:
                ready.wait()
                for _ in range(REPEATS):
                    mine()

            crew = [threading.Thread(target=work, args=(each[step],)) for each in own]
            for thread in crew:
                thread.start()
            ready.wait()
            start = time.perf_counter()
            for thread in crew:
                thread.join()
            times.append(time.perf_counter() - start)
        found.append(min(times) / REPEATS / MODELS / TILE)
    return found


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    if options.measure:
        return json.dumps([measure(options.runs, threads) for threads in (1, options.threads)]) + "\n"
    runs = 2 if options.quick else options.runs
    alone, beside = common.ask("elements", "--measure", "--runs", runs, "--threads", options.threads)
    facts = {"machine": common.machine(options.threads), "hfmerge": common.our_versions()}
    facts["runs"] = f"the least of {runs} of each; nanoseconds an element of one of {MODELS} models"
    rows = [
        Row(
            f"{what}; on {options.threads} cores at once, each",
            f"{1e9 * one:.2f} ns",
            f"{1e9 * two:.2f} ns",
            f"{two / one:.1f}x",
        )
        for what, one, two in zip(STEPS, alone, beside, strict=True)
    ]
    return common.report("What an element of an elementwise merge costs", facts, rows)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=15)
    found.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
