"""Commands about removal that can be proved: certify, purge-history."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from hfmerge.commands.shared import Command, device_flag, given_sources, print_json, source_flag
from hfmerge.errors import HfMergeError


if TYPE_CHECKING:
    from hfmerge.purging import PurgePlan


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("certify", "Certify that a merge no longer holds a model, for others to check.", _certify)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--removed", required=True, metavar="MODEL", help="as the ledger names it; `@COMMIT` if need be")
    sub.add_argument("--key", metavar="FILE", help="ed25519 private key, OpenSSH or PEM; without it nobody vouches")
    sub.add_argument("--output", metavar="FILE", help="where the certificate goes; default: standard output")
    sub.add_argument("--expires", metavar="DAYS", type=float, help="how long it is valid; default: for ever")
    sub.add_argument("--replay", action="store_true", help="merge the materials again first, and state that")
    sub.add_argument(
        "--accept-approximate",
        action="store_true",
        help="certify a replay that is equal only within the tolerance of other arithmetic, and state that",
    )
    device_flag(sub)
    source_flag(sub)
    sub = command("purge-history", "Squash a published merge's history, which still holds earlier weights.", _purge)
    sub.add_argument("repo_id", metavar="REPO_ID")
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub.add_argument(
        "--delete-files",
        action="store_true",
        help="also delete the weights of earlier steps from the Hub's storage, whatever still refers to them",
    )


def _certify(args: argparse.Namespace) -> int:
    from hfmerge import examining

    made = examining.certify(
        args.merged,
        args.removed,
        key=args.key,
        output=args.output,
        days=args.expires,
        replay=args.replay,
        accept_approximate=args.accept_approximate,
        device=args.device,
        sources=given_sources(args),
    )
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.output is None:
        sys.stdout.write(made.envelope.to_bytes().decode())
    elif args.json:
        print_json({"output": args.output, "keyid": made.keyid, "statement": made.statement})
    else:
        print(made.statement["predicate"]["claim"])
        print(f"written to {args.output}, {f'signed with {made.keyid}' if made.keyid else 'unsigned'}")
        print("It does not prove:")
        for line in made.statement["predicate"]["notProved"]:
            print(f"  - {line}")
    return 0


def _purge(args: argparse.Namespace) -> int:
    from hfmerge import examining

    purged = examining.purge_history(
        args.repo_id, delete_files=args.delete_files, confirm=None if args.yes else _confirmed
    )
    if purged is None:
        print("nothing was changed", file=sys.stderr)
        return 1
    if args.json:
        print_json({**dataclasses.asdict(purged.plan), "new_head": purged.head, "notes": list(purged.notes)})
        return 0
    plan = purged.plan
    print(f"{plan.repo_id}: main was at {plan.head[:12]} and is now at {purged.head[:12]}, with the same files")
    print(f"squashed: {', '.join(f'{name} ({count} commits)' for name, count in plan.commits.items())}")
    if plan.tags:
        print(f"deleted: {', '.join(plan.tags)} (the last one was made anew)")
    if plan.files is not None:
        print(f"deleted from storage: {len(plan.files)} files of earlier steps")
    _print_left(plan)
    for note in purged.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _print_left(plan: PurgePlan) -> None:
    for line in plan.leftovers:
        print(f"may still hold earlier weights: {line}")
    for name in plan.children:
        print(f"may contain earlier weights: {name}, whose card names {plan.repo_id} as its base")


def _confirmed(plan: PurgePlan) -> bool:
    """Show what is going to happen, and have the repository's name typed."""
    if not sys.stdin.isatty():
        raise HfMergeError(f"{plan.repo_id}: asks for confirmation at a terminal; pass --yes to go ahead without.")
    print(f"{plan.repo_id}: its earlier steps will be lost and cannot be restored, and its commits get new ids:")
    for name, count in plan.commits.items():
        print(f"  branch {name}: {count} commits become one")
    if plan.tags:
        print(f"  tags {', '.join(plan.tags)}: deleted, the last one made anew")
    for file in plan.files or ():
        print(f"  {file.path} of step {file.step} ({file.sha256[:12]}...): deleted from storage for good")
    _print_left(plan)
    try:
        return input(f"Type {plan.repo_id} to go on: ").strip() == plan.repo_id
    except EOFError:
        return False
