"""`hfmerge hub import`, `export` and `fsck`: the same whether a server runs on the store or not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError
from hfmerge.hubserver.people import add_root


def main_import(argv: list[str]) -> int:
    """`hfmerge hub import FOLDER`. Returns the exit code."""
    parser = _parser(
        "import",
        "Put a folder into the store: an export of `hfmerge hub export` (with the same commits), a Hugging Face cache"
        " or one `models--org--name` folder of it (the files of main, as one commit), or plain files (as one commit).",
    )
    parser.add_argument("source", type=Path, metavar="FOLDER_OR_CACHE")
    parser.add_argument("--as", dest="name", metavar="ID", help="org/name, or datasets/org/name, of the repository")
    parser.add_argument("--owner", metavar="USER", help="user who owns a repository that has to be made")
    parser.add_argument("--private", action="store_true", help="a repository that has to be made is private")

    def work(arguments: argparse.Namespace) -> int:
        kind, name = _repository(arguments.name) if arguments.name is not None else ("model", None)
        request = {"source": str(arguments.source.absolute()), "as": name, "kind": kind}
        request |= {"owner": arguments.owner, "private": arguments.private}
        made = _perform(arguments, "import", request, new=True)
        _show(arguments, made, [f"{_full(one['kind'], one['repo'])} {one['commit']}" for one in made])
        return 0

    return _run(parser, argv, work)


def main_export(argv: list[str]) -> int:
    """`hfmerge hub export REPO DIR`. Returns the exit code."""
    parser = _parser(
        "export",
        "Write a repository into a new folder: whole (a git bundle, the large files, a manifest; `hfmerge hub import`"
        " takes it back with the same commits), or with --revision the plain files of one revision. Discussions and"
        " access lists are not exported.",
    )
    parser.add_argument("repo", metavar="REPO", help="org/name, or datasets/org/name")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--revision", metavar="REV", help="only the files of this branch, tag or commit")

    def work(arguments: argparse.Namespace) -> int:
        kind, name = _repository(arguments.repo)
        request = {"repo": name, "kind": kind, "folder": str(arguments.folder.absolute())}
        done = _perform(arguments, "export", {**request, "revision": arguments.revision})
        _show(arguments, done, [f"{_full(kind, done['repo'])} {done['commit']} -> {arguments.folder}"])
        return 0

    return _run(parser, argv, work)


def main_fsck(argv: list[str]) -> int:
    """`hfmerge hub fsck`. Returns the exit code: 1 if there are faults that were not repaired."""
    parser = _parser(
        "fsck",
        "Check a store: every commit, folder, file and large file against its digest, the database against git, and"
        " what ended servers left. One line a fault. Exit code 1 if there is a fault that was not repaired.",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove what was left, and put large files with wrong bytes aside, so that they can be sent again",
    )

    def work(arguments: argparse.Namespace) -> int:
        faults = _perform(arguments, "fsck", {"repair": arguments.repair})
        bad = [fault for fault in faults if not fault["harmless"] and not fault["repaired"]]
        counted = f"{len(bad)} fault{'s' if len(bad) != 1 else ''}"
        _show(arguments, {"faults": faults}, [*(fault["line"] for fault in faults), counted])
        return 1 if bad else 0

    return _run(parser, argv, work)


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"hfmerge hub {verb}", description=description)
    add_root(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _run(parser: argparse.ArgumentParser, argv: list[str], work: Callable[[argparse.Namespace], int]) -> int:
    try:
        return work(parser.parse_args(argv))
    except HfMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _perform(arguments: argparse.Namespace, verb: str, request: dict[str, Any], *, new: bool = False) -> Any:
    try:
        from hfmerge.hubserver.control import perform
    except ModuleNotFoundError as error:
        raise HfMergeError(f"the hub server needs {error.name}; run: pip install 'hfmerge[hub]'") from error
    return perform(arguments.root, verb, request, new=new)


def _show(arguments: argparse.Namespace, value: Any, lines: list[str]) -> None:
    if arguments.json:
        print(json.dumps(value, indent=1))
        return
    for line in lines:
        # Names come from repositories: nothing in them may move the cursor.
        print("".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in line))


def _repository(text: str) -> tuple[str, str]:
    kind, name = ("dataset", text.removeprefix("datasets/")) if text.startswith("datasets/") else ("model", text)
    if name.count("/") != 1:
        raise HfMergeError(f"{text}: write org/name or datasets/org/name")
    return kind, name


def _full(kind: str, name: str) -> str:
    return name if kind == "model" else f"{kind}s/{name}"
