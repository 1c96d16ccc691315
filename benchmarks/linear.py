"""Times simple merges of four 542 MB models against mergekit, whole command.

mergekit runs twice: with its defaults, and with the options that are best for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row, Sample


RUNS = common.CACHE / "runs"
MODELS = 4
BEST_CASE = ("--async-write", "--write-threads", "2", "--lazy-unpickle")


@dataclass(frozen=True)
class Task:
    """One merge as both tools are told about it.

    Attributes:
        count: how many of the four fine-tunes take part.
        options: `--option` values for hfmerge.
        per_model, overall: mergekit's parameters, of each model and of the whole merge.
        base: what mergekit's `base_model` is: "base", "first" (the first fine-tune) or "" (none).
        scale: the exact result is base + scale * sum of task vectors; None where it is not linear.
        faster, peak: goals, how many times as fast and with what share of the peak memory.
    """

    count: int
    options: tuple[str, ...]
    per_model: dict[str, float]
    overall: dict[str, float]
    base: str
    scale: float | None = None
    faster: float = 2.0
    peak: float = 1 / 3


TASKS = {
    "linear": Task(4, (), {"weight": 0.25}, {}, "", 0.25),
    "task_arithmetic": Task(4, ("scale=0.3",), {"weight": 0.3}, {}, "base", 0.3),
    "slerp": Task(2, ("t=0.5",), {}, {"t": 0.5}, "first"),
    "ties": Task(4, ("density=0.2",), {"weight": 1.0, "density": 0.2}, {}, "base", faster=10.0, peak=0.25),
}


def our_command(method: str, base: Path, models: Sequence[Path], output: Path) -> list[str | Path]:
    """The `hfmerge merge` call; no state is written, as mergekit writes none."""
    options = [word for option in TASKS[method].options for word in ("--option", option)]
    head: list[str | Path] = [
        *common.OURS,
        "merge",
        "--base",
        base,
        "--method",
        method,
        *options,
        "--state",
        "none",
        "--quiet",
    ]
    return [*head, "--output", output, *models]


def peer_configuration(method: str, base: Path, models: Sequence[Path]) -> str:
    """The same merge in mergekit's format (JSON is YAML)."""
    task = TASKS[method]
    entries = [{"model": str(model), "parameters": task.per_model} for model in models]
    config: dict[str, object] = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    if task.overall:
        config["parameters"] = task.overall
    if task.base:
        config["base_model"] = str(base if task.base == "base" else models[0])
    return json.dumps(config, indent=2)


def peer_command(configuration: Path, output: Path, extra: Sequence[str]) -> list[str | Path]:
    """mergekit's own command."""
    program = common.MERGEKIT.bin / "mergekit-yaml"
    return [program, configuration, output, "--quiet", "--no-copy-tokenizer", *extra]


def run_ours(method: str, base: Path, models: Sequence[Path], threads: int, remember: bool = False) -> Sample:
    """Run hfmerge once; `remember`: with the digests of its sources known from a run before."""
    scratch = RUNS / f"hfmerge-{method}"
    command = our_command(method, base, models, scratch / "out")
    return common.measure(command, threads=threads, scratch=scratch, remember=remember)


def run_peer(method: str, base: Path, models: Sequence[Path], threads: int, extra: Sequence[str]) -> Sample:
    """Run mergekit once."""
    configuration, scratch = RUNS / f"mergekit-{method}.yml", RUNS / f"mergekit-{method}"
    RUNS.mkdir(parents=True, exist_ok=True)
    configuration.write_text(peer_configuration(method, base, models))
    return common.measure(peer_command(configuration, scratch / "out", extra), threads=threads, scratch=scratch)


def speed_rows(method: str, samples: dict[str, list[Sample]]) -> list[Row]:
    """Time, processor time and memory of one method; one row per figure and way of running either tool."""
    mine = {"": samples.pop("hfmerge"), ", digests known": samples.pop("again")}
    rows = []
    for way, ours in mine.items():
        if not samples:
            wall, cpu, peak = common.spread(ours), common.spread(ours, "cpu"), common.mib(common.median(ours, "peak"))
            rows += [Row(f"{method}, wall{way}", wall), Row(f"{method}, processor{way}", cpu)]
            rows.append(Row(f"{method}, peak memory{way}", peak))
        for name, peer in samples.items():
            rows += _beside(method, f"{name}{way}", ours, peer)
    return rows


