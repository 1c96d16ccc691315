"""Runs an experiment on continual merging with the commands a user types, against a Hub on loopback.

    python -m evaluation.experiments quickstart        # four adapters and the project's own sentences; for everybody
    python -m evaluation.experiments orders BENCH      # OPCM against task arithmetic, six encoders, ten orders
    python -m evaluation.experiments eight BENCH       # the same of eight: two of the six split by their labels
    python -m evaluation.experiments alpha BENCH       # OPCM's alpha from 0.1 to 0.9: score, norm, interference
    python -m evaluation.experiments similarity BENCH  # task vectors of the six encoders, nothing merged
    python -m evaluation.experiments mdm_oc BENCH      # weights learned from replay or few rows, against fixed ones
    python -m evaluation.experiments mdm_oc_subspace BENCH  # OPCM's projections, with weights learned from replay
    python -m evaluation.experiments mdm_oc_adapters BENCH  # as mdm_oc, of four LoRA adapters
    python -m evaluation.experiments mdm_oc_iso BENCH  # isotropic shares of adapters, with learned weights
    python -m evaluation.experiments mdm_oc_iso_removal BENCH  # each of the four adapters taken out of each order
    python -m evaluation.experiments mdm_oc_ablation BENCH  # without consolidation, replay, orthogonality
    python -m evaluation.experiments mdm_oc_removal BENCH  # each of the six encoders taken out of each order
    python -m evaluation.experiments mdm_oc_labelled_removal BENCH  # of one order, with labelled rows
    python -m evaluation.experiments mdm_oc_subtraction BENCH  # of three encoders by subtraction, as in the paper

BENCH is described in `import_bench`. Results go to evaluation/results/<experiment>/. With `--keep FOLDER` the Hub, the
caches and what was measured stay there, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ALPHAS = ",".join(f"0.{i}" for i in range(1, 10))


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        recipes: files beside this one.
        flags: of `hfmerge continual`; empty: the recipe's models are inspected instead.
        bench: needs the models of BENCH.
        halves: needs those of `split_tasks` too.
    """

    recipes: tuple[str, ...]
    flags: tuple[str, ...]
    bench: bool = True
    halves: bool = False


BOTH = ("opcm.yaml", "task_arithmetic.yaml")
LEARNED = ("mdm_oc", "mdm_oc_replay", "mdm_oc_labelled", "gram", "gram_replay", "gram_labelled", "ties", "average")
ABLATED = ("mdm_oc", "mdm_oc_replay", "mdm_oc_no_ewc", "not_orthogonal_replay")
ADAPTERS = ("mdm_oc", "mdm_oc_replay", "mdm_oc_labelled", "gram", "iso_c", "ties", "average", "opcm")
ADAPTERS += ("task_arithmetic",)
ISOTROPIC = ("mdm_oc_iso_labelled", "mdm_oc_iso_replay", "iso_c")
EXPERIMENTS = {
    "quickstart": Experiment(
        tuple(f"quickstart/{name}" for name in BOTH),
        ("--suite", "quickstart", "--orders", "10"),
        bench=False,
    ),
    "orders": Experiment(BOTH, ("--suite", "text-encoders", "--orders", "10", "--limit", "100")),
    "eight": Experiment(
        tuple(f"eight/{name}" for name in BOTH),
        ("--suite", "evaluation/experiments/eight/suite.yaml", "--orders", "10", "--limit", "100")
        + ("--seed", "42", "--removals", "first"),
        halves=True,
    ),
    "alpha": Experiment(
        BOTH[:1],
        ("--suite", "text-encoders", "--orders", "1", "--limit", "100", "--removals", "none")
        + ("--sweep", f"method.options.alpha={ALPHAS}"),
    ),
    "similarity": Experiment(BOTH[:1], ()),
    "mdm_oc": Experiment(
        tuple(f"mdm_oc/{name}.yaml" for name in LEARNED) + BOTH,
        ("--suite", "text-encoders", "--orders", "5", "--limit", "100", "--removals", "none"),
    ),
    "mdm_oc_subspace": Experiment(
        ("mdm_oc/mdm_oc_subspace_replay.yaml", *BOTH[:1]),
        ("--suite", "text-encoders", "--orders", "5", "--limit", "100", "--removals", "none"),
    ),
    "mdm_oc_adapters": Experiment(
        tuple(f"mdm_oc_adapters/{name}.yaml" for name in ADAPTERS),
        ("--suite", "evaluation/experiments/mdm_oc_adapters/suite.yaml", "--orders", "5")
        + ("--limit", "100", "--removals", "none"),
    ),
    "mdm_oc_iso": Experiment(
        tuple(f"mdm_oc_adapters/{name}.yaml" for name in ISOTROPIC),
        ("--suite", "evaluation/experiments/mdm_oc_adapters/suite.yaml", "--orders", "5")
        + ("--limit", "100", "--removals", "none"),
    ),
    "mdm_oc_iso_removal": Experiment(
        ("mdm_oc_adapters/mdm_oc_iso_replay.yaml",),
        ("--suite", "evaluation/experiments/mdm_oc_adapters/suite.yaml", "--orders", "5")
        + ("--limit", "100", "--removals", "all"),
    ),
    "mdm_oc_ablation": Experiment(
        tuple(f"mdm_oc/{name}.yaml" for name in ABLATED),
        ("--suite", "text-encoders", "--orders", "2", "--limit", "100", "--removals", "none"),
    ),
    "mdm_oc_removal": Experiment(
        tuple(f"mdm_oc/{name}.yaml" for name in LEARNED[:2]),
        ("--suite", "text-encoders", "--orders", "5", "--limit", "100", "--removals", "all"),
    ),
    "mdm_oc_labelled_removal": Experiment(
        ("mdm_oc/mdm_oc_labelled.yaml",),
        ("--suite", "text-encoders", "--orders", "1", "--limit", "100"),
    ),
    "mdm_oc_subtraction": Experiment(
        ("mdm_oc_subtraction/mdm_oc.yaml", "mdm_oc_subtraction/mdm_oc_replay.yaml"),
        ("--suite", "evaluation/experiments/mdm_oc_subtraction/suite.yaml", "--orders", "1", "--limit", "100")
        + ("--mode", "subtract"),
    ),
}


