"""Scores of sources and merges, by Hub ID against a Hub on loopback, with the commands a user types.

    python -m evaluation.tables quickstart                         # for everybody
    python -m evaluation.tables text-encoders BENCH [--adapters]      # real fine-tunes, see import_bench

Imports the models, merges all sources once a method, evaluates base, sources and merges on the suite of that name,
puts the results into the card of one merge, and writes evaluation/results/<name>.json, .md and .csv; <name>-summary.md
is the part of it that compares methods: each source on its own task, the base's encoder under their heads, the merges.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from evaluation.import_bench import BASE, LORA, model_id, tasks_of
from hfmerge.evaluation.results import Matrix, load_results, table


ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, list[str]] = {
    "linear": ["--method", "linear"],
    "task-arithmetic": ["--method", "task_arithmetic", "--option", "scale=0.3"],
    "ties": ["--method", "ties", "--option", "density=0.2", "--option", "scope=model"],
    "opcm": ["--method", "opcm", "--option", "alpha=0.5", "--option", "variant=code"],
}
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

    if args.suite == "quickstart":
        run("recipes/quickstart/demo.py", "--upload")
        sources = {task: f"quickstart/minilm-{task}" for task in QUICKSTART}
    else:
        run("-m", "evaluation.import_bench", str(args.bench))
        kind, ending = ("adapters", LORA) if args.adapters else ("full", "")
        sources = {task: model_id(task) + ending for task in tasks_of(args.bench, kind)}
    group = "quickstart" if args.suite == "quickstart" else "bench"
    merges = [f"{group}/merged-{name}" for name in METHODS]
    for repo_id, flags in zip(merges, METHODS.values(), strict=True):
        hfmerge("merge", "--base", BASE, *flags, "--state", "none", "-q", "--push-to", repo_id, *sources.values())
    name = args.suite + ("-adapters" if args.adapters else "")
    asked = ["--suite", args.suite, "--by-task", "--output", str(args.output / name), "-q"]
    asked += [flag for task, model in sources.items() for flag in ("--task", task, "--head", f"{task}={model}")]
    asked += ["--limit", str(args.limit)] if args.limit else []
    hfmerge("evaluate", BASE, *sources.values(), *merges, *asked, "--push", merges[-1])
    hfmerge("verify", merges[-1])
    text = summary(load_results(args.output / f"{name}.json"), sources, dict(zip(METHODS, merges, strict=True)))
    (args.output / f"{name}-summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    if args.suite == "quickstart":
        # the recipe's own merge, whose golden card shows these results
        hfmerge("merge", "recipes/quickstart/recipe.yaml", "--output", str(work / "merged"), "-q")
        models = [MERGED, *(sources[task] for task in RECIPE_TASKS)]
        asked = ["--suite", "quickstart", *(word for task in RECIPE_TASKS for word in ("--task", task))]
        place = str(args.output / "quickstart-recipe")
        hfmerge("evaluate", *models, *asked, "--output", place, "--push", MERGED, "-q")


def summary(matrix: Matrix, sources: Mapping[str, str], merges: Mapping[str, str]) -> str:
    """A Markdown table: one row a task; each task's own source alone, the base's encoder, and every merge.

    Args:
        sources: task -> model.
        merges: column -> model.
    """
    rows: dict[str, list[float]] = {}
    for task in matrix.tasks:
        scores = [matrix.score(model, task.name) for model in (sources[task.name], BASE, *merges.values())]
        found = [score for score in scores if score is not None]
        rows[f"{task.name} ({found[0].n} rows)"] = [score.value for score in found]
    rows["**mean**"] = [sum(values) / len(values) for values in zip(*rows.values(), strict=True)]
    cells = [[f"{value:.3f}" for value in values] for values in rows.values()]
    return table("task", ["alone", "base encoder", *merges], list(rows), cells)


if __name__ == "__main__":
    sys.exit(main())
