"""Scores of sources and merges, by Hub ID against a Hub on loopback, with the commands a user types.

    python -m evaluation.tables quickstart                         # for everybody
    python -m evaluation.tables text-encoders BENCH [--adapters]      # real fine-tunes, see import_bench

Imports the models, merges all sources once a method, evaluates base, sources and merges on the suite of that name,
puts the results into the card of one merge, and writes evaluation/results/<name>.json, .md and .csv, and a picture;
<name>-summary.md is the part of it that compares methods: each source on its own task, the base's encoder under their
heads, the merges, and what training gives where results/baselines*/ have it for the same rows (see train_baselines).
For the quickstart also what recipes/quickstart/recipe.yaml makes, whose card then has its results and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from evaluation.import_bench import BASE, LORA, model_id, tasks_of
from hfmerge.evaluation.results import Matrix, load_results, markdown_table
from hfmerge.validation.quoting import Markdown


ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, list[str]] = {
    "linear": ["--method", "linear"],
    "task-arithmetic": ["--method", "task_arithmetic", "--option", "scale=0.3"],
    "ties": ["--method", "ties", "--option", "density=0.2", "--option", "scope=model"],
    "opcm": ["--method", "opcm", "--option", "alpha=0.5", "--option", "variant=code"],
    "mdm_oc": ["--method", "mdm_oc", "--norm", "mean"],
    "gram": ["--method", "gram"],
    "iso_c": ["--method", "iso_c"],
}
"""Column -> flags of `hfmerge merge`; what is not said is the method's default."""
QUICKSTART = ("clinc_domain", "snips", "sms_spam", "mr")
RECIPE_TASKS = QUICKSTART[:3]
MERGED = "quickstart/minilm-merged"
"""What recipes/quickstart/recipe.yaml makes, of which tasks."""


def main() -> int:
    """Import, merge, evaluate; 0 unless a command fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("suite", choices=("quickstart", "text-encoders"))
    parser.add_argument("bench", type=Path, nargs="?", help="for text-encoders")
    parser.add_argument("--adapters", action="store_true", help="the LoRA adapters instead of the full fine-tunes")
    parser.add_argument("--limit", type=int, help="rows a task; default: all")
    parser.add_argument(
        "--keep", type=Path, help="folder for the Hub's store and the caches; default: a temporary one"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "evaluation" / "results", help="folder for the results")
    args = parser.parse_args()
    if args.suite == "text-encoders" and (args.bench is None or not (args.bench / "data").is_dir()):
        print(f"skipped: {args.bench} is not there")
        return 0
    from hfmerge.hubserver.serve import HubServer

    with tempfile.TemporaryDirectory(prefix="hfmerge-tables-") as temporary:
        work = (args.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        with HubServer(work / "hub") as server:
            environment = {**os.environ, **server.env(work / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            make_table(args, environment, work)
    return 0


def make_table(args: argparse.Namespace, environment: dict[str, str], work: Path) -> None:
    """Everything, on the Hub that `environment` names; `work` is for what is only needed meanwhile."""

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, check=True)

    def hfmerge(*arguments: str) -> None:
        print(f"\n$ hfmerge {' '.join(arguments)}", flush=True)
        run("-m", "hfmerge", *arguments)

    ending = ""
    if args.suite == "quickstart":
        run("recipes/quickstart/demo.py", "--upload")
        sources = {task: f"quickstart/minilm-{task}" for task in QUICKSTART}
    else:
        run("-m", "evaluation.import_bench", str(args.bench))
        kind, ending = ("adapters", LORA) if args.adapters else ("full", "")
        sources = {task: model_id(task) + ending for task in tasks_of(args.bench, kind)}
    group = "quickstart" if args.suite == "quickstart" else "bench"
    merges = [f"{group}/merged-{name}{ending}" for name in METHODS]
    for repo_id, flags in zip(merges, METHODS.values(), strict=True):
        hfmerge("merge", "--base", BASE, *flags, "--state", "none", "-q", "--push-to", repo_id, *sources.values())
    name = args.suite + ("-adapters" if args.adapters else "")
    asked = ["--suite", args.suite, "--by-task", "--output", str(args.output / name), "-q"]
    asked += [flag for task, model in sources.items() for flag in ("--task", task, "--head", f"{task}={model}")]
    asked += ["--limit", str(args.limit)] if args.limit else []
    hfmerge("evaluate", BASE, *sources.values(), *merges, *asked, "--push", merges[-1])
    hfmerge("verify", merges[-1])
    results = args.output / f"{name}.json"
    hfmerge("plot", str(results), "--output", str(args.output / f"{name}-figures"))
    trained = load_baselines(args.output) if name == "text-encoders" else {}
    text = summary(load_results(results), sources, dict(zip(METHODS, merges, strict=True)), trained)
    (args.output / f"{name}-summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    if args.suite == "quickstart":
        merge_of_recipe(args.output / "quickstart-recipe", [sources[task] for task in RECIPE_TASKS], work, hfmerge)


def merge_of_recipe(stem: Path, sources: list[str], work: Path, hfmerge: Callable[..., None]) -> None:
    """The quickstart recipe's merge on the Hub, its results and pictures in its card; model_cards/ shows the same."""
    merged, results, inspected = work / "merged", f"{stem}.json", f"{stem}-inspection.json"
    shutil.rmtree(merged, ignore_errors=True)
    hfmerge("merge", "recipes/quickstart/recipe.yaml", "--output", str(merged), "-q")
    asked = ["--suite", "quickstart", *(word for task in RECIPE_TASKS for word in ("--task", task)), "-q"]
    hfmerge("evaluate", MERGED, *sources, *asked, "--output", str(stem))
    hfmerge("inspect", MERGED, "--output", inspected, "-q")
    hfmerge("plot", inspected, results, "--card", str(merged))
    hfmerge("push", str(merged), MERGED)
    hfmerge("evaluate", MERGED, *sources, *asked, "--output", str(stem), "--push", MERGED)
    hfmerge("verify", MERGED)


