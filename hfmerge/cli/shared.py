"""Parts that several commands share: groups of flags, their arguments, and the printing of results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.cli.hub_settings import revision_flag
from hfmerge.cli.terminal import display, width_of
from hfmerge.engine.options import Consent, RunOptions, parse_size
from hfmerge.errors import HfMergeError
from hfmerge.recipe.keys import RecipeKey, keys_of
from hfmerge.recipe.recipe import Recipe
from hfmerge.validation.quoting import tell
from hfmerge.validation.strict_yaml import parse_scalar
from hfmerge.validation.wording import size


if TYPE_CHECKING:
    from hfmerge.engine.plan import Estimate
    from hfmerge.lifecycle.forecast import Forecast

Command = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a command: name, help, handler -> its parser."""
CONSENTS = tuple(field.name for field in dataclasses.fields(Consent))


def run_flags(sub: argparse.ArgumentParser) -> None:
    """Add the flags that say how the run uses the machine."""
    sub.add_argument(
        "--storage",
        choices=("auto", "shared", "local"),
        default="auto",
        help="whether several machines share the output's disk (default: find out)",
    )
    sub.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="continue a killed run, or start anew (default: continue if it did the same work)",
    )
    sub.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory that each process should stay below, such as 4GB (default: what `plan` prints)",
    )
    device_flag(sub)


def device_flag(sub: argparse.ArgumentParser) -> None:
    """Add the flag for the device."""
    sub.add_argument(
        "--device",
        help="device that runs spectral methods and learns weights: cpu, auto, cuda, cuda:1; the last bits depend on "
        "the kind of device (default: cpu)",
    )


def change_flags(sub: argparse.ArgumentParser, *, reads: bool = True) -> None:
    """Add the flags of commands that change a merge; `reads`: the command reads sources, so they may be streamed."""
    sub.add_argument(
        "--output", metavar="FOLDER", help="write a new folder (default: replace MERGED if it is a folder)"
    )
    sub.add_argument("--push-to", metavar="REPO_ID", help="publish the result (default: not)")
    revision_flag(sub)
    push_flags(sub)
    dry_run_flag(sub)
    run_flags(sub)
    if reads:
        key_flags(sub, named_keys("stream"), default=False)
        sub.add_argument(
            "--state",
            metavar="none|last|all|K",
            help="which carried states are kept from now on (default: as before)",
        )
    consent_flags(sub)
    source_flag(sub)


def push_flags(sub: argparse.ArgumentParser) -> None:
    """Add the flags that say how a result is published."""
    sub.add_argument(
        "--commit-message", metavar="TEXT", help="first line of the commit that publishes (default: what was done)"
    )
    sub.add_argument("--create-pr", action="store_true", help="push as a pull request")
    sub.add_argument(
        "--overwrite",
        action="store_true",
        help="allow the push to replace files that are not of this merge, even a base or a source",
    )
    sub.add_argument(
        "--publish-private",
        action="append",
        default=[],
        metavar="NAME",
        help="publish although more people may read the result than this private, gated or deleted input; may be "
        "given several times",
    )


def push_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of every verb that publishes."""
    return {
        "commit_message": args.commit_message,
        "create_pr": args.create_pr,
        "overwrite": args.overwrite,
        "publish_private": args.publish_private,
    }


def dry_run_flag(sub: argparse.ArgumentParser) -> None:
    """Add the flag that has a command say what it would do."""
    sub.add_argument(
        "--dry-run", action="store_true", help="say what would be done, from headers alone, and change nothing"
    )


def change_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of every verb that changes a merge."""
    return {
        "output": args.output,
        "push_to": args.push_to,
        **push_arguments(args),
        "sources": given_sources(args),
        **({"stream": args.stream, "state": _scalar(args.state)} if "stream" in args else {}),
        "options": run_options_from_flags(args),
    }


def _scalar(given: str | None) -> Any:
    return None if given is None else parse_scalar(given)


