"""Commands that change an existing merge: add, unmerge."""

from __future__ import annotations

import argparse

from hfmerge.commands.shared import Command, change_arguments, change_flags, print_result
from hfmerge.errors import HfMergeError


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("add", "Merge further models into an existing merge.", _add)
    sub.add_argument("merged", metavar="MERGED", help="org/name or folder of a merge")
    sub.add_argument("models", nargs="+", metavar="MODEL")
    sub.add_argument("--weight", action="append", type=float, metavar="W", help="one per model, in order")
    change_flags(sub)
    sub = command("unmerge", "Take models out: the bytes become those of the merge that never saw them.", _unmerge)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--remove", action="append", required=True, metavar="MODEL", help="may be given several times")
    change_flags(sub)


def _add(args: argparse.Namespace) -> int:
    from hfmerge import api
    from hfmerge.recipe import ModelEntry

    weights = args.weight or [1.0] * len(args.models)
    if len(weights) != len(args.models):
        raise HfMergeError(f"--weight: {len(weights)} given for {len(args.models)} models; give one a model.")
    models: list[str | ModelEntry] = [ModelEntry(m, w) for m, w in zip(args.models, weights, strict=True)]
    return print_result(args, api.add(args.merged, models, **change_arguments(args)))


def _unmerge(args: argparse.Namespace) -> int:
    from hfmerge import api

    return print_result(args, api.unmerge(args.merged, args.remove, **change_arguments(args)))
