"""Times OPCM on eight LoRA adapters of a 1B Llama shape: as factors against the dense path, and as a whole command.

The first rows fold the adapters' matrices alone, in one process that opens no base and writes no model. The last ones
are `hfmerge merge` of adapter folders, which then reads the base to write base + change.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row, Sample
from benchmarks.linear import RUNS


SPEED_GOAL = 100.0
DIFFERENCE_GOAL = 1e-5


def our_command(base: Path, adapters: Sequence[Path], output: Path) -> list[str | Path]:
    """The `hfmerge merge` call; the carried factors are kept."""
    options = ["--method", "opcm", "--state", "last", "--quiet", "--json"]
    return [*common.OURS, "merge", "--base", base, *options, "--output", output, *adapters]


def run_ours(base: Path, adapters: Sequence[Path], threads: int) -> Sample:
    """Run hfmerge once; `inside` is "merging" of its own report: reading, folding and writing."""
    scratch = RUNS / "hfmerge-lora"
    sample = common.measure(our_command(base, adapters, scratch / "out"), threads=threads, scratch=scratch)
    return replace(sample, inside=common.seconds_inside(sample.output))


def fold_rows(options: argparse.Namespace) -> list[Row]:
    """The fold alone."""
    found = common.ask("fold_adapters", "quick" if options.quick else "full", options.adapters, options.threads)
    ratio, difference = found["dense"] / found["factored"], found["difference"]
    state, stored = found["state"], found["adapters"]
    speed = (f"{found['factored']:.2f} s", f"{found['dense']:.0f} s", f"{ratio:.0f}x", f"≥ {SPEED_GOAL:.0f}x")
    return [
        Row(f"fold of all {found['matrices']} matrices; dense path beside", *speed, ratio >= SPEED_GOAL),
        Row(
            "difference to the dense path",
            f"{difference:.1e}",
            goal=f"≤ {DIFFERENCE_GOAL:.0e}",
            met=difference <= DIFFERENCE_GOAL,
        ),
        Row("carried factors; adapters beside", common.mib(state), common.mib(stored), f"{state / stored:.2f}"),
        Row("bytes read from any file meanwhile", str(found["read"]), goal="0", met=found["read"] == 0),
    ]


def whole_rows(options: argparse.Namespace) -> list[Row]:
    """The same adapters as folders, merged into a checkpoint."""
    base, adapters = common.generate_models("llama-1b", 0, quick=options.quick, adapters=options.adapters)
    common.warm([base, *adapters])
    samples = [run_ours(base, adapters, options.threads) for _ in range(options.runs)]
    size = common.mib((base / "model.safetensors").stat().st_size)
    return [
        Row(f"whole command, with reading and writing {size} of model", common.spread(samples)),
        Row("the same, merging", common.spread(samples, "inside")),
        Row("the same, peak memory", common.mib(common.median(samples, "peak"))),
    ]


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    facts = {"machine": common.machine(options.threads), "hfmerge": common.our_versions()}
    facts["adapters"] = f"{options.adapters} of rank 16 on every matrix of 16 layers, hidden 2048, MLP 8192"
    facts["dense path"] = "the same adapters multiplied out; one matrix of each shape, times their number"
    shown = our_command(Path("base"), [Path(f"adapter-00 .. adapter-{options.adapters - 1:02d}")], Path("out"))
    facts["whole command"] = common.shown(shown)
    return common.report("OPCM on LoRA adapters, factored", facts, fold_rows(options) + whole_rows(options))


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=1)
    found.add_argument("--adapters", type=int, default=8, help="adapters to fold (default: %(default)s)")
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
