"""What several commands share: groups of flags, what they mean, and how results are printed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hfmerge.engine.options import Consent, RunOptions, parse_size
from hfmerge.errors import HfMergeError
from hfmerge.recipe.keys import RecipeKey, keys_of
from hfmerge.recipe.recipe import Recipe
from hfmerge.validation.quoting import say, tell


Command = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a command: name, help, handler -> its parser."""
CONSENTS = tuple(field.name for field in dataclasses.fields(Consent))


def run_flags(sub: argparse.ArgumentParser) -> None:
    """How the run uses the machine."""
    sub.add_argument(
        "--storage",
        choices=("auto", "shared", "local"),
        default="auto",
        help="whether several machines share the output's disk (default: find out)",
    )
    sub.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="insist on going on from a killed run, or on starting anew (default: go on if it was the same work)",
    )
    sub.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="what each process should stay below: 4GB, 800MiB (default: what `plan` says, as many visits as cores)",
    )
    device_flag(sub)


def device_flag(sub: argparse.ArgumentParser) -> None:
    """Where spectral methods compute and weights are learned."""
    sub.add_argument(
        "--device",
        help="where spectral methods compute and weights are learned: cpu, auto, cuda, cuda:1; bytes are those of one "
        "kind (default: cpu)",
    )


def change_flags(sub: argparse.ArgumentParser, *, reads: bool = True) -> None:
    """Where a changed merge goes, and how the run uses the machine; `reads`: sources are read, maybe streamed."""
    sub.add_argument(
        "--output", metavar="FOLDER", help="a new folder; default: a MERGED folder is replaced in one rename"
    )
    sub.add_argument("--push-to", metavar="REPO_ID", help="publish the result")
    push_flags(sub)
    run_flags(sub)
    if reads:
        key_flags(sub, named_keys("stream"), default=False)
    consent_flags(sub)
    source_flag(sub)


def push_flags(sub: argparse.ArgumentParser) -> None:
    """How a result is published."""
    sub.add_argument("--create-pr", action="store_true", help="push as a pull request")
    sub.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is in the repository and not of this merge, even a base or a source",
    )
    sub.add_argument(
        "--publish-private",
        action="append",
        default=[],
        metavar="NAME",
        help="let the result go where more people may read it than this input, which is private, gated or gone; may "
        "be given several times",
    )


def push_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What every verb that publishes takes."""
    return {"create_pr": args.create_pr, "overwrite": args.overwrite, "publish_private": args.publish_private}


def change_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What every verb that changes a merge takes beside what it changes."""
    return {
        "output": args.output,
        "push_to": args.push_to,
        **push_arguments(args),
        "sources": given_sources(args),
        **({"stream": args.stream} if "stream" in args else {}),
        "options": run_options(args),
    }


def key_flags(sub: argparse._ActionsContainer, keys: Iterable[RecipeKey], default: bool | None = None) -> None:
    """The flags of keys of a recipe, as they are declared.

    Args:
        default: of truth values; None: not said, so that the recipe's own value counts.
    """
    for key in keys:
        if key.flag is None:
            continue
        words = key.declared.get("help") or None
        if key.plain_type is bool:
            sub.add_argument(key.flag, action="store_true", default=default, help=words)
        else:
            action = "append" if key.plain_type == tuple[str, ...] else "store"
            sub.add_argument(key.flag, action=action, metavar=key.declared.get("metavar"), help=words)


def named_keys(*names: str) -> list[RecipeKey]:
    """Keys of a recipe that other commands have flags of too, in their order in a recipe."""
    return [key for key in keys_of(Recipe) if key.name in names]


def consent_flags(sub: argparse._ActionsContainer) -> None:
    """What this run allows strangers' repositories; of a merge it has to be said again, whatever its ledger says."""
    key_flags(sub, named_keys(*CONSENTS))


