"""Commands that look at a merge and change nothing: history, verify."""

from __future__ import annotations

import argparse
import json

from hfmerge.commands.shared import Command, given_sources, print_json, source_flag


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("history", "Print a merge's ledger as a table.", _history)
    sub.add_argument("merged", metavar="MERGED")
    sub = command(
        "verify", "Check a merge against its ledger; exit code 1 and the culprit's name if anything differs.", _verify
    )
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--replay", action="store_true", help="merge again from the sources and compare every byte")
    source_flag(sub)


def _history(args: argparse.Namespace) -> int:
    from hfmerge.digest import sha256_bytes
    from hfmerge.merged import open_merged
    from hfmerge.workspace import recover

    recover(args.merged)
    merged = open_merged(args.merged)
    if args.json:
        print_json(
            {"merged": merged.pinned.label, "entries": [json.loads(entry.to_bytes()) for entry in merged.entries]}
        )
        return 0
    width = max(len(", ".join(entry.subjects)) for entry in merged.entries) + 2
    print(f"{'step':<6}{'action':<9}{'digest':<14}{'models':<{width}}how")
    for entry in merged.entries:
        digest = sha256_bytes(entry.to_bytes())[:12]
        print(f"{entry.step:<6}{entry.action:<9}{digest:<14}{', '.join(entry.subjects):<{width}}{entry.how}")
    print(f"\nnow: {merged.last.base.label} with {merged.last.method['name']} of")
    for model in merged.last.models:
        print(
            f"  {model.label:<48} {model.kind}, weight {model.weight:g}, norm {(model.squared_norm or 0.0) ** 0.5:.4g}"
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hfmerge import api

    report = api.verify(args.merged, replay=args.replay, sources=given_sources(args))
    if args.json:
        print_json({"merged": report.merged, "ok": report.ok, "checks": [vars(check) for check in report.checks]})
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.what}: {check.detail}")
        print(f"{report.merged}: {'verified' if report.ok else 'NOT what its ledger says'}")
    return 0 if report.ok else 1
