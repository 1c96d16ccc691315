"""Commands and flags that pages, messages and docstrings name in backticks exist."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hfmerge
from hfmerge.cli.program import build_parser
from hfmerge.hubserver import serve


PACKAGE = Path(hfmerge.__file__).parent
ROOT = PACKAGE.parent
OTHERS = {"--cpu", "--depth", "--adapters", "--flag"}
"""Flags of accelerate, of git and of the demo, and the word for any flag."""
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def flags() -> dict[str, set[str]]:
    """Command -> its flags; those of `hfmerge hub` are one set, as its subcommands are a program of their own."""
    found: dict[str, set[str]] = {"hub": set()}
    for parser in build_parser()._actions:
        if isinstance(parser, argparse._SubParsersAction):
            for name, sub in parser.choices.items():
                found[name] = {flag for action in sub._actions for flag in action.option_strings}
    source = "".join(path.read_text(encoding="utf-8") for path in Path(serve.__file__).parent.glob("*.py"))
    found["hub"] = {*re.findall(r'"(--[a-z-]+)"', source), "--help"}
    return found


def named(text: str) -> Iterator[tuple[str, str]]:
    """Every command in backticks, with its words."""
    for words in re.findall(r"`hfmerge ([a-z][^`]*)`", text):
        yield words.split()[0], words


def faults(text: str) -> list[str]:
    wrong = []
    for command, words in named(text):
        known = flags().get(command)
        if known is None:
            wrong.append(f"hfmerge {command}")
        else:
            wrong += [
                f"hfmerge {command} {flag}" for flag in re.findall(r"(?<!\S)--[a-z-]+", words) if flag not in known
            ]
    every = OTHERS.union(*flags().values())
    wrong += [flag for flag in re.findall(r"`(--[a-z][a-z-]+)", text) if flag not in every]
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_name_commands_that_exist(path: Path) -> None:
    assert not faults(re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S))


@pytest.mark.slow
def test_messages_and_docstrings_name_commands_that_exist() -> None:
    wrong = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        if found := [fault for text in texts for fault in faults(text)]:
            wrong[path.relative_to(PACKAGE).as_posix()] = found
    assert not wrong


def test_what_does_not_exist_is_found() -> None:
    assert faults("`hfmerge unmereg merged` and `hfmerge add merged --modell x`, or `--never`") == [
        "hfmerge unmereg", "hfmerge add --modell", "--never",
    ]  # fmt: skip
