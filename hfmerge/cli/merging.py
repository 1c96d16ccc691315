"""Commands that start from a recipe: merge, plan, convert; and the list of methods."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from hfmerge.cli.shared import (
    Command,
    alias_flag,
    aliases_from_flags,
    carry_out,
    dry_run_flag,
    key_flags,
    needs,
    print_json,
    push_arguments,
    push_flags,
    run_flags,
    run_options_from_flags,
    weighted,
)
from hfmerge.cli.terminal import display
from hfmerge.engine.options import DEFAULT
from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.recipe import Recipe, load_recipe
from hfmerge.validation.quoting import tell
from hfmerge.validation.wording import size


if TYPE_CHECKING:
    from hfmerge.engine.plan import Plan


def register(command: Command) -> None:
    """Add the commands of this file."""
    for name, text, run in (
        ("merge", "Merge models into a new folder, a Hub repository, or both.", _merge),
        ("plan", "Print what a merge would do, from headers alone. No weights are downloaded.", _plan),
    ):
        sub = command(name, text, run)
        sub.add_argument(
            "items",
            nargs="*",
            metavar="RECIPE.yaml | MODEL[=WEIGHT]",
            help="a recipe, or models in order of arrival, each with its weight (default: 1)",
        )
        _recipe_flags(sub)
        if name == "merge":
            push_flags(sub)
            dry_run_flag(sub)
            run_flags(sub)
    sub = command("convert", "Print a mergekit configuration as a recipe of hfmerge.", _convert)
    sub.add_argument("recipe", metavar="CONFIG.yaml")
    command("methods", "List the merging methods and their options.", _methods)


def _recipe_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("recipe (a flag overrides the key of the same name)")
    key_flags(group, [key for key in keys_of(Recipe) if key.required])
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method (default: see `hfmerge methods`)",
    )
    group.add_argument(
        "--learn",
        action="append",
        nargs="?",
        const="",
        metavar="NAME=VALUE",
        help="learn the weights (for mdm_oc, mdm_oc_iso, mdm_oc_subspace, gram, task_arithmetic) from rows that the "
        "models make, or with loss=labels suite=SUITE from labelled rows; see How to: Learn the weights "
        "(default: not)",
    )
    group.add_argument(
        "--weight",
        action="append",
        metavar="W",
        help="weight of a model, one per model of a recipe, in order (default: 1)",
    )
    group.add_argument(
        "--norm",
        metavar="none|mean|fit|NUMBER",
        help="norm of the merged change; fit-matrix: fit for each matrix (default: the method's)",
    )
    alias_flag(group)
    key_flags(group, [key for key in keys_of(Recipe) if not key.required])


def _asked(args: argparse.Namespace) -> Recipe:
    from hfmerge.recipe.overrides import apply_overrides

    items = list(args.items)
    recipe = None
    if items and items[0].endswith((".yaml", ".yml")):
        recipe = load_recipe(items.pop(0))
    models, weights = weighted(items, args.weight)
    return apply_overrides(
        recipe,
        models=models or None,
        options=args.option,
        weights=weights,
        aliases=aliases_from_flags(args),
        norm=args.norm,
        learn=None if args.learn is None else [word for word in args.learn if word],
        **{key.name: getattr(args, key.name) for key in keys_of(Recipe) if key.flag is not None},
    )


def _merge(args: argparse.Namespace) -> int:
    from hfmerge.lifecycle.early import all_faults

    options, publishing = run_options_from_flags(args), push_arguments(args)
    with all_faults(options, **publishing):
        recipe = _asked(args)
    return carry_out(args, "merge", recipe, **publishing, options=options)


def _plan(args: argparse.Namespace) -> int:
    from hfmerge import api
    from hfmerge.engine.estimate import more_states
    from hfmerge.lifecycle.early import all_faults
    from hfmerge.recipe.weights import shown

    with all_faults(DEFAULT, planning=True):
        recipe = _asked(args)
    planned = api.plan(recipe)
    for warning in planned.warnings:
        tell(f"warning: {warning}")
    if args.json:
        print_json(_plan_data(planned))
        return 0
    need = planned.estimate
    display(f"base   {planned.base.snapshot.label}  {planned.base_layout.architecture}")
    for delta, entry in zip(planned.deltas, planned.recipe.models, strict=True):
        source = delta.source
        changed = len({*delta.full, *delta.lora, *delta.beneath})
        weighs = f"weight {shown(entry.weight)}"
        display(f"model  {source.label}  {source.kind}, {weighs}, changes {changed} parameters")
    for model, head in planned.heads:
        source = planned.deltas[model].source
        display(f"head   {source.called or source.name}  {', '.join(head.tensors)}  ({len(head.labels)} labels)")
    for line in planned.choices:
        display(f"choice {line}")
    modes = [param.mode if param.touched or param.mode != "merge" else "copy" for param in planned.params]
    display(f"method {planned.method.name} {planned.recipe.method.options} norm {planned.norm}")
    display(
        f"tensors  {len(modes)}: {modes.count('merge')} merged, {modes.count('copy')} copied, {modes.count('tied')} "
        "tied"
    )
    rows = (("download", need.download), ("read", need.read), ("output", need.output), ("state", need.state))
    display("bytes    " + ", ".join(f"{name} {size(value)}" for name, value in rows))
    if (advice := more_states(planned)) is not None:
        display(f"states   {advice}")
    if planned.recipe.keep_sources:
        display(f"sources  copies are kept beside the state and published with it: at most {size(need.sources)}")
    if planned.recipe.stream:
        display(f"stream   {size(need.stream)} from the Hub as they are needed; only the result is stored")
    display(f"needs    {needs(need)}")
    return 0


def _plan_data(planned: Plan) -> dict[str, Any]:
    from hfmerge.recipe.weights import stored

    heads = [(planned.deltas[model].source, head) for model, head in planned.heads]
    return {
        "base": planned.base.snapshot.label,
        "architecture": planned.base_layout.architecture,
        "models": [delta.source.label for delta in planned.deltas],
        "weights": [stored(entry.weight) for entry in planned.recipe.models],
        "method": planned.recipe.method.to_dict(),
        "heads": {source.called or source.name: list(head.labels) for source, head in heads},
        "tensors": [
            {
                "name": param.key,
                "file": param.file,
                "dtype": param.slot.dtype,
                "shape": list(param.slot.shape),
                "mode": param.mode,
                "matrices": sum(block.matrix for block in param.blocks),
                "ranks": list(param.ranks),
            }
            for param in planned.params
        ],
        "choices": planned.choices,
        "estimate": vars(planned.estimate),
        "warnings": list(planned.warnings),
    }


def _convert(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe)
    for note in recipe.notes:
        tell(f"note: {note}")
    if args.json:
        print_json(recipe.to_dict())
    else:
        display(*recipe.to_yaml().rstrip("\n").split("\n"))
    return 0


def _methods(args: argparse.Namespace) -> int:
    from hfmerge.methods import faulty, registry

    methods = registry()
    for name, why in faulty().items():
        tell(f"hfmerge: {name}: {why}.")
    if args.json:
        data = {}
        for name, method in methods.items():
            fields = dataclasses.fields(method)
            data[name] = {f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields}
        print_json(data)
        return 0
    for name, method in methods.items():
        display(f"{name}: {str(method.__doc__).strip().splitlines()[0]} (norm: {method.default_norm})")
        for item in dataclasses.fields(method):
            display(f"    {item.name} = {item.default}: {item.metadata.get('help', '')}")
    return 0
