"""Runs all benchmarks and writes `benchmarks/RESULTS.md`: `python -m benchmarks --date 2030-01-31`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path

from benchmarks import common, linear


STEPS = ("elements", "spectral", "evaluation")
"""Benchmarks of single steps, whose runs are many and short."""


def main() -> None:
    """Parse, run one benchmark after the other, write the file after each, so that a late failure loses nothing.

    Each runs in a process of its own: what a parent holds counts in the peak memory of its children.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--date", type=date.fromisoformat, required=True, help="of the run, YYYY-MM-DD")
    parser.add_argument("--output", type=Path, default=common.HERE / "RESULTS.md", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads for all tools (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="counted runs of commands, not of steps (default: as each one says)")
    parser.add_argument("--no-peers", action="store_true", help="time hfmerge alone and install nothing")
    options = parser.parse_args()
    shared = ["--threads", str(options.threads), *(["--no-peers"] if options.no_peers else [])]
    text = f"# Benchmark results, {options.date.isoformat()}\n\nWhat is measured and how: [README.md](README.md).\n"
    parts = ("startup", "linear", "elements", "opcm", "spectral", "lora", "reversal", "evaluation", "scaling")
    for part in parts:
        flags = [*shared, *(["--methods", *linear.TASKS] if part == "linear" else [])]
        if options.runs is not None and part not in STEPS:
            flags += ["--runs", str(options.runs)]
        command = [sys.executable, "-m", f"benchmarks.{part}", *flags]
        section = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(section, flush=True)
        text += "\n" + section
        options.output.write_text(text)


if __name__ == "__main__":
    main()