def key_flags(sub: argparse._ActionsContainer, keys: Iterable[RecipeKey], default: bool | None = None) -> None:
    """Add the flags of keys of a recipe, as the keys declare them.

    Args:
        default: default of true-or-false keys; None: the flag is not given, so the recipe's own value counts.
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
    """Add the flags of consent. They are needed in every run; what a ledger says of consent does not count."""
    key_flags(sub, named_keys(*CONSENTS))


def given_consent(args: argparse.Namespace) -> dict[str, Any]:
    """The consents of the flags, as arguments of a verb."""
    given = vars(args)
    return {name: bool(given.get(name)) for name in CONSENTS}


def source_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="present path of a folder that was merged (default: where it lay)",
    )


def log_flag(sub: argparse.ArgumentParser) -> None:
    """Add the flag for the log of a witness."""
    sub.add_argument(
        "--log", metavar="FILE", help="check the history against this append-only log, then add a record to it"
    )


def run_options_from_flags(args: argparse.Namespace) -> RunOptions:
    memory = parse_size(args.max_memory) if args.max_memory is not None else None
    return RunOptions(args.storage, args.resume, memory, notify, device=args.device, **given_consent(args))


def weighted(words: Sequence[str], weights: Sequence[str] | None) -> tuple[list[str], list[str] | None]:
    """Models and weights of operands `MODEL`, `MODEL=WEIGHT` or `MODEL:WEIGHT`; None: no weights are given.

    Args:
        weights: given by flags, one a model.

    Raises:
        HfMergeError: a weight that stands alone, or weights in both places.
    """
    models: list[str] = []
    beside: list[str | None] = []
    for word in words:
        if Path(word).exists():
            model, weight = word, None
        elif _is_number(word):
            asked = " ".join(f"--weight {one}" for one in [*(weights or ()), word])
            raise HfMergeError(
                f"{word}: is not a model; write a weight behind its model, MODEL={word}, or repeat the flag: {asked}."
            )
        else:
            mark = "=" if "=" in word else ":"
            model, found, weight = word.rpartition(mark)
            # neither an ID nor a revision can hold a colon, and a folder of such a name was found above
            if not (found and model and _is_number(weight)):
                model, weight = word, None
        models.append(model)
        beside.append(weight)
    if all(weight is None for weight in beside):
        return models, None if weights is None else list(weights)
    if weights is not None:
        raise HfMergeError("weights stand behind models and in --weight; give them in one place.")
    return models, ["1" if weight is None else weight for weight in beside]


def _is_number(word: str) -> bool:
    return type(parse_scalar(word)) in (int, float)


def notify(line: str) -> None:
    tell(f"hfmerge: {line}")


def alias_flag(group: Any) -> None:
    """The flag that names models."""
    group.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="what the merge calls a model: the folder of its head, the card, and unmerge; MODEL as it is given "
        "(default: its name)",
    )


def aliases_from_flags(args: argparse.Namespace) -> dict[str, str]:
    """Model as given -> its alias."""
    found: dict[str, str] = {}
    for item in args.alias:
        alias, equals, model = item.partition("=")
        if not equals or not alias or not model:
            raise HfMergeError(f"--alias {item}: write NAME=MODEL.")
        if model in found:
            raise HfMergeError(f"--alias {item}: {model} has the alias {found[model]} already; keep one.")
        found[model] = alias
    return found


def given_sources(args: argparse.Namespace) -> dict[str, str]:
    pairs = [item.partition("=") for item in args.source]
    if bad := [item for item in args.source if "=" not in item]:
        raise HfMergeError(f"--source {bad[0]}: write NAME=FOLDER.")
    return {name: folder for name, _, folder in pairs}


def first_process() -> bool:
    """True unless a launcher started this process as another rank than 0."""
    return os.environ.get("RANK", "0") == "0"


def carry_out(args: argparse.Namespace, verb: str, *operands: Any, **named: Any) -> int:
    """Call a public verb and print its result, or what it would do if the run is a dry one."""
    from hfmerge import api

    if args.dry_run:
        return _print_forecast(args, api.dry_run(verb, *operands, **named))
    return print_result(args, getattr(api, verb)(*operands, **named))


def _print_forecast(args: argparse.Namespace, found: Forecast) -> int:
    if not first_process():
        return 0
    for warning in found.warnings:
        tell(f"warning: {warning}")
    if args.json:
        print_json({"dry_run": True, **found.to_dict()})
        return 0
    display(*_foreseen(found), "dry run: nothing was changed")
    return 0


def _foreseen(found: Forecast) -> Iterator[str]:
    for inner in found.inner:
        yield from (f"first    {line}" for line in _foreseen(inner))
    yield f"way      {found.action}: {found.how}"
    for i, label in enumerate(found.models):
        yield f"model    {label}{', held by a kept state' if i < found.starts else ''}"
    if (need := found.need) is not None:
        held = f"a kept state holds the first {found.starts}" if found.starts else "no kept state fits; from the base"
        yield f"state    {held}"
        if found.advice is not None:
            yield f"         {found.advice}"
        yield f"bytes    read {size(need.read)}, download {size(need.download)}, output {size(need.output)}"
        yield f"needs    {needs(need)}"
    places = [place for place in (found.folder, found.push_to) if place is not None]
    yield f"result   {' and '.join(places)}"


def needs(need: Estimate) -> str:
    """What a plan needs, in words."""
    learning = f", of which {need.learning:.0f} s for learning on the CPU at most" if need.learning else ""
    return f"disk {size(need.disk)}, memory about {size(need.memory)}, time about {need.seconds:.0f} s{learning}"


def print_result(args: argparse.Namespace, result: Any, more: Mapping[str, Any] | None = None) -> int:
    """Print the result of a verb; with `--json` as one object that includes `more`."""
    from hfmerge.recipe.weights import shown

    entry = result.entry
    if not first_process():
        return 0
    for warning in result.warnings:
        tell(f"warning: {warning}")
    pushed = result.pushed
    if args.json:
        print_json({**_result_data(result), **(more or {})})
        return 0
    if result.repeated:
        display(
            f"{entry.action}: step {entry.step} did this before, so nothing was computed; "
            "files left over from that run were deleted"
        )
        if pushed is not None:
            display(f"published at {pushed.url}")
        return 0
    crew = f" on {result.processes} processes" if result.processes > 1 else ""
    display(f"{entry.action} (step {entry.step}): {entry.how}, {result.seconds['total']:.1f} s{crew}")
    width = width_of(entry.labels, 48)
    for label, model in zip(entry.labels, entry.models, strict=True):
        display(f"  {label:<{width}} weight {shown(model.weight):<6} norm {(model.squared_norm or 0.0) ** 0.5:.4g}")
    display(f"  norm of the merged change: {entry.scalars.merged_norm:.4g}")
    if entry.scalars.deviation is not None:
        display(
            f"  greatest difference from the exact last step, in sampled parameters: {entry.scalars.deviation:.1e} "
            "of the change"
        )
    if entry.action == "subtract":
        bound = f"at most {entry.scalars.gap_bound:.3g}" if entry.scalars.gap_bound is not None else "an unknown part"
        measured = f"measured {entry.scalars.gap:.3g}" if entry.scalars.gap is not None else "not measured"
        display(
            f"  this is NOT a removal: the difference from a merge without these models is {bound} "
            f"of the merged change ({measured})"
        )
    if (streamed := result.streamed) is not None:
        checked, files = len(streamed.verified), len(streamed.verified) + len(streamed.unverified)
        display(
            f"streamed {size(streamed.received)} in {streamed.requests} requests, of which {streamed.failures} were "
            f"repeated; received twice: {size(streamed.again)}, not needed: {size(streamed.beyond)}; {checked} of "
            f"{files} files compared with their digests"
        )
    if result.folder:
        display(f"written to {result.folder}")
    if pushed is not None:
        display(f"pushed to {pushed.pull_request or pushed.url}")
        for note in pushed.notes:
            tell(f"note: {note}")
    return 0


def _result_data(result: Any) -> dict[str, Any]:
    """The result of a verb as JSON values."""
    entry, pushed = result.entry, result.pushed
    return {
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
    }


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, default=str).replace("\x7f", "\\u007f")
    display(*text.split("\n"))