def given_consent(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a verb that say so."""
    given = vars(args)
    return {name: bool(given.get(name)) for name in CONSENTS}


def source_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--source", action="append", default=[], metavar="NAME=FOLDER", help="where a merged folder lies now"
    )


def log_flag(sub: argparse.ArgumentParser) -> None:
    """A witness of what was verified and certified."""
    sub.add_argument(
        "--log", metavar="FILE", help="check the history against this append-only log, then add a record to it"
    )


def run_options(args: argparse.Namespace) -> RunOptions:
    memory = parse_size(args.max_memory) if args.max_memory is not None else None
    return RunOptions(args.storage, args.resume, memory, notify, device=args.device, **given_consent(args))


def notify(line: str) -> None:
    tell(f"hfmerge: {line}")


def given_sources(args: argparse.Namespace) -> dict[str, str]:
    pairs = [item.partition("=") for item in args.source]
    if bad := [item for item in args.source if "=" not in item]:
        raise HfMergeError(f"--source {bad[0]}: write NAME=FOLDER.")
    return {name: folder for name, _, folder in pairs}


def first_process() -> bool:
    """True unless a launcher started this process as another rank than 0."""
    return os.environ.get("RANK", "0") == "0"


def print_result(args: argparse.Namespace, result: Any, more: Mapping[str, Any] | None = None) -> int:
    """What a verb made; with `--json` as one object, `more` in it."""
    from hfmerge.recipe.weights import shown

    entry = result.entry
    if not first_process():
        return 0
    for warning in result.warnings:
        tell(f"warning: {warning}")
    pushed = result.pushed
    if args.json:
        print_json(
            {
                "output": str(result.folder) if result.folder else None,
                "step": entry.step,
                "action": entry.action,
                "models": [model.identity for model in entry.models],
                "how": entry.how,
                "products": dict(entry.products),
                "scale": entry.scalars.scale,
                "merged_norm": entry.scalars.merged_norm,
                "deviation": entry.scalars.deviation,
                "gap": entry.scalars.gap,
                "gap_bound": entry.scalars.gap_bound,
                "norms": [(model.squared_norm or 0.0) ** 0.5 for model in entry.models],
                "seconds": dict(result.seconds),
                "processes": result.processes,
                "reused": result.reused,
                "repeated": result.repeated,
                "streamed": None if result.streamed is None else dataclasses.asdict(result.streamed),
                "warnings": list(result.warnings),
                "pushed": None if pushed is None else {**vars(pushed), "notes": list(pushed.notes)},
                **(more or {}),
            }
        )
        return 0
    if result.repeated:
        say(f"{entry.action}: done already by step {entry.step}; nothing was computed, what it had left is cleaned up")
        if pushed is not None:
            say(f"published at {pushed.url}")
        return 0
    crew = f" on {result.processes} processes" if result.processes > 1 else ""
    say(f"{entry.action} (step {entry.step}): {entry.how}, {result.seconds['total']:.1f} s{crew}")
    for model in entry.models:
        say(f"  {model.label:<48} weight {shown(model.weight):<6} norm {(model.squared_norm or 0.0) ** 0.5:.4g}")
    say(f"  norm of the merged change: {entry.scalars.merged_norm:.4g}")
    if entry.scalars.deviation is not None:
        say(f"  off the exact last step by up to {entry.scalars.deviation:.1e} of a change, by sample")
    if entry.action == "subtract":
        bound = f"up to {entry.scalars.gap_bound:.3g}" if entry.scalars.gap_bound is not None else "an unknown part"
        measured = f"measured {entry.scalars.gap:.3g}" if entry.scalars.gap is not None else "not measured"
        say(f"  NOT a removal: off the merge that never saw them by {bound} of the merged change ({measured})")
    if (streamed := result.streamed) is not None:
        checked, files = len(streamed.verified), len(streamed.verified) + len(streamed.unverified)
        say(
            f"streamed {size(streamed.received)} in {streamed.requests} requests, {streamed.failures} repeated: "
            f"{size(streamed.again)} more than once, {size(streamed.beyond)} beyond need; {checked} of {files} "
            "files compared with their digests"
        )
    if result.folder:
        say(f"written to {result.folder}")
    if pushed is not None:
        say(f"pushed to {pushed.pull_request or pushed.url}")
        for note in pushed.notes:
            tell(f"note: {note}")
    return 0


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, default=str).replace("\x7f", "\\u007f")
    say(*text.split("\n"))
