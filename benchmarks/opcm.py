"""Times OPCM on eight CLIP-ViT-B/32 vision towers and BERT-base encoders against FusionBench; checks the numbers.

Speed: the time each tool itself reports for merging, and the whole command with start-up; then where hfmerge's goes.
Numbers, on the vision towers: every variant of hfmerge, and FusionBench's result, against the float64 transcription in
`reference_opcm.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from benchmarks.common import BenchmarkError, Row, Sample
from benchmarks.kinds import KINDS, QUICK, Kind


SPEED_GOAL = 30.0
PEAK_GOAL = 0.25
DIFFERENCE_GOAL = 1e-5
TITLES = {"clip-vision": "CLIP-ViT-B/32 vision towers", "bert": "BERT-base encoders"}
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
    return replace(sample, inside=common.seconds_inside(sample.output))


def pool(kind: str, base: Path, models: Sequence[Path]) -> str:
    """A FusionBench model pool, in its own configuration format."""
    folders = {"_pretrained_": base, **{model.name: model for model in models}}
    if kind == "clip-vision":
        head = "_target_: fusion_bench.modelpool.CLIPVisionModelPool\n_recursive_: false\nprocessor: null\n"
        return f"{head}models:\n" + "".join(f"  {name}: {folder}\n" for name, folder in folders.items())
    entries = "".join(
        f"  {name}:\n    _target_: transformers.BertModel.from_pretrained\n"
        f"    pretrained_model_name_or_path: {folder}\n"
        for name, folder in folders.items()
    )
    return f"_target_: fusion_bench.modelpool.BaseModelPool\n_recursive_: false\nmodels:\n{entries}"


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


def run_peer(kind: str, base: Path, models: Sequence[Path], alpha: float, threads: int) -> Sample:
    """Run FusionBench once; `inside` is its profiler's total of "merging model": neither loading nor saving."""
    configuration, scratch = RUNS / "fusion-bench-configuration", RUNS / "fusion-bench-opcm"
    (configuration / "modelpool").mkdir(parents=True, exist_ok=True)
    (configuration / "modelpool" / "generated.yaml").write_text(pool(kind, base, models))
    command = peer_command(alpha, configuration, scratch / "out", scratch / "logs")
    sample = common.measure(command, threads=threads, scratch=scratch)
    found = re.search(r"^\|\s*merging model\s*\|[^|]*\|[^|]*\|\s*([\d.]+)", sample.output, re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"no profile of merging in the output of fusion_bench:\n{sample.output[-2000:]}")
    return replace(sample, inside=float(found.group(1)))


def reference(base: Path, models: Sequence[Path], alpha: float, variant: str) -> Path:
    """The transcription's result, computed unless this code has already computed it for these models."""
    sources = [(common.HERE / name).read_bytes() for name in ("reference_opcm.py", "models.py", "kinds.py")]
    digest = hashlib.sha256(b"\0".join([*sources, base.parent.name.encode()])).hexdigest()[:12]
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
        goal = f"≤ {PEAK_GOAL}"
        cells = (common.mib(peak), common.mib(other), f"{peak / other:.2f}", goal, peak <= PEAK_GOAL * other)
        rows.append(Row("peak memory", *cells))
    else:
        rows.append(Row("peak memory", common.mib(peak)))
    return rows


def matrices(kind: Kind) -> Counter[str]:
    """How many matrices of each shape OPCM takes apart: "3072x768" -> 24."""
    found: Counter[str] = Counter()
    for name, shape in kind.shapes(kind.config):
        if len(shape) == 2 and "embedding" not in name:
            found[f"{max(shape)}x{min(shape)}"] += 1
    return found


