"""Commands that change the models or the base of a merge, or restore a step: replace, reorder, rebase, restore."""

from __future__ import annotations

import argparse

from hfmerge.cli.shared import Command, carry_out, change_arguments, change_flags


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("replace", "Replace a model of a merge by another model or revision.", _replace)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("old", metavar="OLD", help="name in the merge")
    sub.add_argument("new", metavar="NEW", help="org/name[@revision] or folder")
    sub.add_argument(
        "--weight", type=float, metavar="W", help="weight of the new model (default: the weight of the old one)"
    )
    change_flags(sub)
    sub = command("reorder", "Merge the same models in another order.", _reorder)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("models", nargs="+", metavar="MODEL", help="all of them, in the new order")
    change_flags(sub)
    sub = command("rebase", "Merge the same models on another base, or another revision of it.", _rebase)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--base", required=True, metavar="BASE")
    change_flags(sub)
    sub = command("restore", "Restore an earlier step from the Hub's history, without computing.", _restore)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--step", required=True, type=int, metavar="N")
    change_flags(sub, reads=False)


def _replace(args: argparse.Namespace) -> int:
    return carry_out(args, "replace", args.merged, args.old, args.new, weight=args.weight, **change_arguments(args))


def _reorder(args: argparse.Namespace) -> int:
    return carry_out(args, "reorder", args.merged, args.models, **change_arguments(args))


def _rebase(args: argparse.Namespace) -> int:
    return carry_out(args, "rebase", args.merged, args.base, **change_arguments(args))


def _restore(args: argparse.Namespace) -> int:
    return carry_out(args, "restore", args.merged, args.step, **change_arguments(args))
