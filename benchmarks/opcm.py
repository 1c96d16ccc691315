"""Times OPCM on eight CLIP-ViT-B/32 vision towers against FusionBench, and checks the numbers of both.

Speed: the time each tool itself reports for merging, and the whole command with start-up. Numbers: every variant of
hfmerge, and FusionBench's result, against the float64 transcription in `reference_opcm.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from benchmarks.common import BenchmarkError, Row, Sample


SPEED_GOAL = 20.0
DIFFERENCE_GOAL = 1e-5
VARIANTS = ("code", "code-no-diagonal", "paper")
RUNS = common.CACHE / "runs"


def our_command(base: Path, models: Sequence[Path], alpha: float, variant: str, output: Path) -> list[str | Path]:
    """The `hfmerge merge` call; no state is written, as FusionBench writes none."""
    options = ["--option", f"alpha={alpha}", "--option", f"variant={variant}", "--state", "none", "--quiet", "--json"]
    return [*common.OURS, "merge", "--base", base, "--method", "opcm", *options, "--output", output, *models]


def run_ours(base: Path, models: Sequence[Path], alpha: float, variant: str, threads: int) -> Sample:
    """Run hfmerge once; `inside` is "merging" of its own report: reading, computing and writing."""
    scratch = RUNS / f"hfmerge-opcm-{variant}"
    sample = common.measure(
        our_command(base, models, alpha, variant, scratch / "out"), threads=threads, scratch=scratch
    )
    return replace(sample, inside=seconds_inside(sample.output))


def seconds_inside(output: str) -> float:
    """`seconds.merging` of the JSON object that `hfmerge merge --json` prints, whatever else is printed around it."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"^\{", output, re.MULTILINE):
        try:
            found, _ = decoder.raw_decode(output, match.start())
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and "merging" in found.get("seconds", {}):
            return float(found["seconds"]["merging"])
    raise BenchmarkError(f"no JSON object with seconds.merging in the output of hfmerge:\n{output[-2000:]}")


def pool(base: Path, models: Sequence[Path]) -> str:
    """A FusionBench model pool, in its own configuration format."""
    entries = "".join(f"  {model.name}: {model}\n" for model in models)
    head = "_target_: fusion_bench.modelpool.CLIPVisionModelPool\n_recursive_: false\nprocessor: null\n"
    return f"{head}models:\n  _pretrained_: {base}\n{entries}"


def peer_command(alpha: float, configuration: Path, output: Path, logs: Path) -> list[str | Path]:
    """FusionBench's own command with its OPCM, given order, no checkpoint or evaluation after each step."""
    method = [
        "method=opcm/opcm_general",
        f"method.alpha={alpha}",
        "method.shuffle_order=false",
        "method.save_on_every_step=false",
        "method.evaluate_on_every_step=false",
    ]
    where = [f"merged_model_save_path={output}", f"path.output_dir={logs}"]
    program = common.FUSION_BENCH.bin / "fusion_bench"
    pools = ["modelpool=generated", "taskpool=dummy"]
    return [program, "--config-dir", configuration, "fabric.accelerator=cpu", *method, *pools, *where]


def run_peer(base: Path, models: Sequence[Path], alpha: float, threads: int) -> Sample:
    """Run FusionBench once; `inside` is its profiler's total of "merging model": neither loading nor saving."""
    configuration, scratch = RUNS / "fusion-bench-configuration", RUNS / "fusion-bench-opcm"
    (configuration / "modelpool").mkdir(parents=True, exist_ok=True)
    (configuration / "modelpool" / "generated.yaml").write_text(pool(base, models))
    command = peer_command(alpha, configuration, scratch / "out", scratch / "logs")
    sample = common.measure(command, threads=threads, scratch=scratch)
    found = re.search(r"^\|\s*merging model\s*\|[^|]*\|[^|]*\|\s*([\d.]+)", sample.output, re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"no profile of merging in the output of fusion_bench:\n{sample.output[-2000:]}")
    return replace(sample, inside=float(found.group(1)))


def reference(base: Path, models: Sequence[Path], alpha: float, variant: str) -> Path:
    """The transcription's result, computed unless this code has already computed it for these models."""
    sources = [(common.HERE / name).read_bytes() for name in ("reference_opcm.py", "models.py")]
    digest = hashlib.sha256(b"\0".join(sources)).hexdigest()[:12]
    target = common.CACHE / "reference" / f"opcm-{variant}-{alpha}-{len(models)}-{digest}.safetensors"
    if not target.exists():
        common.progress(f"computing the float64 transcription, variant {variant} (minutes)")
        _reference("compute", base, variant, alpha, target, *models)
    return target


def _reference(*words: object) -> str:
    command = [sys.executable, "-m", "benchmarks.reference_opcm", *(str(word) for word in words)]
    done = subprocess.run(command, check=True, cwd=common.HERE.parent, stdout=subprocess.PIPE, text=True)
    return done.stdout


def compare(base: Path, wanted: Path, found: Path) -> dict[str, float]:
    """Relative differences of two merged task vectors; see `reference_opcm.compare`."""
    result: dict[str, float] = json.loads(_reference("compare", base, wanted, found))
    return result


def speed_rows(samples: dict[str, list[Sample]]) -> list[Row]:
    """Medians of merging, whole command, processor time and memory, and the ratios."""
    ours, peer = samples["hfmerge"], samples.get("FusionBench", [])
    rows = []
    for figure, label in (("inside", "merging"), ("wall", "whole command"), ("cpu", "processor time")):
        cells = (label, common.spread(ours, figure))
        if not peer:
            rows.append(Row(*cells))
            continue
        ratio = common.median(peer, figure) / common.median(ours, figure)
        goal = f"≥ {SPEED_GOAL:.0f}x" if figure == "inside" else ""
        met = ratio >= SPEED_GOAL if goal else None
        rows.append(Row(*cells, common.spread(peer, figure), f"{ratio:.1f}x", goal, met))
    peak = common.median(ours, "peak")
    if peer:
        other = common.median(peer, "peak")
        rows.append(Row("peak memory", common.mib(peak), common.mib(other), f"{peak / other:.2f}"))
    else:
        rows.append(Row("peak memory", common.mib(peak)))
    return rows


def number_rows(base: Path, models: Sequence[Path], alpha: float, threads: int, peers: bool) -> list[Row]:
    """Differences to the transcription; the `code` result of hfmerge and the peer's are those of the timed runs."""
    rows = []
    goal = f"≤ {DIFFERENCE_GOAL:.0e}"
    for variant in VARIANTS:
        if variant != "code":
            run_ours(base, models, alpha, variant, threads)
        wanted = reference(base, models, alpha, variant)
        found = compare(base, wanted, RUNS / f"hfmerge-opcm-{variant}" / "out")
        value = f"{found['relative']:.1e} (rounding to float32 alone: {found['rounding']:.1e})"
        met = found["relative"] <= DIFFERENCE_GOAL
        rows.append(Row(f"difference to float64, `{variant}`", value, goal=goal, met=met))
    if peers:
        theirs = RUNS / "fusion-bench-opcm" / "out"
        wanted = reference(base, models, alpha, "code-whole-diagonal")
        own_rule = compare(base, wanted, theirs)["direction"]
        figure = "FusionBench to float64 with its rule for the diagonal, without class embedding"
        rows.append(Row(figure, "", f"{own_rule:.1e}"))
        direct = compare(base, theirs, RUNS / "hfmerge-opcm-code" / "out")["direction"]
        rows.append(Row("hfmerge `code` to FusionBench, without class embedding", f"{direct:.1e}"))
    return rows


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    peers = not options.no_peers
    facts = {"machine": common.machine(options.threads)}
    base, models = common.generate_models("clip-vision", options.models)
    common.warm([base, *models])
    runners = {"hfmerge": lambda: run_ours(base, models, options.alpha, "code", options.threads)}
    facts["hfmerge"] = common.our_versions()
    placeholder = [Path(f"model-00 .. model-{len(models) - 1:02d}")]
    facts["hfmerge command"] = common.shown(our_command(Path("base"), placeholder, options.alpha, "code", Path("out")))
    if peers:
        common.install(common.FUSION_BENCH)
        runners["FusionBench"] = lambda: run_peer(base, models, options.alpha, options.threads)
        facts["peer"] = common.versions(common.FUSION_BENCH.python, ("fusion-bench", "torch", "transformers"))
        shown = peer_command(options.alpha, Path("configuration"), Path("out"), Path("logs"))
        facts["peer command"] = common.shown(shown)
    samples = common.alternate(runners, options.runs)
    facts["runs"] = f"{options.runs} of each, alternating; medians (range); {len(models)} models of 350 MB, float32"
    rows = speed_rows(samples)
    if not options.no_check:
        rows += number_rows(base, models, options.alpha, options.threads, peers)
    return common.report("OPCM on CLIP-ViT-B/32 vision towers", facts, rows)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=3)
    found.add_argument("--models", type=int, default=8, help="fine-tunes to merge (default: %(default)s)")
    found.add_argument("--alpha", type=float, default=0.5, help="OPCM's alpha (default: %(default)s)")
    found.add_argument("--no-check", action="store_true", help="leave out the comparison with the transcription")
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
