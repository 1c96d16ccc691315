"""The command that scores models on suites of tasks, and puts the results into cards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.cli.shared import Command, first_process, print_json
from hfmerge.cli.terminal import display
from hfmerge.errors import HfMergeError
from hfmerge.validation.quoting import tell


if TYPE_CHECKING:
    from hfmerge.evaluation.results import Matrix
    from hfmerge.hub.commits import Commit


def register(command: Command) -> None:
    """Add the commands of this file."""
    sub = command("evaluate", "Score models, adapters and merges on the tasks of a suite.", _evaluate)
    sub.add_argument("models", nargs="+", metavar="MODEL", help="models to score; one row per model")
    sub.add_argument(
        "--suite", required=True, metavar="NAME | FILE.yaml", help="a suite that `hfmerge suites` lists, or a file"
    )
    sub.add_argument(
        "--task", action="append", metavar="NAME", help="only this task; may be given several times (default: all)"
    )
    sub.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="TASK=MODEL",
        help="model whose head a task uses; `*=MODEL` for all tasks",
    )
    sub.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use at most this many rows of each task, a seeded sample (default: all)",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of samples and intervals (default: 0)")
    sub.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows in a batch (default: 32)")
    sub.add_argument(
        "--device", help="device: cpu, auto, cuda, cuda:1 (default: auto, an accelerator if there is one)"
    )
    sub.add_argument(
        "--dtype", help="dtype of the weights (default: float32 on the CPU, the stored dtype on other devices)"
    )
    sub.add_argument("--no-cache", action="store_true", help="compute every score again, and remember none")
    sub.add_argument(
        "--skip-missing", action="store_true", help="leave a cell empty if the model has no head for the task"
    )
    sub.add_argument("--by-task", action="store_true", help="print one row per task")
    sub.add_argument("--output", metavar="STEM", help="write STEM.json, STEM.md and STEM.csv (default: print alone)")
    sub.add_argument("--write-card", action="store_true", help="put the results into the cards of MODEL folders")
    sub.add_argument("--push-to", metavar="REPO_ID", help="put the results into the card of this model on the Hub")
    sub.add_argument("--create-pr", action="store_true", help="push as a pull request")
    sub = command("suites", "List the suites that come with hfmerge, or pin one to the present commits.", _suites)
    sub.add_argument(
        "--pin", metavar="NAME | FILE.yaml", help="pin the data sets and heads of this suite to their present commits"
    )
    sub.add_argument("--output", metavar="FILE.yaml", help="file for the pinned suite (default: print it)")


def _evaluate(args: argparse.Namespace) -> int:
    heads = _pairs(args.head)
    folders = [Path(model) for model in args.models if Path(model).is_dir()]
    if args.write_card and not folders:
        raise HfMergeError("--write-card: none of the models is a folder; use --push-to for one on the Hub.")
    if args.create_pr and not args.push_to:
        raise HfMergeError("--create-pr: say where to: --push-to REPO_ID.")
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise HfMergeError(f"--{name.replace('_', '-')}: must be at least 1.")
    if args.quiet:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    from hfmerge import api
    from hfmerge.evaluation.evaluator import Settings
    from hfmerge.evaluation.results import save_results
    from hfmerge.lifecycle.push_target import admit_card

    if args.push_to and first_process():
        admit_card(args.push_to, create_pr=args.create_pr)
    settings = Settings(
        args.limit, args.seed, args.batch_size, args.device, args.dtype, not args.no_cache, args.skip_missing
    )
    matrix = api.evaluate(
        args.models, args.suite, tasks=args.task, heads=heads, settings=settings, progress=not args.quiet
    )
    if not first_process():
        return 0
    written = save_results(matrix, Path(args.output)) if args.output else []
    pushed = _report(matrix, args, folders, written)
    for note in matrix.notes:
        tell(f"note: {note}")
    if args.json:
        print_json(matrix.to_dict() | {"written": [str(path) for path in written], "pushed": pushed and vars(pushed)})
        return 0
    display(*matrix.to_markdown(by_task=args.by_task).rstrip("\n").split("\n"))
    for path in written:
        display(f"written to {path}")
    if pushed is not None:
        display(f"pushed to {pushed.pull_request or pushed.url}")
    return 0


def _report(matrix: Matrix, args: argparse.Namespace, folders: Sequence[Path], written: list[Path]) -> Commit | None:
    """Put results into cards: of folders, and of one repository."""
    from hfmerge.evaluation.report import push_results, write_results

    if args.write_card:
        rows = dict(zip(args.models, matrix.models, strict=True))
        written += [write_results(matrix, Path(m), rows[m].label) for m in args.models if Path(m) in folders]
    return push_results(matrix, args.push_to, create_pr=args.create_pr) if args.push_to else None


def _pairs(items: Sequence[str]) -> dict[str, str]:
    for item in items:
        if not all(item.partition("=")[::2]):
            raise HfMergeError(f"--head {item}: write TASK=MODEL.")
    return {name: model for name, _, model in (item.partition("=") for item in items)}


def _suites(args: argparse.Namespace) -> int:
    from hfmerge.evaluation.suite import extras, load_suite, ready_suites

    if args.output and not args.pin:
        raise HfMergeError("--output: is for a pinned suite; say which: --pin NAME.")
    if args.pin:
        return _pin(args)
    suites = {name: load_suite(path) for name, path in ready_suites().items()}
    if args.json:
        print_json(
            {
                name: {"description": s.description, "needs": extras(s), "tasks": [t.to_dict() for t in s.tasks]}
                for name, s in suites.items()
            }
        )
        return 0
    for name, suite in suites.items():
        display(f"{name}: {suite.description}")
        display(f"    {', '.join(task.name for task in suite.tasks)}")
        remote = {task.dataset for task in suite.tasks if task.dataset and not task.dataset.startswith((".", "/"))}
        loads = f", and {len(remote)} data set{'s' if len(remote) > 1 else ''} from the Hub" if remote else ""
        display(f"    needs `pip install 'hfmerge[{','.join(extras(suite))}]'`{loads}")
    return 0


def _pin(args: argparse.Namespace) -> int:
    from hfmerge.evaluation.data import pinned_suite, suite_text
    from hfmerge.evaluation.suite import load_suite

    suite = pinned_suite(load_suite(args.pin))
    if args.output is None and not args.json:
        display(*suite_text(suite).rstrip("\n").split("\n"))
    elif args.output is not None:
        try:
            Path(args.output).write_text(suite_text(suite), encoding="utf-8")
        except OSError as error:
            raise HfMergeError(f"{args.output}: cannot be written ({error.strerror}).") from error
    if args.json:
        print_json({"digest": suite.digest, "tasks": [task.to_dict() for task in suite.tasks]})
    elif args.output is not None:
        display(f"written to {args.output}")
    return 0
