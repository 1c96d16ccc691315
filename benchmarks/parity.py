"""Compares what hfmerge and mergekit make of the same models, by method: the relative difference, and its reason.

    python -m benchmarks.parity                          # installs mergekit in an environment of its own
    python -m benchmarks.parity --methods sce karcher
    python -m benchmarks.parity compare BASE PEER OURS   # two merged checkpoints: one JSON object

mergekit gets a file of its own format, and hfmerge reads that same file. The models are generated. The difference is
that of the two merged changes, in float32, over the norm of mergekit's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import BenchmarkError


RUNS = common.CACHE / "runs" / "parity"
CLOSE = 1e-5
"""Relative difference up to which two float32 results are said to be the same."""

DRAWN = (
    "the tools draw different random numbers; mergekit restores each tensor's sum of magnitudes, hfmerge divides by p"
)
ROUNDED = (
    "of equal magnitudes at the border hfmerge keeps all; it rounds the number of kept elements, mergekit cuts it off"
)
ANGLE = "mergekit takes the angle in float32"
APART = "where the mean cosine is negative hfmerge keeps the base, mergekit goes to its other side"


@dataclass(frozen=True)
class Case:
    """One comparison with mergekit.

    Attributes:
        overall, each: parameters of the merge, and of every model.
        models: how many models beside the base.
        reason: of a difference above `CLOSE`.
    """

    overall: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    models: int = 3
    reason: str = ""


WEIGHT = {"weight": 0.7}
CASES: dict[str, Case] = {
    "linear": Case(each=WEIGHT),
    "task_arithmetic": Case(each=WEIGHT),
    "ties": Case(each={**WEIGHT, "density": 0.3}, reason=ROUNDED),
    "slerp": Case({"t": 0.3}, models=1, reason=ANGLE),
    "dare_linear": Case(each={**WEIGHT, "density": 0.5}, reason=DRAWN),
    "dare_ties": Case(each={**WEIGHT, "density": 0.5}, reason=DRAWN),
    "della": Case(each={**WEIGHT, "density": 0.5}, reason=DRAWN),
    "della_linear": Case(each={**WEIGHT, "density": 0.5}, reason=DRAWN),
    "breadcrumbs": Case(each={**WEIGHT, "density": 0.3, "gamma": 0.02}, reason=ROUNDED),
    "breadcrumbs_ties": Case(each={**WEIGHT, "density": 0.3, "gamma": 0.02}, reason=ROUNDED),
    "sce": Case({"select_topk": 0.3}, reason=ROUNDED),
    "model_stock": Case(reason=APART),
    "nuslerp": Case(each=WEIGHT, models=2),
    "multislerp": Case(each=WEIGHT),
    "karcher": Case({"max_iter": 100, "tol": 1e-9}, reason=ANGLE),
    "nearswap": Case({"t": 0.001}, models=1),
    "arcee_fusion": Case(models=1, reason="mergekit computes divergences in float32, hfmerge in float64"),
}


def configuration(method: str, case: Case, base: Path, models: Sequence[Path]) -> dict[str, Any]:
    """A merge in mergekit's format."""
    entries = [{"model": str(model), "parameters": dict(case.each)} for model in models[: case.models]]
    data: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32"}
    # linear has no base among its models here
    if method != "linear":
        data["base_model"] = str(base)
    return data | ({"parameters": dict(case.overall)} if case.overall else {})


def beside_mergekit(method: str, case: Case, base: Path, models: Sequence[Path], threads: int) -> tuple[str, str]:
    """The relative difference to mergekit, as text, and a reason; without mergekit's environment only ours is run."""
    file, ours, peer = RUNS / f"{method}.yml", RUNS / f"{method}-ours", RUNS / f"{method}-mergekit"
    RUNS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(configuration(method, case, base, models), indent=2))
    common.measure([*common.OURS, "merge", file, "--output", ours / "out", "--quiet"], threads=threads, scratch=ours)
    program = common.MERGEKIT.bin / "mergekit-yaml"
    if not program.exists():
        return "not run", "mergekit is not installed"
    common.measure([program, file, peer / "out", "--quiet", "--no-copy-tokenizer"], threads=threads, scratch=peer)
    return _told(base, peer / "out", ours / "out", case.reason)


def _told(base: Path, peer: Path, ours: Path, reason: str) -> tuple[str, str]:
    found = common.ask("parity", "compare", base, peer, ours)
    difference = f"{found['difference']:.1e}"
    if found["difference"] <= CLOSE:
        return difference, ""
    where = f"largest in {found['where']}" if found["where"] else ""
    return difference, reason or f"no reason is known; {where}"


def compare(base: Path, wanted: Path, found: Path) -> dict[str, Any]:
    """Norm of the difference of two merged changes over the norm of the first; and the tensor that differs most."""
    import torch
    from safetensors.torch import load_file

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}

    origin, first, second = tensors(base), tensors(wanted), tensors(found)
    apart: dict[str, float] = {}
    square = 0.0
    for name, value in origin.items():
        one, other = first[name].double() - value.double(), second[name].double() - value.double()
        apart[name] = float(torch.linalg.vector_norm(one - other)) ** 2
        square += float(torch.linalg.vector_norm(one)) ** 2
    worst = max(apart, key=lambda name: apart[name])
    return {"difference": (sum(apart.values()) / square) ** 0.5, "where": worst}


def main() -> None:
    """Merge with both tools and print the table; differences are figures here, and fail nothing."""
    if sys.argv[1:2] == ["compare"]:
        print(json.dumps(compare(*map(Path, sys.argv[2:5]))))
        return
    options = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    options.add_argument("--methods", nargs="+", choices=CASES, help="of mergekit's (default: all)")
    options.add_argument("--no-peers", action="store_true", help="install nothing; mergekit is run if it is there")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    if not given.no_peers:
        common.install(common.MERGEKIT)
    base, models = common.generate_models("llama", 3, quick=True)
    print("## The same models in other tools\n")
    print(
        "* models: tiny generated ones, merged in float32; the difference of the merged changes over the peer's norm"
    )
    print(f"* peers: {_versions()}\n")
    print("| method | peer | relative difference | reason where above 1e-5 |\n|---|---|---|---|")
    for method in given.methods or CASES:
        _row(
            method,
            "mergekit",
            lambda method=method: beside_mergekit(method, CASES[method], base, models, given.threads),
        )


def _row(method: str, peer: str, work: Any) -> None:
    try:
        difference, reason = work()
    except BenchmarkError as error:
        difference, reason = "failed", " ".join(str(error).split())[-200:]
    print(f"| `{method}` | {peer} | {difference} | {reason} |", flush=True)


def _versions() -> str:
    peer = common.MERGEKIT.python
    return common.versions(peer, ("mergekit",)) if peer.exists() else "none"


if __name__ == "__main__":
    main()
