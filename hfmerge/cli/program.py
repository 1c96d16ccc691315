"""The command line: parses, calls one verb of `api`, prints.

Exit codes: 0 done, 1 a known error or a failed check, 2 wrong usage, 3 checks that hold only within the tolerance of
other arithmetic (`verify --replay`), 130 interrupted by Ctrl-C.

Results go to standard output (`--json` for machines), progress and warnings to standard error. `HFMERGE_DEBUG=1` shows
tracebacks.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache

from hfmerge.cli import changing, continual, evaluating, inspecting, merging, proving, publishing, reading, revising
from hfmerge.cli.completion import SHELLS, PrintCompletion
from hfmerge.cli.flags import Flags
from hfmerge.cli.hub_settings import WITHOUT_HUB, hub_flags, hub_settings
from hfmerge.cli.parsing import EXAMPLES, Parser, parse
from hfmerge.cli.shared import first_process, print_json
from hfmerge.errors import HfMergeError, LostProcessError
from hfmerge.hub.progress_bar import only_on_a_terminal
from hfmerge.validation.quoting import say, tell
from hfmerge.validation.wording import spelled
from hfmerge.version import __version__


def reuse_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next, up to `_KEPT_BYTES`; by default each gets fresh pages.

    Who has set `MALLOC_MMAP_THRESHOLD_` (bytes) has decided otherwise: larger tensors go back to the system at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, 8 * _KEPT_BYTES)


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 and the number of the signal."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_KEPT_BYTES = 16 << 20  # more than a piece of an elementwise merge; fresh pages cost little beside work on more


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:
        # a program of its own, not a call: collecting garbage among the modules of torch and transformers, at every
        # thousandth object and once more at the end, costs a second or two and frees nothing
        gc.set_threshold(100_000, 50, 50)
        atexit.register(gc.freeze)
        # hashing lets go of the interpreter every few milliseconds; it should not wait as long to get it back
        sys.setswitchinterval(0.0005)
        reuse_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["hub"]:
        return _hub(arguments[1:])
    parser = build_parser()
    args = parse(parser, arguments)
    try:
        with spelled(Flags(parser)), hub_settings(args), only_on_a_terminal():
            code: int = args.run(args)
        return code
    except HfMergeError as error:
        if os.environ.get("HFMERGE_DEBUG"):
            raise
        if isinstance(error, LostProcessError) and error.reported:
            pass  # the first process that noticed has printed it
        elif not first_process():
            # rank 0 raises the same error, unless it is gone itself
            tell(f"hfmerge (process {os.environ.get('RANK')}): {error}")
        else:
            first, *others = error.lines
            tell(f"hfmerge: {first}", *others)
        if args.json and first_process():
            print_json({"error": str(error), "type": type(error).__name__})
        return 1
    except KeyboardInterrupt:
        tell("hfmerge: interrupted; nothing was written.")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output left early; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@cache
def build_parser() -> Parser:
    """The parser of all commands but `hub`, which has parsers of its own; each command's sets `run`, its handler."""
    parser = Parser(
        prog="hfmerge",
        description="Merge fine-tuned models by Hub ID, one after another, and take any one out again, exactly.",
        epilog="`hfmerge COMMAND --help` explains a command and gives an example. A MODEL is "
        "org/name, org/name@revision, org/name/folder@revision, a folder, hf://org/name, or base+adapter.",
    )
    parser.add_argument("--version", action="version", version=f"hfmerge {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script that completes commands and flags in this shell, for its start-up file",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        example = f"example: hfmerge {name} {EXAMPLES[name]}".rstrip()
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=example)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.add_argument("--quiet", "-q", action="store_true", help="no progress bars")
        if name not in WITHOUT_HUB:
            hub_flags(sub)
        return sub

    for family in (merging, changing, revising, reading, inspecting, evaluating, continual, publishing, proving):
        family.register(command)
    hub = commands.add_parser("hub", help="A Hub on loopback: serve, run, import, export, fsck, user, token, org.")
    hub.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def _hub(argv: list[str]) -> int:
    usage = """usage: hfmerge hub COMMAND [...]; `hfmerge hub COMMAND --help` explains it

  serve    serve a store on this machine, with pages for browsers
  run      run one command against a server of its own: hfmerge hub run [...] -- COMMAND
  import   put an export, a Hugging Face cache or a folder into a store
  export   write a repository, or the files of a revision, into a folder
  fsck     check a store, and repair what can be
  user     add and remove users
  token    make and revoke tokens
  org      say who is a member of an organisation
"""
    try:
        from hfmerge.hubserver import maintenance, people, serve
    except ImportError as error:
        tell(f"hfmerge: the Hub on loopback needs `pip install hfmerge[hub]` ({error}).")
        return 1
    commands = {
        **{"serve": serve.main_serve, "run": serve.main_run},
        **{"import": maintenance.main_import, "export": maintenance.main_export, "fsck": maintenance.main_fsck},
        **{"user": people.main_user, "token": people.main_token, "org": people.main_org},
    }
    if argv[:1] and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    help_asked = argv[:1] in (["--help"], ["-h"])
    say(*usage.split("\n"), serve.PURPOSE, file=sys.stdout if help_asked else sys.stderr)
    return 0 if help_asked else 2
