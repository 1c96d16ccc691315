"""Commands that change an existing merge: add, unmerge."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hfmerge.cli.shared import (
    Command,
    alias_flag,
    aliases_from_flags,
    carry_out,
    change_arguments,
    change_flags,
    first_process,
    print_result,
    weighted,
)
from hfmerge.cli.terminal import display
from hfmerge.errors import HfMergeError, Problem
from hfmerge.recipe.overrides import with_aliases
from hfmerge.validation.strict_yaml import parse_scalar


if TYPE_CHECKING:
    from hfmerge.lifecycle.check_removal import Behaviour


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("add", "Merge further models into an existing merge.", _add)
    sub.add_argument("merged", metavar="MERGED", help="org/name or folder of a merge")
    sub.add_argument(
        "models", nargs="+", metavar="MODEL[=WEIGHT]", help="models that join, each with its weight (default: 1)"
    )
    sub.add_argument(
        "--weight", action="append", metavar="W", help="weight of a new model; one per model, in order (default: 1)"
    )
    alias_flag(sub)
    change_flags(sub)
    sub = command("unmerge", "Take models out. The result has the bytes of the merge that never saw them.", _unmerge)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument(
        "--remove",
        action="append",
        required=True,
        metavar="MODEL",
        help="name of the model to take out; may be given several times",
    )
    sub.add_argument(
        "--inner-to",
        metavar="PLACE",
        help="org/name or ./folder for an inner merge that is made again without MODEL (default: beside MERGED)",
    )
    sub.add_argument(
        "--mode",
        choices=("exact", "subtract"),
        default="exact",
        help="subtract: subtract MODEL approximately; this is not a removal (default: exact)",
    )
    sub.add_argument(
        "--measure", action="store_true", help="with --mode subtract: measure the gap to an exact removal"
    )
    sub.add_argument(
        "--check",
        metavar="SUITE",
        help="score this suite before, after, for the base, and for a merge that never saw MODEL",
    )
    change_flags(sub)


def _add(args: argparse.Namespace) -> int:
    models, weights = weighted(args.models, args.weight)
    if weights is not None and len(weights) != len(models):
        raise HfMergeError(f"--weight: {len(weights)} given for {len(models)} models; give one a model.")
    numbers = [parse_scalar(weight) for weight in weights or ["1"] * len(models)]
    entries = [{"model": model, "weight": weight} for model, weight in zip(models, numbers, strict=True)]
    problems: list[Problem] = []
    entries = with_aliases(entries, aliases_from_flags(args), problems)
    if problems:
        raise HfMergeError(f"--alias: {problems[0].text}.")
    return carry_out(args, "add", args.merged, entries, **change_arguments(args))


def _unmerge(args: argparse.Namespace) -> int:
    if args.check is not None:
        from hfmerge import api

        if args.dry_run:
            raise HfMergeError("--check: give it without --dry-run.")
        if args.inner_to is not None:
            raise HfMergeError("--check: give it without --inner-to.")
        result, behaviour = api.unmerge_checked(
            args.merged, args.remove, args.check, mode=args.mode, measure=args.measure, **change_arguments(args)
        )
        return print_result(args, result, {"check": behaviour.to_dict()}) or _print_behaviour(args, behaviour)
    return carry_out(
        args,
        "unmerge",
        args.merged,
        args.remove,
        inner_to=args.inner_to,
        mode=args.mode,
        measure=args.measure,
        **change_arguments(args),
    )


def _print_behaviour(args: argparse.Namespace, behaviour: Behaviour) -> int:
    if args.json or not first_process():
        return 0
    display("", *behaviour.matrix.to_markdown().split("\n"))
    same = "has the same bytes as" if behaviour.identical else "does NOT have the same bytes as"
    display(
        f"the result {same} a merge that never held the model: the weights differ by {behaviour.distance:.2g} of that "
        f"merge's change, the scores of the other tasks by {100 * behaviour.retained_gap:.1f} points"
    )
    for task, residual in behaviour.residual.items():
        display(f"{task}: {100 * residual:+.1f} points compared with a merge that never held the model")
    return 0
