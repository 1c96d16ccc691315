"""The command that measures continual merging: orders, sweeps, removals."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hfmerge.cli.shared import Command, notify, print_json
from hfmerge.cli.terminal import display
from hfmerge.errors import HfMergeError


def register(command: Command) -> None:
    """Add the command of this file."""
    sub = command(
        "continual",
        "Merge models one after another in several orders, score the tasks seen so far, and take every model out. "
        "To continue a killed run, repeat its command.",
        _continual,
    )
    sub.add_argument(
        "recipes", nargs="+", metavar="RECIPE.yaml", help="recipes to compare; all have the same base and models"
    )
    sub.add_argument(
        "--suite", required=True, metavar="SUITE", help="a ready suite or a YAML file with one task per model"
    )
    sub.add_argument("--orders", type=int, default=10, metavar="N", help="number of orders of arrival (default: 10)")
    sub.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the orders (default: 42)")
    sub.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="PATH=V1,V2",
        help="compare these values of a key, such as method.options.alpha=0.1,0.5",
    )
    sub.add_argument("--head", action="append", default=[], metavar="TASK=MODEL", help="model whose head a task uses")
    sub.add_argument("--limit", type=int, metavar="ROWS", help="rows of each task, a seeded sample (default: all)")
    sub.add_argument("--batch-size", type=int, default=32, metavar="ROWS", help="rows in a batch (default: 32)")
    sub.add_argument(
        "--removals", choices=("first", "all", "none"), default="first",
        help="orders after which every model is taken out again (default: the first)",
    )  # fmt: skip
    sub.add_argument(
        "--mode", choices=("exact", "subtract"), default="exact",
        help="how a model is taken out, as in unmerge (default: exact)",
    )  # fmt: skip
    sub.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="folder for the results, and for the work that a repeated command continues",
    )
    sub.add_argument("--no-plots", action="store_true", help="draw no pictures")


def _continual(args: argparse.Namespace) -> int:
    from hfmerge.evaluation.evaluator import Settings
    from hfmerge.evaluation.plots import draw_all
    from hfmerge.evaluation.plots.style import styled
    from hfmerge.evaluation.suite import load_suite
    from hfmerge.experiments.continual.config import sweep
    from hfmerge.experiments.continual.report import save_continual, to_markdown
    from hfmerge.experiments.continual.run import Experiment, run_continual
    from hfmerge.recipe.recipe import load_recipe

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HfMergeError(
            "continual: works in one process, since every step needs the one before; start it without torchrun or "
            "accelerate launch. `hfmerge merge`, `inspect` and `evaluate` share their work."
        )
    if args.orders < 1:
        raise HfMergeError(f"--orders {args.orders}: at least one order is needed.")
    pairs = [item.partition("=") for item in args.head]
    if bad := [item for item in args.head if "=" not in item]:
        raise HfMergeError(f"--head {bad[0]}: write TASK=MODEL.")
    several = len(args.recipes) > 1
    variants = []
    for path in args.recipes:
        recipe = load_recipe(path)
        label = Path(path).stem if several else "" if args.sweep else recipe.method.name
        variants += sweep(recipe, label, args.sweep)
    if not args.no_plots:
        with styled():  # what is missing is told before any work
            pass
    experiment = Experiment(
        tuple(variants),
        load_suite(args.suite),
        args.orders,
        args.seed,
        Settings(limit=args.limit, batch_size=args.batch_size),
        args.removals,
        args.mode,
        {task: model for task, _, model in pairs},
    )
    folder = Path(args.output)
    data = run_continual(experiment, folder, notify=None if args.quiet else notify)
    written = save_continual(data, folder)
    if not args.no_plots:
        written += draw_all([data], folder / "figures")
    if args.json:
        print_json(data)
        return 0
    display(*to_markdown(data).split("\n"))
    for path in written:
        display(f"written {path}")
    return 0
