"""Runs all benchmarks and writes `benchmarks/RESULTS.md`: `python -m benchmarks --date 2030-01-31`."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from benchmarks import common, elements, evaluation, linear, lora, opcm, reversal, scaling, spectral, startup


def main() -> None:
    """Parse, run one benchmark after the other, write the file after each, so that a late failure loses nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--date", type=date.fromisoformat, required=True, help="of the run, YYYY-MM-DD")
    parser.add_argument("--output", type=Path, default=common.HERE / "RESULTS.md", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads for all tools (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="counted runs of commands, not of steps (default: as each one says)")
    parser.add_argument("--no-peers", action="store_true", help="time hfmerge alone and install nothing")
    options = parser.parse_args()
    steps = ["--threads", str(options.threads), *(["--no-peers"] if options.no_peers else [])]
    shared = steps if options.runs is None else [*steps, "--runs", str(options.runs)]
    text = f"# Benchmark results, {options.date.isoformat()}\n\nWhat is measured and how: [README.md](README.md).\n"
    parts = (
        lambda: startup.run(startup.parser().parse_args(shared)),
        lambda: linear.run(linear.parser().parse_args([*shared, "--methods", *linear.TASKS])),
        lambda: elements.run(elements.parser().parse_args(steps)),
        lambda: opcm.run(opcm.parser().parse_args(shared)),
        lambda: spectral.run(spectral.parser().parse_args(steps)),
        lambda: lora.run(lora.parser().parse_args(shared)),
        lambda: reversal.run(reversal.parser().parse_args(shared)),
        lambda: evaluation.run(evaluation.parser().parse_args(steps)),
        lambda: scaling.run(scaling.parser().parse_args(shared)),
    )
    for part in parts:
        section = part()
        print(section)
        text += "\n" + section
        options.output.write_text(text)


if __name__ == "__main__":
    main()
