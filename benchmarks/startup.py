"""Times `hfmerge --help`: what everybody waits for who only looks up an option."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row


GOAL_SECONDS = 0.5


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    facts = {"machine": common.machine(options.threads), "hfmerge": common.our_versions()}
    command: list[str | Path] = [*common.OURS, "--help"]
    facts["hfmerge command"] = common.shown(command)
    runners = {"hfmerge": partial(common.measure, command, threads=options.threads)}
    if not options.no_peers:
        common.install(common.MERGEKIT)
        theirs: list[str | Path] = [common.MERGEKIT.bin / "mergekit-yaml", "--help"]
        facts["peer"] = common.versions(common.MERGEKIT.python, ("mergekit", "torch", "transformers"))
        facts["peer command"] = common.shown(theirs)
        runners["mergekit"] = partial(common.measure, theirs, threads=options.threads)
    common.alternate(runners, 1)
    samples = common.alternate(runners, options.runs)
    facts["runs"] = f"{options.runs} of each, alternating, after one that is not counted; medians (range)"
    ours = common.median(samples["hfmerge"], "wall")
    cells = (common.spread(samples["hfmerge"]), "", "")
    if "mergekit" in samples:
        ratio = common.median(samples["mergekit"], "wall") / ours
        cells = (cells[0], common.spread(samples["mergekit"]), f"{ratio:.0f}x")
    row = Row("`--help`, whole command", *cells, f"< {GOAL_SECONDS} s", ours < GOAL_SECONDS)
    return common.report("Start-up", facts, [row])


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    return common.arguments(__doc__ or "", runs=9)


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
