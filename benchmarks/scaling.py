"""How time and memory grow with models, bytes, tensors and processes, and how near merging comes to copying.

All of hfmerge alone: `linear` of more models, of larger ones and of many small tensors, the same beside `cat`, OPCM of
more models and on two processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row, Sample
from benchmarks.linear import RUNS, linked, our_command
from benchmarks.opcm import our_command as opcm_command


COUNTS = (2, 4, 8, 16)
OPCM_COUNTS = (2, 4)
SIZES = ("llama-x1", "llama-x2", "llama-x4")
TENSORS = ("moe-1000", "moe-20000")
MAPPED = 4 << 20
"""Bytes of tensors that are given back to the system at once, in runs that show what the memory is made of."""
PARTS = ("copying", "counts", "sizes", "tensors", "processes")
GROWTH_GOAL = 0.05
LINEAR_GOAL = 1.2
COPY_GOAL = 0.7
PROCESSES_GOAL = 1.8
TENSOR_GOAL = 2.0


def merge(base: Path, models: Sequence[Path], threads: int) -> Sample:
    """`linear` once, with the seconds it reports for merging."""
    scratch = RUNS / "hfmerge-scaling"
    command = [*our_command("linear", base, models, scratch / "out"), "--json"]
    sample = common.measure(command, threads=threads, scratch=scratch)
    return replace(sample, inside=common.seconds_inside(sample.output))


def rows_of_counts(options: argparse.Namespace) -> list[Row]:
    """Peak memory as models are added; those beyond the generated ones are hard links to them."""
    base, models = common.generate_models("llama", 4, quick=options.quick)
    merge(base, models, options.threads)  # what a run remembers of a model's layout, later ones need not import
    rows = growth("linear", COUNTS, options.runs, lambda count: merge(base, repeated(models, count), options.threads))
    base, towers = common.generate_models("clip-vision", OPCM_COUNTS[-1], quick=options.quick)
    merge(base, towers, options.threads)
    scratch, setting = RUNS / "hfmerge-scaling", f"MALLOC_MMAP_THRESHOLD_={MAPPED}"

    def opcm(count: int, *before: str) -> Sample:
        command = [*before, *opcm_command(base, towers[:count], 0.5, "code", scratch / "out")]
        return common.measure(command, threads=options.threads, scratch=scratch)

    rows += growth("OPCM", OPCM_COUNTS, options.runs, opcm)
    return rows + growth(f"OPCM, `{setting}`", OPCM_COUNTS, options.runs, lambda count: opcm(count, "env", setting))


def repeated(models: Sequence[Path], count: int) -> list[Path]:
    """As many models as wanted, from fewer."""
    return [linked(models[i % len(models)], i) for i in range(count)]


def growth(method: str, counts: Sequence[int], runs: int, runner: Callable[[int], Sample]) -> list[Row]:
    """Peak memory beside that of the fewest models, in turns; and the time."""
    samples: dict[int, list[Sample]] = {count: [] for count in counts}
    for _ in range(runs):
        for count in counts:
            samples[count].append(runner(count))
    rows, first = [], common.median(samples[counts[0]], "peak")
    for count in counts:
        rows.append(_growth(f"{method}, {count} models", common.median(samples[count], "peak"), first))
        rows.append(Row(f"{method}, {count} models, whole command", common.spread(samples[count]), "", "", "", None))
    return rows


def rows_of_sizes(options: argparse.Namespace) -> list[Row]:
    """Peak memory and time per byte as the model doubles; two models, the largest tensor stays the same."""
    rows, first, rate = [], 0.0, 0.0
    for kind in SIZES:
        base, models = common.generate_models(kind, 2, quick=options.quick)
        common.warm([base, *models])
        samples = [merge(base, models, options.threads) for _ in range(1 + options.runs)][1:]
        size = (base / "model.safetensors").stat().st_size
        peak = common.median(samples, "peak")
        first = first or peak
        rows.append(_growth(f"linear, 2 models of {common.mib(size)}", peak, first))
        own = common.median(samples, "inside") / size
        rate = rate or own
        goal, met = ("", None) if kind == SIZES[0] else (f"≤ {LINEAR_GOAL}x", own <= LINEAR_GOAL * rate)
        cells = (common.spread(samples, "inside"), "", f"{own / rate:.2f}x", goal, met)
        rows.append(Row("the same, merging; the ratio is of seconds per byte", *cells))
    return rows


def rows_of_tensors(options: argparse.Namespace) -> list[Row]:
    """What a tensor costs by being one: mixtures of experts of a few hundred numbers each."""
    rows, first = [], 0.0
    for kind in TENSORS:
        base, models = common.generate_models(kind, 2, quick=options.quick)
        samples = [merge(base, models, options.threads) for _ in range(options.runs)]
        count = common.tensor_count(base / "model.safetensors")
        each = common.median(samples, "wall") / count
        first = first or each
        goal, met = ("", None) if kind == TENSORS[0] else (f"≤ {TENSOR_GOAL:.0f}x", each <= TENSOR_GOAL * first)
        cells = (f"{1e3 * each:.2f} ms", common.spread(samples), f"{each / first:.2f}x", goal, met)
        rows.append(Row(f"linear, 2 models of {count} small tensors, a tensor; the whole command beside", *cells))
    return rows


def _growth(what: str, peak: float, first: float) -> Row:
    share = peak / first - 1
    goal, met = (f"< {GROWTH_GOAL:+.0%}", share < GROWTH_GOAL) if peak != first else ("", None)
    return Row(f"{what}, peak memory", common.mib(peak), "", f"{share:+.1%}", goal, met)


def copy_seconds(base: Path, models: Sequence[Path]) -> float:
    """Reading every weight file with `cat`, then writing one file of the output's size with it."""
    files = [str(folder / "model.safetensors") for folder in (base, *models)]
    target = RUNS / "copy"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    with open(target, "wb") as file:
        subprocess.run(["cat", files[0]], check=True, stdout=file)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def rows_of_copying(options: argparse.Namespace) -> list[Row]:
    """The rate of a merge beside that of `cat` over the same bytes, alternating."""
    base, models = common.generate_models("llama", 4, quick=options.quick)
    common.warm([base, *models])
    merge(base, models, options.threads)
    samples, copied = [], []
    for _ in range(options.runs):
        samples.append(merge(base, models, options.threads))
        copied.append(copy_seconds(base, models))
    total = sum((folder / "model.safetensors").stat().st_size for folder in (base, *models, base))
    theirs = total / statistics.median(copied)
    rows = []
    for what, figure, goal in (("merging", "inside", COPY_GOAL), ("whole command", "wall", COPY_GOAL)):
        mine = total / common.median(samples, figure)
        cells = (f"{mine / 1e9:.2f} GB/s", f"{theirs / 1e9:.2f} GB/s", f"{mine / theirs:.2f}")
        rows.append(Row(f"linear, 4 models, {what}; `cat` beside", *cells, f"≥ {goal:.0%}", mine >= goal * theirs))
    return rows


