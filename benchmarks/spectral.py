"""Times one step of OPCM on single matrices: where an exact projection spends its time, and what a randomized one is.

One thread, float64, the least of some runs. Rates are beside the greatest this machine reaches in the same call.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import common
from benchmarks.common import Row


SHAPES = ("768x768", "3072x768", "2048x2048", "8192x2048")
QUICK_SHAPES = ("320x300",)


def profile_rows(word: str, found: dict[str, Any], ceiling: float) -> list[Row]:
    """Where the time of an exact projection goes."""
    seconds = found["seconds"]
    exact, eigen = seconds["exact"], seconds["eigenvectors"]
    rate = found["flops"] / max(exact - eigen, 1e-9)
    what = f"projection of {word.replace('x', ' x ')}"
    return [
        Row(f"{what}, full decomposition beside", f"{exact:.3f} s", f"{seconds['svd']:.3f} s", ratio(seconds, "svd")),
        Row(f"{what}: eigenvectors", f"{eigen:.3f} s", "", f"{eigen / exact:.0%}"),
        Row(
            f"{what}: matrix products",
            f"{exact - eigen:.3f} s",
            "",
            f"{(exact - eigen) / exact:.0%}, {rate / 1e9:.0f} of {ceiling / 1e9:.0f} GFLOP/s",
        ),
    ]


def ratio(seconds: dict[str, float], other: str) -> str:
    """How many times as long another way takes as the exact projection."""
    return f"{seconds[other] / seconds['exact']:.1f}x"


def sketch_rows(word: str, found: dict[str, Any]) -> list[Row]:
    """What `spectral: randomized` saves, and how far it goes astray."""
    what = f"randomized projection of {word.replace('x', ' x ')}"
    if "sketch" not in found["seconds"]:
        return [Row(what, "computed exactly")]
    sketch, exact = found["seconds"]["sketch"], found["seconds"]["exact"]
    rows = [Row(f"{what}, exact beside", f"{sketch:.3f} s", f"{exact:.3f} s", f"{exact / sketch:.1f}x")]
    for variant, deviation in found["deviation"].items():
        rows.append(Row(f"{what}: deviation, `{variant}`", f"{deviation:.1e} of the task vector"))
    return rows


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    facts = {"machine": common.machine(1), "hfmerge": common.our_versions()}
    shapes = QUICK_SHAPES if options.quick else options.shapes
    found = common.ask("kernels", options.runs, *shapes)
    ceiling = found["ceilings"]["float64"]
    facts["greatest rate of a product"] = (
        f"{ceiling / 1e9:.0f} GFLOP/s in float64, {found['ceilings']['float32'] / 1e9:.0f} in float32, one thread"
    )
    facts["runs"] = f"the least of {options.runs} of each; alpha 0.5"
    rows = []
    for word in shapes:
        rows += profile_rows(word, found["shapes"][word], ceiling) + sketch_rows(word, found["shapes"][word])
    return common.report("One step of OPCM on one matrix", facts, rows)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=3)
    found.add_argument("--shapes", nargs="+", default=list(SHAPES), help="rows x columns (default: %(default)s)")
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
