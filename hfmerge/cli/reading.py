"""Commands that look at a merge and change nothing: history, diff, verify."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hfmerge.cli.hub_settings import revision_flag
from hfmerge.cli.shared import (
    Command,
    consent_flags,
    device_flag,
    given_consent,
    given_sources,
    log_flag,
    print_json,
    source_flag,
)
from hfmerge.cli.terminal import display
from hfmerge.errors import CertificateError, HfMergeError
from hfmerge.validation.quoting import tell


if TYPE_CHECKING:
    from hfmerge.ledger.diff import Difference
    from hfmerge.ledger.log import Step


_LABELS = {"ok": "ok  ", "approximate": "NEAR", "failed": "FAIL"}
"""Verdict -> first word of a line of the report."""
CODES = {"ok": 0, "failed": 1, "approximate": 3}
"""Exit codes of `verify`, by verdict."""


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command(
        "history", "Print the steps of a merge as a table or a tree; on the Hub with authors and dates.", _history
    )
    sub.add_argument("merged", metavar="MERGED")
    revision_flag(sub)
    sub.add_argument(
        "--graph", action="store_true", help="draw a tree of the models that joined and left at each step"
    )
    sub = command("diff", "Print what differs between two steps of a merge, or between two merges.", _diff)
    sub.add_argument("merged", metavar="MERGED")
    revision_flag(sub)
    sub.add_argument(
        "steps", nargs="*", metavar="A B | OTHER",
        help="numbers of two steps (negative ones count from the end; default: the last two), or another merge",
    )  # fmt: skip
    sub = command(
        "verify",
        "Check a merge against its ledger. Exit code 1: something differs, and its name is printed. Exit code 3: a "
        "replay is equal only within the tolerance of other arithmetic.",
        _verify,
    )
    sub.add_argument("merged", metavar="MERGED")
    revision_flag(sub)
    sub.add_argument(
        "--download",
        action="store_true",
        help="download and hash the files, instead of believing the digests that the Hub lists",
    )
    sub.add_argument("--replay", action="store_true", help="merge the sources again, and compare all bytes and fields")
    device_flag(sub)
    sub.add_argument("--certificate", metavar="FILE", help="also check a certificate of removal (default: none)")
    sub.add_argument("--public-key", metavar="FILE", help="file of the trusted public key, or keys")
    sub.add_argument(
        "--allowed-signers", metavar="FILE", help="file of trusted keys in OpenSSH's format of allowed signers"
    )
    sub.add_argument(
        "--allow-unsigned", action="store_true", help="check only the content of the certificate, and no signature"
    )
    consent_flags(sub)
    log_flag(sub)
    sub.add_argument(
        "--accept-rewritten",
        action="store_true",
        help="accept a history that differs from the one seen before, from now on",
    )
    source_flag(sub)


def _history(args: argparse.Namespace) -> int:
    from hfmerge.engine.workspace import recover
    from hfmerge.ledger.log import method_line, steps_of, tree
    from hfmerge.ledger.repository import open_merged
    from hfmerge.ledger.seen import acceptance, rewritten
    from hfmerge.recipe.weights import shown

    recover(args.merged)
    merged = open_merged(args.merged)
    steps, notes = steps_of(merged)
    problem = rewritten(merged)
    tell(*(f"note: {note}" for note in notes))
    if problem is not None:
        tell(f"note: {problem}; {acceptance(merged)}")
    if args.json:
        entries = [json.loads(step.entry.to_bytes()) for step in steps]
        steps_data = [step.to_dict() for step in steps]
        print_json({"merged": merged.snapshot.label, "entries": entries, "steps": steps_data})
    elif args.graph:
        display(*tree(steps))
    else:
        display(*_table(steps))
        display("", f"now: {merged.last.base.label} with {method_line(merged.last)} of")
        for label, norm in steps[-1].norms.items():
            model = next(one for one in merged.last.models if one.label == label)
            display(f"  {label:<48} {model.kind}, weight {shown(model.weight)}, norm {norm:.4g}")
    return 0


def _table(steps: Sequence[Step]) -> list[str]:
    """One line per step. The norm of a new model is printed behind its name."""
    from hfmerge.ledger.log import method_line

    rows = [["step", "action", "digest", "method", "norm", "when", "who", "models (norm)"]]
    for step in steps:
        entry, commit = step.entry, step.commit
        norms = {model.name: step.norms[model.label] for model in reversed(entry.models)}
        names = [f"{name} ({norms[name]:.4g})" if name in norms else name for name in entry.subjects]
        when = f"{commit.date:%Y-%m-%d %H:%M}" if commit else "-"
        who = ", ".join(commit.authors) if commit else "-"
        did = ", ".join(names) or f"as step {entry.restored}"
        rows.append(
            [
                str(entry.step),
                entry.action,
                step.digest[:12],
                method_line(entry),
                f"{step.merged_norm:.4g}",
                when,
                who,
                did,
            ]
        )
    if all(step.commit is None for step in steps):
        rows = [[*row[:5], row[7]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _diff(args: argparse.Namespace) -> int:
    from hfmerge import api

    given: list[int | str] = [int(text) if re.fullmatch("-?[0-9]+", text) else text for text in args.steps]
    if len(given) > 2 or (len(given) == 2 and not all(isinstance(step, int) for step in given)):
        raise HfMergeError("diff: give two steps by number, or a second merge.")
    difference = api.diff(args.merged, *given)  # type: ignore[arg-type]  # a second one is a number, see above
    if args.json:
        print_json(difference.to_dict())
        return 0
    display(*_differences(difference))
    return 0


def _differences(difference: Difference) -> Iterator[str]:
    """One line a difference: `-` of A alone, `+` of B alone, `~` of both."""
    from hfmerge.recipe.weights import shown

    yield f"A: step {difference.before.step}, {difference.before.digest[:12]}"
    yield f"B: step {difference.after.step}, {difference.after.digest[:12]}"
    if difference.base is not None:
        yield f"~ base      {difference.base[0].label} -> {difference.base[1].label}"
    for sign, models in (("-", difference.removed), ("+", difference.added)):
        yield from (f"{sign} model     {model.label}" for model in models)
    for model in difference.subtracted:
        yield f"~ model     {model.label}: approximately subtracted"
    for old, new in difference.replaced:
        yield f"~ model     {old.label} -> {new.label}"
    if difference.order is not None:
        yield f"~ order     {', '.join(difference.order[0])} -> {', '.join(difference.order[1])}"
    for model, weight in difference.weights:
        yield f"~ weight    {model.label}: {shown(weight)} -> {shown(model.weight)}"
    for kind, values in (
        ("method", difference.method),
        ("setting", difference.settings),
        ("with", difference.environment),
    ):
        yield from (f"~ {kind:<9} {name}: {_value(a)} -> {_value(b)}" for name, (a, b) in values.items())
    for name, (a, b) in difference.norms.items():
        yield f"~ norm      {name}: {a:.6g} -> {b:.6g}"
    signs = {"added": "+", "removed": "-", "changed": "~"}
    yield from (f"{signs[how]} file      {name}" for name, how in difference.products.items())
    if difference.same:
        yield "= all files have the same bytes"


def _value(value: object) -> object:
    """A value of an entry on one line; a text that the ledger keeps with its digest stands for itself by that."""
    return f"sha256 {value['sha256'][:12]}" if isinstance(value, Mapping) and "sha256" in value else value


def _verify(args: argparse.Namespace) -> int:
    from hfmerge import api

    if args.certificate is None and (args.public_key or args.allowed_signers or args.allow_unsigned):
        raise CertificateError("--public-key, --allowed-signers and --allow-unsigned go with --certificate FILE.")
    report = api.verify(
        args.merged,
        replay=args.replay,
        device=args.device,
        sources=given_sources(args),
        certificate=args.certificate,
        public_key=args.public_key,
        allowed_signers=args.allowed_signers,
        allow_unsigned=args.allow_unsigned,
        **given_consent(args),
        download=args.download,
        log=args.log,
        accept_rewritten=args.accept_rewritten,
    )
    tell(*(f"note: {note}" for note in report.notes))
    if args.json:
        checks = [{"what": c.what, "ok": c.ok, "verdict": c.verdict, "detail": c.detail} for c in report.checks]
        print_json(
            {
                "merged": report.merged,
                "commit": report.commit,
                "ok": report.ok,
                "verdict": report.verdict,
                "checks": checks,
                "notes": report.notes,
            }
        )
    else:
        for check in report.checks:
            display(f"{_LABELS[check.verdict]} {check.what}: {check.detail}")
        if report.commit is not None:
            display(f"checked commit {report.commit}")
        broken = "NOT what its ledger says" if args.certificate is None else "NOT verified"
        said = {"ok": "verified", "approximate": "verified only within the tolerance of other arithmetic"}
        never = "not a merge made by hfmerge, or its ledger was deleted; there is nothing to verify it against"
        display(f"{report.merged}: {said.get(report.verdict, broken) if report.has_ledger else never}")
    return CODES[report.verdict]