def profile_rows(kind: Kind, models: int, merging: float, options: argparse.Namespace) -> list[Row]:
    """Where hfmerge's time goes, from single steps on one thread, and the least it could be."""
    shapes = matrices(kind)
    found = common.ask("kernels", 3, *shapes)
    ceiling = found["ceilings"]["float64"]
    steps = {word: count * (models - 1) for word, count in shapes.items()}
    each = {word: found["shapes"][word] for word in shapes}
    eigen = sum(steps[word] * each[word]["seconds"]["eigenvectors"] for word in shapes)
    exact = sum(steps[word] * each[word]["seconds"]["exact"] for word in shapes)
    flops = sum(steps[word] * each[word]["flops"] for word in shapes)
    cores, products = options.threads, max(exact - eigen, 1e-9)
    return [
        Row("projections alone, all steps, processor time", f"{exact:.0f} s", "", f"{exact / cores / merging:.0%}"),
        Row("of it eigenvectors in float64", f"{eigen:.0f} s", "", f"{eigen / exact:.0%}"),
        Row(
            "of it matrix products in float64",
            f"{products:.0f} s",
            "",
            f"{products / exact:.0%}, {flops / products / 1e9:.0f} of {ceiling / 1e9:.0f} GFLOP/s a core",
        ),
        Row("least time of the eigenvectors on all threads", f"{eigen / cores:.1f} s"),
    ]


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
    if options.check == "only-layer":
        facts = {"machine": common.machine(options.threads), "hfmerge": common.our_versions()}
        return common.report("OPCM against float64", facts, layer_rows(options))
    return "\n".join(report(kind, options) for kind in options.kinds)


def layer_rows(options: argparse.Namespace) -> list[Row]:
    """The differences on towers of one layer, whose matrices are as large and as many models'."""
    base, models = common.generate_models("clip-vision-layer", options.models, quick=options.quick)
    run_ours(base, models, options.alpha, "code", options.threads)
    return number_rows(base, models, options.alpha, options.threads, peers=False)


def report(kind: str, options: argparse.Namespace) -> str:
    """One family of models."""
    peers = not options.no_peers
    facts = {"machine": common.machine(options.threads)}
    base, models = common.generate_models(kind, options.models, quick=options.quick)
    common.warm([base, *models])
    runners = {"hfmerge": lambda: run_ours(base, models, options.alpha, "code", options.threads)}
    facts["hfmerge"] = common.our_versions()
    placeholder = [Path(f"model-00 .. model-{len(models) - 1:02d}")]
    facts["hfmerge command"] = common.shown(our_command(Path("base"), placeholder, options.alpha, "code", Path("out")))
    if peers:
        common.install(common.FUSION_BENCH)
        runners["FusionBench"] = lambda: run_peer(kind, base, models, options.alpha, options.threads)
        facts["peer"] = common.versions(common.FUSION_BENCH.python, ("fusion-bench", "torch", "transformers"))
        shown = peer_command(options.alpha, Path("configuration"), Path("out"), Path("logs"))
        facts["peer command"] = common.shown(shown)
    samples = common.alternate(runners, options.runs)
    size = common.mib((base / "model.safetensors").stat().st_size)
    facts["runs"] = f"{options.runs} of each, alternating; medians (range); {len(models)} models of {size}, float32"
    facts["profile"] = "single steps on one thread, times their number; shares are of the row above and of merging"
    rows = speed_rows(samples)
    shapes = (QUICK if options.quick else KINDS)[kind]
    rows += profile_rows(shapes, len(models), common.median(samples["hfmerge"], "inside"), options)
    if options.check == "layer" and kind == "clip-vision":
        rows += layer_rows(options)
    elif options.check == "all" and kind == "clip-vision":
        rows += number_rows(base, models, options.alpha, options.threads, peers)
    return common.report(f"OPCM on {TITLES[kind]}", facts, rows)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=3)
    found.add_argument("--kinds", nargs="+", choices=list(TITLES), default=list(TITLES), help="(default: all)")
    found.add_argument("--models", type=int, default=8, help="fine-tunes to merge (default: %(default)s)")
    found.add_argument("--alpha", type=float, default=0.5, help="OPCM's alpha (default: %(default)s)")
    found.add_argument(
        "--check", choices=["all", "layer", "only-layer", "none"], default="all",
        help="compare whole towers with the transcription (about 20 minutes), towers of one layer, these alone and "
        "no times, or nothing (default: %(default)s)",
    )  # fmt: skip
    return found


if __name__ == "__main__":
    print(run(parser().parse_args()), end="")