def load_baselines(results: Path) -> dict[str, dict[str, tuple[float, int]]]:
    """Column -> task -> score and rows of what was trained in place of merging; {} if nothing was."""
    trained = {}
    for path in sorted(results.glob("baselines*/baselines.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        many = f"{data['settings']['rows']} rows"
        columns = {f"sequential training, {many}": run["final"] for run in data["sequential"][:1]}
        columns[f"multi-task training, {many}"] = data["multi_task"]
        for column, found in columns.items():
            scores = {task: (found[str(i)], data["test_rows"][i]) for i, task in enumerate(data["tasks"])}
            trained[column] = scores
    return trained


def summary(
    matrix: Matrix,
    sources: Mapping[str, str],
    merges: Mapping[str, str],
    trained: Mapping[str, Mapping[str, tuple[float, int]]],
) -> str:
    """A Markdown table: one row a task; each task's own source alone, the base's encoder, and every merge.

    Args:
        sources: task -> model.
        merges: column -> model.
        trained: see `load_baselines`; left out unless it was scored on the same number of rows.
    """
    rows: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for task in matrix.tasks:
        scores = [matrix.score(model, task.name) for model in (sources[task.name], BASE, *merges.values())]
        found = [score for score in scores if score is not None]
        rows[task.name], counts[task.name] = [score.value for score in found], found[0].n
    same = [name for name, column in trained.items() if {task: n for task, (_, n) in column.items()} == counts]
    for task_name, values in rows.items():
        values += [trained[name][task_name][0] for name in same]
    rows = {f"{task_name} ({counts[task_name]} rows)": values for task_name, values in rows.items()}
    rows[Markdown("**mean**")] = [sum(values) / len(values) for values in zip(*rows.values(), strict=True)]
    cells = [[f"{value:.3f}" for value in values] for values in rows.values()]
    return markdown_table("task", ["alone", "base encoder", *merges, *same], list(rows), cells)


if __name__ == "__main__":
    sys.exit(main())