def rows_of_processes(options: argparse.Namespace) -> list[Row]:
    """OPCM on one core, and on two processes of one core each; both under the same launcher."""
    base, models = common.generate_models("clip-vision", options.opcm_models, quick=options.quick)
    common.warm([base, *models])
    scratch = RUNS / "hfmerge-processes"
    _, *module = opcm_command(base, models, 0.5, "code", scratch / "out")  # "-m hfmerge merge ..."
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.runs):
        for count in seconds:
            cores = ["taskset", "--cpu-list", "0" if count == 1 else "0,1"]
            sample = common.measure([*cores, *launcher, str(count), *module], threads=1, scratch=scratch)
            seconds[count].append(common.seconds_inside(sample.output))
            common.progress(f"OPCM on {count} processes: {seconds[count][-1]:.1f} s")
    one, two = (statistics.median(found) for found in seconds.values())
    what = f"OPCM, {len(models)} CLIP towers, merging on two processes of one thread; on one beside"
    cells = (f"{two:.1f} s", f"{one:.1f} s", f"{one / two:.2f}x", f"≥ {PROCESSES_GOAL}x")
    return [Row(what, *cells, one / two >= PROCESSES_GOAL)]


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    facts = {"machine": common.machine(options.threads), "hfmerge": common.our_versions()}
    facts["runs"] = f"medians of {options.runs}"
    parts = {
        "copying": rows_of_copying,
        "counts": rows_of_counts,
        "sizes": rows_of_sizes,
        "tensors": rows_of_tensors,
        "processes": rows_of_processes,
    }
    rows = [row for part in options.parts for row in parts[part](options)]
    return common.report("Growth", facts, rows)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=3)
    found.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="(default: all)")
    found.add_argument("--opcm-models", type=int, default=3, help="towers merged by OPCM (default: %(default)s)")
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
