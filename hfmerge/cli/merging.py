"""Commands that start from a recipe: merge, plan, convert; and the list of methods."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from hfmerge.cli.shared import (
    Command,
    consent_flags,
    print_json,
    print_result,
    push_arguments,
    push_flags,
    run_flags,
    run_options,
    size,
    stream_flag,
)
from hfmerge.validation.quoting import say, tell


if TYPE_CHECKING:
    from hfmerge.engine.plan import Plan
    from hfmerge.recipe.recipe import Recipe


def register(command: Command) -> None:
    """Add the commands of this file."""
    for name, text, run in (
        ("merge", "Merge models into a new folder, a Hub repository, or both.", _merge),
        ("plan", "Print what a merge would do, from headers alone; downloads no weights.", _plan),
    ):
        sub = command(name, text, run)
        sub.add_argument(
            "items", nargs="*", metavar="RECIPE.yaml | MODEL", help="a recipe, or models in order of arrival"
        )
        _recipe_flags(sub)
        if name == "merge":
            push_flags(sub)
            run_flags(sub)
    sub = command("convert", "Print a mergekit configuration as a recipe of hfmerge.", _convert)
    sub.add_argument("recipe", metavar="CONFIG.yaml")
    command("methods", "List the merging methods and their options.", _methods)


def _recipe_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("recipe (a flag overrides the key of the same name)")
    group.add_argument("--base", metavar="MODEL", help="the model all others were tuned from")
    group.add_argument("--method", metavar="NAME", help="see `hfmerge methods`")
    group.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method")
    group.add_argument(
        "--learn",
        action="append",
        nargs="?",
        const="",
        metavar="NAME=VALUE",
        help="learn the weights (of mdm_oc, mdm_oc_iso, mdm_oc_subspace, gram, task_arithmetic) from what models say "
        "of rows that they made, or, with loss=labels suite=SUITE, of labelled rows; see How to: Learn the weights",
    )
    group.add_argument("--weight", action="append", metavar="W", help="one per model, in order")
    group.add_argument("--norm", metavar="none|mean|NUMBER", help="norm of the merged change")
    group.add_argument("--dtype", help="of the output: float32, bfloat16, float16, float64")
    group.add_argument("--include", action="append", metavar="PATTERN", help="merge only parameters of these names")
    group.add_argument("--exclude", action="append", metavar="PATTERN", help="keep the base's value of these")
    group.add_argument("--vocabulary", metavar="base|union", help="how differing vocabularies are aligned, by token")
    group.add_argument("--state", metavar="none|last|all|K", help="which carried states are kept (default: last)")
    group.add_argument("--output", metavar="FOLDER")
    group.add_argument("--push-to", metavar="REPO_ID")
    group.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    group.add_argument(
        "--allow-nonfinite", action="store_true", default=None, help="go on with NaN or Inf in a source"
    )
    consent_flags(group)
    group.add_argument(
        "--keep-sources",
        action="store_true",
        default=None,
        help="keep compressed copies of base and models beside the states, readable by all who may read the merge",
    )
    stream_flag(group, None)


def _asked(args: argparse.Namespace) -> Recipe:
    from hfmerge.recipe.overrides import apply_overrides
    from hfmerge.recipe.recipe import load_recipe

    items = list(args.items)
    recipe = None
    if items and items[0].endswith((".yaml", ".yml")):
        recipe = load_recipe(items.pop(0))
    return apply_overrides(
        recipe,
        base=args.base,
        models=items or None,
        method=args.method,
        options=args.option,
        weights=args.weight,
        norm=args.norm,
        dtype=args.dtype,
        include=args.include,
        exclude=args.exclude,
        vocabulary=args.vocabulary,
        state=args.state,
        output=args.output,
        push_to=args.push_to,
        private=args.private,
        allow_nonfinite=args.allow_nonfinite,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
        stream=args.stream,
        keep_sources=args.keep_sources,
        learn=None if args.learn is None else [word for word in args.learn if word],
    )


def _merge(args: argparse.Namespace) -> int:
    from hfmerge import api

    result = api.merge(_asked(args), **push_arguments(args), options=run_options(args))
    return print_result(args, result)


def _plan(args: argparse.Namespace) -> int:
    from hfmerge import api
    from hfmerge.recipe.weights import shown

    planned = api.plan(_asked(args))
    for warning in planned.warnings:
        tell(f"warning: {warning}")
    if args.json:
        print_json(_plan_data(planned))
        return 0
    need = planned.estimate
    say(f"base   {planned.base.pinned.label}  {planned.base_layout.architecture}")
    for delta, entry in zip(planned.deltas, planned.recipe.models, strict=True):
        source = delta.source
        changed = len({*delta.full, *delta.lora, *delta.beneath})
        weighs = f"weight {shown(entry.weight)}"
        say(f"model  {source.pinned.label}  {source.kind}, {weighs}, changes {changed} parameters")
    for model, head in planned.heads:
        say(f"head   {planned.deltas[model].source.name}  {', '.join(head.tensors)}  ({len(head.labels)} labels)")
    for line in planned.choices:
        say(f"choice {line}")
    modes = [param.mode if param.touched or param.mode != "merge" else "copy" for param in planned.params]
    say(f"method {planned.method.name} {planned.recipe.method.options} norm {planned.norm}")
    say(
        f"tensors  {len(modes)}: {modes.count('merge')} merged, {modes.count('copy')} copied, {modes.count('tied')} "
        "tied"
    )
    rows = (("download", need.download), ("read", need.read), ("output", need.output), ("state", need.state))
    say("bytes    " + ", ".join(f"{name} {size(value)}" for name, value in rows))
    if planned.recipe.keep_sources:
        say(f"sources  copies are kept beside the state and published with it: at most {size(need.sources)}")
    if planned.recipe.stream:
        say(f"stream   {size(need.stream)} from the Hub as they are needed; nothing is stored but the result")
    say(f"needs    disk {size(need.disk)}, memory about {size(need.memory)}, time about {need.seconds:.0f} s")
    return 0


def _plan_data(planned: Plan) -> dict[str, Any]:
    from hfmerge.recipe.weights import stored

    return {
        "base": planned.base.pinned.label,
        "architecture": planned.base_layout.architecture,
        "models": [delta.source.pinned.label for delta in planned.deltas],
        "weights": [stored(entry.weight) for entry in planned.recipe.models],
        "method": planned.recipe.method.to_dict(),
        "heads": {planned.deltas[model].source.name: list(head.labels) for model, head in planned.heads},
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
    from hfmerge.recipe.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    for note in recipe.notes:
        tell(f"note: {note}")
    if args.json:
        print_json(recipe.to_dict())
    else:
        say(*recipe.to_yaml().rstrip("\n").split("\n"))
    return 0


def _methods(args: argparse.Namespace) -> int:
    from hfmerge.methods import registry

    methods = registry()
    if args.json:
        data = {}
        for name, method in methods.items():
            fields = dataclasses.fields(method)
            data[name] = {f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields}
        print_json(data)
        return 0
    for name, method in methods.items():
        say(f"{name}: {str(method.__doc__).strip().splitlines()[0]} (norm: {method.default_norm})")
        for item in dataclasses.fields(method):
            say(f"    {item.name} = {item.default}: {item.metadata.get('help', '')}")
    return 0