def _beside(method: str, name: str, ours: list[Sample], peer: list[Sample]) -> list[Row]:
    rows, task = [], TASKS[method]
    for figure, label in (("wall", "wall"), ("cpu", "processor")):
        ratio = common.median(peer, figure) / common.median(ours, figure)
        goal, met = (f"≥ {task.faster:.0f}x", ratio >= task.faster) if figure == "wall" else ("", None)
        cells = (common.spread(ours, figure), common.spread(peer, figure), f"{ratio:.1f}x", goal, met)
        rows.append(Row(f"{method}, {label}, {name}", *cells))
    for figure, label in (("peak", "peak memory"), ("anonymous", "peak without mapped files")):
        mine, other = common.median(ours, figure), common.median(peer, figure)
        goal, met = (f"≤ {task.peak:.2f}", mine <= task.peak * other) if figure == "peak" else ("", None)
        cells = (common.mib(mine), common.mib(other), f"{mine / other:.2f}", goal, met)
        rows.append(Row(f"{method}, {label}, {name}", *cells))
    return rows


def accuracy_row(method: str, base: Path, models: Sequence[Path], peers: bool) -> Row:
    """Share of elements that are not the exact result rounded once, for the outputs the last runs left."""
    shares = []
    for tool in ("hfmerge", "mergekit") if peers else ("hfmerge",):
        words = [str(base), str(TASKS[method].scale), str(RUNS / f"{tool}-{method}" / "out"), *map(str, models)]
        command = [sys.executable, "-m", "benchmarks.reference_linear", *words]
        done = subprocess.run(command, check=True, cwd=common.HERE.parent, stdout=subprocess.PIPE, text=True)
        shares.append(f"{json.loads(done.stdout)['not_nearest']:.2%}")
    figure = f"{method}, elements that are not the exact value rounded once"
    return Row(figure, shares[0], shares[1] if peers else "")


def linked(model: Path, index: int) -> Path:
    """A folder of hard links to a model's files: another model to any tool, no disk space."""
    folder = common.CACHE / f"{model.parent.name}-many" / f"model-{index:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(model.iterdir()):
        target = folder / path.name
        if not target.exists():
            os.link(path, target)
    return folder


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    peers = not options.no_peers
    facts = {"machine": common.machine(options.threads), "hfmerge": common.our_versions()}
    base, models = common.generate_models("llama", MODELS, quick=options.quick)
    common.warm([base, *models])
    fine_tunes = Path("model-00 .. model-03")
    facts["hfmerge command"] = common.shown(our_command(options.methods[0], Path("base"), [fine_tunes], Path("out")))
    if peers:
        common.install(common.MERGEKIT)
        facts["peer"] = common.versions(common.MERGEKIT.python, ("mergekit", "torch", "transformers", "safetensors"))
        facts["peer command"] = common.shown(peer_command(Path("merge.yml"), Path("out"), ()))
        facts["best case"] = f"the same with `{' '.join(BEST_CASE)}`"
    facts["digests known"] = "hfmerge once more: it knows the digests of its sources from the run before"
    facts["runs"] = f"{options.runs} of each, alternating, after one that is not counted; medians (range)"
    rows = []
    for method in options.methods:
        sources = models[: TASKS[method].count]
        # one that hashes all its sources, then one that finds them as the run before left them
        runners = {"hfmerge": partial(run_ours, method, base, sources, options.threads)}
        runners["again"] = partial(run_ours, method, base, sources, options.threads, True)
        if peers:
            runners["default"] = partial(run_peer, method, base, sources, options.threads, ())
            runners["best case"] = partial(run_peer, method, base, sources, options.threads, BEST_CASE)
        if not options.quick:
            common.alternate(runners, 1)
        rows += speed_rows(method, common.alternate(runners, options.runs))
        if TASKS[method].scale is not None:
            rows.append(accuracy_row(method, base, sources, peers))
    return common.report("Merges of four Llama-like models, 271 M parameters, bfloat16", facts, rows)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=5)
    found.add_argument(
        "--methods", nargs="+", choices=list(TASKS), default=["linear"], help="what to time (default: linear)"
    )
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
