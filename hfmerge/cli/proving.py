"""Commands that prove a removal and clear the history: certify, purge-history."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from hfmerge.cli.hub_settings import revision_flag
from hfmerge.cli.shared import (
    Command,
    consent_flags,
    device_flag,
    dry_run_flag,
    given_consent,
    given_sources,
    log_flag,
    print_json,
    source_flag,
)
from hfmerge.cli.terminal import display
from hfmerge.errors import HfMergeError
from hfmerge.validation.quoting import tell


if TYPE_CHECKING:
    from hfmerge.lifecycle.purge import PurgePlan


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("certify", "Certify that a merge no longer holds a model, so that others can check it.", _certify)
    sub.add_argument("merged", metavar="MERGED")
    revision_flag(sub)
    sub.add_argument(
        "--remove",
        required=True,
        metavar="MODEL",
        help="name of the model in the ledger, with `@COMMIT` if the name is not unique",
    )
    sub.add_argument(
        "--key", metavar="FILE", help="ed25519 private key, OpenSSH or PEM (default: the certificate is unsigned)"
    )
    sub.add_argument("--output", metavar="FILE", help="file for the certificate (default: standard output)")
    sub.add_argument(
        "--expires", metavar="DAYS", type=float, help="days for which the certificate is valid (default: for ever)"
    )
    sub.add_argument("--replay", action="store_true", help="merge the materials again first; the certificate says so")
    consent_flags(sub)
    log_flag(sub)
    sub.add_argument(
        "--accept-approximate",
        action="store_true",
        help="certify a replay that is equal only within the tolerance of other arithmetic; the certificate says so",
    )
    device_flag(sub)
    source_flag(sub)
    sub = command(
        "purge-history", "Squash the history of a published merge, since it still holds earlier weights.", _purge
    )
    sub.add_argument("repo_id", metavar="REPO_ID")
    dry_run_flag(sub)
    sub.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    sub.add_argument(
        "--delete-files",
        action="store_true",
        help="also delete the weights of earlier steps from the Hub's storage, for all references",
    )


def _certify(args: argparse.Namespace) -> int:
    from hfmerge import api

    made = api.certify(
        args.merged,
        args.remove,
        key=args.key,
        output=args.output,
        days=args.expires,
        replay=args.replay,
        accept_approximate=args.accept_approximate,
        device=args.device,
        sources=given_sources(args),
        **given_consent(args),
        log=args.log,
    )
    for warning in made.warnings:
        tell(f"warning: {warning}")
    if args.output is None:
        display(*made.envelope.to_bytes().decode().rstrip("\n").split("\n"))
    elif args.json:
        print_json({"output": args.output, "keyid": made.keyid, "statement": made.statement})
    else:
        display(made.statement["predicate"]["claim"])
        display(f"written to {args.output}, {f'signed with {made.keyid}' if made.keyid else 'unsigned'}")
        display("It does not prove:")
        for line in made.statement["predicate"]["notProved"]:
            display(f"  - {line}")
    return 0


def _purge(args: argparse.Namespace) -> int:
    from hfmerge import api

    confirm = _only_shown if args.dry_run else None if args.yes else _confirmed
    purged = api.purge_history(args.repo_id, delete_files=args.delete_files, confirm=confirm)
    if args.dry_run:
        return 0
    if purged is None:
        tell("nothing was changed")
        return 1
    if args.json:
        print_json({**dataclasses.asdict(purged.plan), "new_head": purged.head, "notes": list(purged.notes)})
        return 0
    plan = purged.plan
    display(f"{plan.repo_id}: main was at {plan.head[:12]} and is now at {purged.head[:12]}, with the same files")
    display(f"squashed: {', '.join(f'{name} ({count} commits)' for name, count in plan.commits.items())}")
    if plan.tags:
        display(f"deleted: {', '.join(plan.tags)} (the last one was made anew)")
    if plan.files is not None:
        display(f"deleted from storage: {len(plan.files)} files of earlier steps")
    _print_left(plan)
    for note in purged.notes:
        tell(f"note: {note}")
    return 0


def _print_left(plan: PurgePlan) -> None:
    for line in plan.leftovers:
        display(f"may still hold earlier weights: {line}")
    for name in plan.children:
        display(f"may contain earlier weights: {name}, whose card names {plan.repo_id} as its base")


def _confirmed(plan: PurgePlan) -> bool:
    """Show what is going to happen, and have the repository's name typed."""
    if not sys.stdin.isatty():
        raise HfMergeError(f"{plan.repo_id}: asks for confirmation at a terminal; pass --yes to go ahead without.")
    _print_plan(plan)
    try:
        return input(f"Type {plan.repo_id} to go on: ").strip() == plan.repo_id
    except EOFError:
        return False


def _only_shown(plan: PurgePlan) -> bool:
    """Show what would happen, and refuse it."""
    _print_plan(plan)
    display("dry run: nothing was changed")
    return False


def _print_plan(plan: PurgePlan) -> None:
    display(f"{plan.repo_id}: its earlier steps will be lost and cannot be restored, and its commits get new ids:")
    for name, count in plan.commits.items():
        display(f"  branch {name}: {count} commits become one")
    if plan.tags:
        display(f"  tags {', '.join(plan.tags)}: deleted, the last one made anew")
    for file in plan.files or ():
        display(f"  {file.path} of step {file.step} ({file.sha256[:12]}...): deleted from storage for good")
    _print_left(plan)
