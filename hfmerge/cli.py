"""The command line: parses, calls one verb of `api`, prints.

Exit codes: 0 done, 1 a known error or a failed check, 2 wrong usage.

Results go to standard output (`--json` for machines), progress and warnings to standard error. `HFMERGE_DEBUG=1` shows
tracebacks.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.errors import HfMergeError, LostProcessError
from hfmerge.version import __version__


if TYPE_CHECKING:
    from hfmerge.options import RunOptions
    from hfmerge.planning import Plan
    from hfmerge.recipe import ModelEntry, Recipe


def _reuse_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next; by default every tensor gets fresh, zeroed pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, 4 * _KEPT_BYTES)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_KEPT_BYTES = 32 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:
        # a program of its own, not a call: collecting garbage among the modules of torch and transformers, at every
        # thousandth object and once more at the end, costs a second or two and frees nothing
        gc.set_threshold(100_000, 50, 50)
        atexit.register(gc.freeze)
        _reuse_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["hub"]:
        return _hub(arguments[1:])
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        code: int = args.run(args)
        return code
    except HfMergeError as error:
        if os.environ.get("HFMERGE_DEBUG"):
            raise
        if isinstance(error, LostProcessError) and error.reported:
            pass  # said already, by the first process to know
        elif not _first_process():
            # rank 0 raises the same error, unless it is gone itself
            print(f"hfmerge (process {os.environ.get('RANK')}): {error}", file=sys.stderr)
        else:
            print(f"hfmerge: {error}", file=sys.stderr)
        if args.json and _first_process():
            _print_json({"error": str(error), "type": type(error).__name__})
        return 1
    except KeyboardInterrupt:
        print("hfmerge: interrupted; nothing was written.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader of our output left early; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfmerge",
        description="Merge fine-tuned models by Hub ID, one after another, and take any one out again, exactly.",
        epilog="`hfmerge COMMAND --help` explains a command. A MODEL is org/name[@revision], a folder, hf://org/name, "
        "or base+adapter.",
    )
    parser.add_argument("--version", action="version", version=f"hfmerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
        return sub

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
            sub.add_argument("--create-pr", action="store_true", help="push as a pull request")
            _storage_flag(sub)
            _resume_flag(sub)
            _memory_flag(sub)
    sub = command("add", "Merge further models into an existing merge.", _add)
    sub.add_argument("merged", metavar="MERGED", help="org/name or folder of a merge")
    sub.add_argument("models", nargs="+", metavar="MODEL")
    sub.add_argument("--weight", action="append", type=float, metavar="W", help="one per model, in order")
    _change_flags(sub)
    sub = command("unmerge", "Take models out: the bytes become those of the merge that never saw them.", _unmerge)
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--remove", action="append", required=True, metavar="MODEL", help="may be given several times")
    _change_flags(sub)
    sub = command("history", "Print a merge's ledger as a table.", _history)
    sub.add_argument("merged", metavar="MERGED")
    sub = command(
        "verify", "Check a merge against its ledger; exit code 1 and the culprit's name if anything differs.", _verify
    )
    sub.add_argument("merged", metavar="MERGED")
    sub.add_argument("--replay", action="store_true", help="merge again from the sources and compare every byte")
    _source_flag(sub)
    sub = command("push", "Publish a merge folder: one commit, guarded against a concurrent push.", _push)
    sub.add_argument("folder", metavar="FOLDER")
    sub.add_argument("repo_id", metavar="REPO_ID")
    sub.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request")
    sub = command("convert", "Print a mergekit configuration as a recipe of hfmerge.", _convert)
    sub.add_argument("recipe", metavar="CONFIG.yaml")
    command("methods", "List the merging methods and their options.", _methods)
    hub = commands.add_parser("hub", help="A Hub on loopback: `hfmerge hub serve`, `hfmerge hub run -- COMMAND`.")
    hub.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def _recipe_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("recipe (a flag overrides the key of the same name)")
    group.add_argument("--base", metavar="MODEL", help="the model all others were tuned from")
    group.add_argument("--method", metavar="NAME", help="see `hfmerge methods`")
    group.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method")
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
    group.add_argument("--allow-pickle", action="store_true", default=None, help="read pickled .bin weights")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code from repositories")
    _stream_flag(group, None)


def _change_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--output", metavar="FOLDER", help="a new folder; default: a MERGED folder is replaced in one rename"
    )
    sub.add_argument("--push-to", metavar="REPO_ID", help="publish the result")
    sub.add_argument("--create-pr", action="store_true", help="push as a pull request")
    _storage_flag(sub)
    _resume_flag(sub)
    _memory_flag(sub)
    _stream_flag(sub, False)
    _source_flag(sub)


def _stream_flag(sub: argparse._ActionsContainer, default: bool | None) -> None:
    sub.add_argument(
        "--stream",
        action="store_true",
        default=default,
        help="read weights from the Hub as they are needed; nothing is stored but the result",
    )


def _storage_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--storage",
        choices=("auto", "shared", "local"),
        default="auto",
        help="whether several machines share the output's disk (default: find out)",
    )


def _resume_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="insist on going on from a killed run, or on starting anew (default: go on if it was the same work)",
    )


def _memory_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--max-memory", metavar="SIZE", help="what each process should stay below: 4GB, 800MiB (default: no bound)"
    )


def _options(args: argparse.Namespace) -> RunOptions:
    from hfmerge.options import RunOptions, parse_size

    memory = parse_size(args.max_memory) if args.max_memory is not None else None
    return RunOptions(args.storage, args.resume, memory, _notify)


def _notify(line: str) -> None:
    print(f"hfmerge: {line}", file=sys.stderr, flush=True)


def _source_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--source", action="append", default=[], metavar="NAME=FOLDER", help="where a merged folder lies now"
    )


def _sources(args: argparse.Namespace) -> dict[str, str]:
    pairs = [item.partition("=") for item in args.source]
    if bad := [item for item in args.source if "=" not in item]:
        raise HfMergeError(f"--source {bad[0]}: write NAME=FOLDER.")
    return {name: folder for name, _, folder in pairs}


def _asked(args: argparse.Namespace) -> Recipe:
    from hfmerge.flags import apply_overrides
    from hfmerge.recipe import load_recipe

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
    )


def _merge(args: argparse.Namespace) -> int:
    from hfmerge import api

    result = api.merge(_asked(args), create_pr=args.create_pr, options=_options(args))
    return _print_result(args, result)


def _add(args: argparse.Namespace) -> int:
    from hfmerge import api
    from hfmerge.recipe import ModelEntry

    weights = args.weight or [1.0] * len(args.models)
    if len(weights) != len(args.models):
        raise HfMergeError(f"--weight: {len(weights)} given for {len(args.models)} models; give one a model.")
    models: list[str | ModelEntry] = [ModelEntry(m, w) for m, w in zip(args.models, weights, strict=True)]
    result = api.add(
        args.merged,
        models,
        output=args.output,
        push_to=args.push_to,
        create_pr=args.create_pr,
        sources=_sources(args),
        stream=args.stream,
        options=_options(args),
    )
    return _print_result(args, result)


def _unmerge(args: argparse.Namespace) -> int:
    from hfmerge import api

    result = api.unmerge(
        args.merged,
        args.remove,
        output=args.output,
        push_to=args.push_to,
        create_pr=args.create_pr,
        sources=_sources(args),
        stream=args.stream,
        options=_options(args),
    )
    return _print_result(args, result)


def _first_process() -> bool:
    """True unless a launcher started this process as another rank than 0."""
    return os.environ.get("RANK", "0") == "0"


def _print_result(args: argparse.Namespace, result: Any) -> int:
    entry = result.entry
    if not _first_process():
        return 0
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    pushed = result.pushed
    if args.json:
        _print_json(
            {
                "output": str(result.folder) if result.folder else None,
                "step": entry.step,
                "action": entry.action,
                "models": [model.identity for model in entry.models],
                "how": entry.how,
                "products": dict(entry.products),
                "scale": entry.scalars["scale"],
                "merged_norm": entry.scalars["merged_norm"],
                "deviation": entry.scalars.get("deviation"),
                "norms": [(model.squared_norm or 0.0) ** 0.5 for model in entry.models],
                "seconds": dict(result.seconds),
                "processes": result.processes,
                "reused": result.reused,
                "streamed": None if result.streamed is None else dataclasses.asdict(result.streamed),
                "warnings": list(result.warnings),
                "pushed": None if pushed is None else {**vars(pushed), "notes": list(pushed.notes)},
            }
        )
        return 0
    crew = f" on {result.processes} processes" if result.processes > 1 else ""
    print(f"{entry.action} (step {entry.step}): {entry.how}, {result.seconds['total']:.1f} s{crew}")
    for model in entry.models:
        print(f"  {model.label:<48} weight {model.weight:<6g} norm {(model.squared_norm or 0.0) ** 0.5:.4g}")
    print(f"  norm of the merged change: {entry.scalars['merged_norm']:.4g}")
    if "deviation" in entry.scalars:
        print(f"  off the exact last step by up to {entry.scalars['deviation']:.1e} of a change, by sample")
    if (streamed := result.streamed) is not None:
        checked, files = len(streamed.verified), len(streamed.verified) + len(streamed.unverified)
        print(
            f"streamed {_size(streamed.received)} in {streamed.requests} requests, {streamed.failures} repeated: "
            f"{_size(streamed.again)} more than once, {_size(streamed.beyond)} beyond need; {checked} of {files} "
            "files compared with their digests"
        )
    if result.folder:
        print(f"written to {result.folder}")
    if pushed is not None:
        print(f"pushed to {pushed.pull_request or pushed.url}")
        for note in pushed.notes:
            print(f"note: {note}", file=sys.stderr)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from hfmerge import api

    planned = api.plan(_asked(args))
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        _print_json(_plan_data(planned))
        return 0
    need = planned.estimate
    print(f"base   {planned.base.pinned.label}  {planned.base_layout.architecture}")
    for delta, weight in zip(planned.deltas, planned.weights, strict=True):
        source = delta.source
        changed = len({*delta.full, *delta.lora, *delta.beneath})
        print(f"model  {source.pinned.label}  {source.kind}, weight {weight:g}, changes {changed} parameters")
    for model, head in planned.heads:
        print(f"head   {planned.deltas[model].source.name}  {', '.join(head.tensors)}  ({len(head.labels)} labels)")
    modes = [param.mode if param.touched or param.mode != "merge" else "copy" for param in planned.params]
    print(f"method {planned.method.name} {planned.recipe.method.options} norm {planned.norm}")
    print(
        f"tensors  {len(modes)}: {modes.count('merge')} merged, {modes.count('copy')} copied, {modes.count('tied')} "
        "tied"
    )
    rows = (("download", need.download), ("read", need.read), ("output", need.output), ("state", need.state))
    print("bytes    " + ", ".join(f"{name} {_size(value)}" for name, value in rows))
    if planned.recipe.stream:
        print(f"stream   {_size(need.stream)} from the Hub as they are needed; nothing is stored but the result")
    print(f"needs    disk {_size(need.disk)}, memory about {_size(need.memory)}, time about {need.seconds:.0f} s")
    return 0


def _plan_data(planned: Plan) -> dict[str, Any]:
    return {
        "base": planned.base.pinned.label,
        "architecture": planned.base_layout.architecture,
        "models": [delta.source.pinned.label for delta in planned.deltas],
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
        "estimate": vars(planned.estimate),
        "warnings": list(planned.warnings),
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _history(args: argparse.Namespace) -> int:
    from hfmerge.digest import sha256_bytes
    from hfmerge.merged import open_merged
    from hfmerge.workspace import recover

    recover(args.merged)
    merged = open_merged(args.merged)
    if args.json:
        _print_json(
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

    report = api.verify(args.merged, replay=args.replay, sources=_sources(args))
    if args.json:
        _print_json({"merged": report.merged, "ok": report.ok, "checks": [vars(check) for check in report.checks]})
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.what}: {check.detail}")
        print(f"{report.merged}: {'verified' if report.ok else 'NOT what its ledger says'}")
    return 0 if report.ok else 1


def _push(args: argparse.Namespace) -> int:
    from hfmerge import api

    pushed = api.push(args.folder, args.repo_id, private=args.private, create_pr=args.create_pr)
    if args.json:
        _print_json({**vars(pushed), "notes": list(pushed.notes)})
        return 0
    print(f"pushed to {pushed.pull_request or pushed.url}")
    for note in pushed.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from hfmerge.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    for note in recipe.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        _print_json(recipe.to_dict())
    else:
        print(recipe.to_yaml(), end="")
    return 0


def _methods(args: argparse.Namespace) -> int:
    from hfmerge.methods import registry

    methods = registry()
    if args.json:
        data = {}
        for name, method in methods.items():
            fields = dataclasses.fields(method)
            data[name] = {f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields}
        _print_json(data)
        return 0
    for name, method in methods.items():
        print(f"{name}: {str(method.__doc__).strip().splitlines()[0]} (norm: {method.default_norm})")
        for item in dataclasses.fields(method):
            print(f"    {item.name} = {item.default}: {item.metadata.get('help', '')}")
    return 0


def _hub(argv: list[str]) -> int:
    usage = "usage: hfmerge hub serve [...] | hfmerge hub run [...] -- COMMAND"
    try:
        from hfmerge.hubserver.serve import main_run, main_serve
    except ImportError as error:
        print(f"hfmerge: the Hub on loopback needs `pip install hfmerge[hub]` ({error}).", file=sys.stderr)
        return 1
    if argv[:1] == ["serve"]:
        return main_serve(argv[1:])
    if argv[:1] == ["run"]:
        return main_run(argv[1:])
    print(usage, file=sys.stderr if argv[:1] not in (["--help"], ["-h"]) else sys.stdout)
    return 0 if argv[:1] in (["--help"], ["-h"]) else 2


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