def main() -> int:
    """Import, run, copy the results; 0 unless a command fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("bench", type=Path, nargs="?", help="see import_bench; not for quickstart")
    parser.add_argument("--keep", type=Path, help="folder for everything on the way; default: a temporary one")
    parser.add_argument("--output", type=Path, default=ROOT / "evaluation" / "results", help="folder for the results")
    args = parser.parse_args()
    chosen = EXPERIMENTS[args.experiment]
    if chosen.bench and (args.bench is None or not (args.bench / "data").is_dir()):
        print(f"skipped: {args.bench} is not there")
        return 0
    from hfmerge.hubserver.serve import HubServer

    with tempfile.TemporaryDirectory(prefix="hfmerge-experiment-") as temporary:
        work = (args.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        with HubServer(work / "hub") as server:
            environment = {**os.environ, **server.env(work / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

            def run(*command: str) -> None:
                subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, check=True)

            for name, importer in importers(chosen, args.bench, work).items():
                mark = work / f"imported-{name}"
                if not mark.exists():
                    run(*importer)
                    mark.touch()
            measure(chosen, run, work / args.experiment)
    publish(work / args.experiment, args.output / args.experiment)
    return 0


def importers(chosen: Experiment, bench: Path, work: Path) -> dict[str, list[str]]:
    """Name -> command that puts on the Hub what the experiment needs."""
    if not chosen.bench:
        return {"quickstart": ["recipes/quickstart/demo.py", "--upload"]}
    found = {"bench": ["-m", "evaluation.import_bench", str(bench)]}
    if chosen.halves:
        found["halves"] = ["-m", "evaluation.split_tasks", str(bench), "--work", str(work / "halves")]
    return found


def measure(chosen: Experiment, run: Callable[..., None], folder: Path) -> None:
    """The experiment's own command."""
    recipes = [str((HERE / name).relative_to(ROOT)) for name in chosen.recipes]
    arguments = ["continual", *recipes, *chosen.flags, "--output", str(folder)]
    if not chosen.flags:
        arguments = [
            "inspect",
            *recipes,
            "--output",
            str(folder / "inspection.json"),
            "--plot",
            str(folder / "figures"),
        ]
    print(f"\n$ hfmerge {' '.join(arguments)}", flush=True)
    run("-m", "hfmerge", *arguments)


def publish(folder: Path, target: Path) -> None:
    """Copy what is kept: tables, JSON and pictures, not what a repeat goes on from."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".md", ".csv"):
            shutil.copy2(path, target / path.name)
    shutil.copytree(folder / "figures", target / "figures")
    print(f"results are in {target}")


if __name__ == "__main__":
    sys.exit(main())
