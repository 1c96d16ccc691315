"""Completion of commands and flags in a shell, as shtab writes it."""

from __future__ import annotations

import argparse
from typing import Any

from hfmerge.validation.quoting import say, tell


SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Prints the script of a shell, and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        """Exits with code 0, or with 1 where shtab is missing."""
        try:
            import shtab
        except ImportError:
            tell("hfmerge: completion needs shtab; install it with `pip install shtab`.")
            parser.exit(1)
        say(*shtab.complete(parser, values).split("\n"))
        parser.exit(0)
