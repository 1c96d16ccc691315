"""Commands that measure and draw without merging: inspect, plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.cli.shared import (
    Command,
    consent_flags,
    first_process,
    given_consent,
    given_sources,
    key_flags,
    named_keys,
    notify,
    print_json,
    source_flag,
)
from hfmerge.cli.terminal import display
from hfmerge.errors import HfMergeError
from hfmerge.validation.quoting import tell
from hfmerge.validation.strict_json import read_json_file


if TYPE_CHECKING:
    from hfmerge.evaluation.inspection.inspection import Inspection, LayerStatistics, Square
    from hfmerge.recipe.recipe import Recipe


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command(
        "inspect",
        "Compare models without merging them: similarity, norms, sign conflicts, spectra, predicted interference.",
        _inspect,
    )
    sub.add_argument(
        "items", nargs="+", metavar="RECIPE.yaml | MERGED | MODEL", help="a recipe, a merge, or models with --base"
    )
    key_flags(sub, named_keys("base"))
    sub.add_argument(
        "--matrices", action="append", metavar="PATTERN", help="decompose only these matrices (default: all)"
    )
    sub.add_argument(
        "--no-spectra", action="store_true", help="compute no spectra and no interference, which is faster"
    )
    sub.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of OPCM, for the interference: alpha, variant (default: the recipe's)",
    )
    sub.add_argument("--output", metavar="FILE", help="write the result as JSON, for `hfmerge plot` (default: not)")
    sub.add_argument("--plot", metavar="FOLDER", help="draw PNG and SVG pictures into this folder (default: none)")
    sub.add_argument("--card", metavar="FOLDER", help="draw them into this merge's figures/ and its card")
    sub.add_argument(
        "--include", action="append", metavar="PATTERN", help="only parameters with these names (default: all)"
    )
    sub.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="no parameters with these names (default: none)"
    )
    key_flags(sub, named_keys("vocabulary"))
    consent_flags(sub)
    sub.add_argument(
        "--max-memory", metavar="SIZE", help="memory that the process should stay below (default: no bound)"
    )
    key_flags(sub, named_keys("stream"))
    source_flag(sub)
    sub = command("plot", "Draw the result of inspect, evaluate or continual, saved as JSON.", _plot)
    sub.add_argument("results", nargs="+", metavar="RESULT.json")
    sub.add_argument(
        "--output", metavar="FOLDER", help="folder for PNG and SVG files (default: beside the first result)"
    )
    sub.add_argument("--card", metavar="FOLDER", help="draw them into this merge's figures/ and its card")


def _inspect(args: argparse.Namespace) -> int:
    from hfmerge import api
    from hfmerge.engine.options import RunOptions, parse_size

    memory = parse_size(args.max_memory) if args.max_memory is not None else None
    found = api.inspect(
        _asked(args),
        matrices=args.matrices,
        spectral=not args.no_spectra,
        sources=given_sources(args),
        options=RunOptions(max_memory=memory, notify=notify, **given_consent(args)),
    )
    if not first_process():
        return 0
    for warning in found.warnings:
        tell(f"warning: {warning}")
    data = found.to_dict()
    if args.output is not None:
        _save(data, Path(args.output))
    if args.json:
        print_json(data)
    else:
        _print(found)
    return _draw([data], args.plot, args.card, quiet=args.json)


def _save(data: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HfMergeError(f"{path}: cannot be written ({error.strerror}).") from error


def _asked(args: argparse.Namespace) -> Recipe | str:
    """A recipe from a file or from flags, or the name of a merge."""
    from hfmerge.recipe.overrides import apply_overrides
    from hfmerge.recipe.recipe import load_recipe

    items = list(args.items)
    changes = (args.option or None, args.include, args.exclude, args.vocabulary, args.stream)
    if len(items) == 1 and args.base is None and not items[0].endswith((".yaml", ".yml")):
        if any(value is not None for value in changes):
            raise HfMergeError(f"{items[0]}: a merge is inspected as it was made; give its models and --base instead.")
        return items[0]
    recipe = load_recipe(items.pop(0)) if items[0].endswith((".yaml", ".yml")) else None
    return apply_overrides(
        recipe,
        base=args.base,
        models=items or None,
        method="opcm" if recipe is None or args.option else None,
        options=args.option,
        include=args.include,
        exclude=args.exclude,
        vocabulary=args.vocabulary,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
        stream=args.stream,
    )


def _plot(args: argparse.Namespace) -> int:
    results = []
    for path in map(Path, args.results):
        try:
            results.append(read_json_file(path))
        except (OSError, ValueError) as error:
            raise HfMergeError(f"{path}: cannot be read as JSON ({error}).") from error
    output = args.output or (None if args.card else str(Path(args.results[0]).parent))
    return _draw(results, output, args.card, quiet=args.json)


def _draw(results: Sequence[dict[str, Any]], folder: str | None, card: str | None, *, quiet: bool) -> int:
    from hfmerge.evaluation.plots import draw_all
    from hfmerge.evaluation.plots.embedding import embed

    written = [file for folder in [folder] if folder for file in draw_all(results, Path(folder))]
    if card is not None:
        written += embed(Path(card), results)
    for file in written if not quiet else ():
        display(f"drawn {file}")
    return 0


def _print(inspection: Inspection) -> None:
    from hfmerge.evaluation.plots.style import short_names

    names = [name[:16] for name in short_names(inspection.names)]
    display(f"base   {inspection.base}")
    for i, (name, model) in enumerate(zip(names, inspection.models, strict=True)):
        share = inspection.whole.interference[i]
        cleared = "" if share is None else f"  interference {share:.1%}"
        display(f"model  {name:<16} {model}  norm {inspection.whole.norms[i]:.4g}{cleared}")
    _print_square("cosine of task vectors", names, inspection.whole.cosine)
    title = "share of commonly changed elements that are changed in opposite directions"
    _print_square(title, names, inspection.whole.sign_conflict)
    if inspection.whole.cancelled is not None:
        display("", f"lost in the sum by opposite signs: {inspection.whole.cancelled:.1%} of all change")
    width = max(len(part.name) for part in inspection.layers)
    head = "  ".join(f"{name:>12}" for name in names)
    display(
        "",
        f"norm of the change per layer, and interference with the models before (OPCM alpha {inspection.alpha:g}, "
        f"{inspection.variant})",
        f"{'layer':<{width}}  {'cosine':>7}  {head}",
    )
    for part in inspection.layers:
        display(
            f"{part.name:<{width}}  {_mean_cosine(part):>7}  " + "  ".join(_cell(part, i) for i in range(len(names)))
        )
    if inspection.spectra:
        tops = list(inspection.spectra[0].energy)
        display("", "spectra, means over matrices: stable rank, directions for 90 %, share of energy in the first")
        display(f"{'':<16} {'stable':>7} {'90 %':>6}  " + " ".join(f"{top:>6}" for top in tops))
        for i, name in enumerate(names):
            own = [spectrum for spectrum in inspection.spectra if spectrum.model == i]
            if own:
                stable = sum(one.stable_rank for one in own) / len(own)
                needed = sum(one.rank90 for one in own) / len(own)
                shares = [sum(one.energy[top] for one in own) / len(own) for top in tops]
                display(f"{name:<16} {stable:>7.1f} {needed:>6.1f}  " + " ".join(f"{share:>6.1%}" for share in shares))
    display("", f"{inspection.seconds:.1f} s")


def _cell(part: LayerStatistics, model: int) -> str:
    share = part.interference[model]
    return f"{part.norms[model]:>6.3g} {'' if share is None else format(share, '.0%'):>5}"


def _mean_cosine(part: LayerStatistics) -> str:
    """Mean over pairs; the highest one is in the JSON."""
    pairs = [value for i, row in enumerate(part.cosine) for value in row[:i] if value is not None]
    return f"{sum(pairs) / len(pairs):.3f}" if pairs else "-"


def _print_square(title: str, names: Sequence[str], square: Square) -> None:
    if len(names) < 2:
        return
    display("", title, f"{'':<16} " + " ".join(f"{name[:12]:>12}" for name in names))
    for name, row in zip(names, square, strict=True):
        display(f"{name:<16} " + " ".join(f"{'-' if value is None else format(value, '.3f'):>12}" for value in row))
