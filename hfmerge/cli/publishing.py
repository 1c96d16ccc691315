"""The command that publishes a merge folder."""

from __future__ import annotations

import argparse

from hfmerge.cli.shared import Command, carry_out, dry_run_flag, print_json, push_arguments, push_flags
from hfmerge.cli.terminal import display
from hfmerge.validation.quoting import tell


def register(command: Command) -> None:
    """Add the command of this file."""
    sub = command("push", "Publish a merge folder: one commit, guarded against a concurrent push.", _push)
    sub.add_argument("folder", metavar="FOLDER")
    sub.add_argument("repo_id", metavar="REPO_ID")
    sub.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push_flags(sub)
    dry_run_flag(sub)


def _push(args: argparse.Namespace) -> int:
    from hfmerge import api

    if args.dry_run:
        return carry_out(args, "push", args.folder, args.repo_id, private=args.private, **push_arguments(args))
    pushed = api.push(args.folder, args.repo_id, private=args.private, **push_arguments(args))
    if args.json:
        print_json({**vars(pushed), "notes": list(pushed.notes)})
        return 0
    display(f"pushed to {pushed.pull_request or pushed.url}")
    for note in pushed.notes:
        tell(f"note: {note}")
    return 0
