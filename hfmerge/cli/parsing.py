"""The parser: commands in groups, flags and operands in any order, and a hint for every word that it does not know."""

from __future__ import annotations

import argparse
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NoReturn

from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.values import option_names
from hfmerge.validation.quoting import plain
from hfmerge.validation.values import suggestion


GROUPS: Mapping[str, tuple[str, ...]] = {
    "make a merge": ("merge", "plan", "convert", "methods"),
    "change a merge": ("add", "unmerge", "replace", "reorder", "rebase", "restore", "push"),
    "look at a merge": ("history", "diff", "verify"),
    "compare and score models": ("inspect", "evaluate", "suites", "plot", "continual"),
    "prove a removal": ("certify", "purge-history"),
    "run a Hub of your own": ("hub",),
}
"""Title -> commands, in the order of `--help`."""
EXAMPLES: Mapping[str, str] = {
    "merge": "org/a org/b=0.5 --base org/base --method opcm --output merged",
    "plan": "org/a org/b --base org/base --method opcm",
    "convert": "mergekit.yaml > recipe.yaml",
    "methods": "",
    "add": "org/merged org/c=0.5 --push-to org/merged",
    "unmerge": "org/merged --remove org/b --output without-b",
    "replace": "merged org/b org/b@v2",
    "reorder": "merged org/b org/a",
    "rebase": "merged --base org/base@v2",
    "restore": "org/merged --step 2 --push-to org/merged",
    "push": "merged org/merged",
    "history": "org/merged --graph",
    "diff": "org/merged 1 3",
    "verify": "org/merged --replay",
    "inspect": "org/a org/b --base org/base --plot figures",
    "evaluate": "org/merged org/a --suite glue --limit 300",
    "suites": "--pin glue --output glue-pinned.yaml",
    "plot": "results.json --output figures",
    "continual": "opcm.yaml gram.yaml --suite glue --output results",
    "certify": "org/merged --remove org/b --key ~/.ssh/id_ed25519 --output removed.json",
    "purge-history": "org/merged",
}
"""Command -> the words of an example."""


class _Help(argparse.HelpFormatter):
    """Help whose example keeps its line, and whose commands stand in their groups."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)

    def _iter_indented_subactions(self, action: argparse.Action) -> Generator[argparse.Action, None, None]:
        if not isinstance(action, argparse._SubParsersAction):
            return
        held = {one.dest: one for one in action._get_subactions()}
        for title, names in GROUPS.items():
            yield argparse.Action([], "", metavar=f"{title}:")
            self._indent()
            yield from (held[name] for name in names)
            self._dedent()


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and whose errors say what was meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line, whatever a word holds."""
        self.exit(2, f"usage: {self.prog}: {plain(message)}; see `{self.prog} --help`\n")


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, its flags and operands in any order.

    Exits with code 2 after wrong usage, and with code 0 after help.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    commands = commands_of(parser)
    if name is None or words[0] != name:
        return parser.parse_args(words)
    if name not in commands:
        parser.error(f"there is no command {name}{suggestion(name, commands)}")
    command = commands[name]
    rest = _learning(words[1:]) if "--learn" in command._option_string_actions else list(words[1:])
    given = rest[: rest.index("--")] if "--" in rest else rest
    for word in given:
        # before argparse misses what is required, since it may stand behind a wrong flag
        if word.startswith("--") and word.partition("=")[0] not in command._option_string_actions:
            command.error(_hint(command, word, rest))
    args, unknown = command.parse_known_intermixed_args(rest)
    if unknown:
        command.error(_hint(command, unknown[0], rest))
    return args


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Name -> parser of each command."""
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found.choices


def _learning(words: Sequence[str]) -> list[str]:
    """Words in which a bare `--learn` does not take what follows it, unless that sets a key of `learn`."""
    result: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, _ = following.partition("=")
        near = equals and (name in _learnable() or suggestion(name, _learnable()))
        result.append("--learn=" if word == "--learn" and not near else word)
    return result


def _learnable() -> tuple[str, ...]:
    """The keys of `learn`, those of its `replay` with their path."""
    from hfmerge.recipe.learning import Learning
    from hfmerge.recipe.replay import ReplaySettings

    own = [key.name for key in keys_of(Learning) if key.name != "replay"]
    return (*own, *(f"replay.{key.name}" for key in keys_of(ReplaySettings)))


def _hint(command: argparse.ArgumentParser, word: str, words: Sequence[str]) -> str:
    """What is wrong with a word that a command does not know, and what to write instead."""
    known = command._option_string_actions
    if not word.startswith("-"):
        return f"too many operands: {word}"
    flag, equals, value = word.partition("=")
    if not equals:
        after = words[words.index(word) + 1 :]
        value = after[0] if after and not after[0].startswith("--") else "VALUE"
    name = flag.lstrip("-").replace("-", "_")
    if "--option" in known and (owners := _methods_with(name)):
        return f"{flag} is an option of {', '.join(owners)}; write --option {name}={value}"
    learned = [key for key in _learnable() if name in (key, key.rpartition(".")[2])] if "--learn" in known else []
    if learned:
        return f"{flag} is a key of learn; write --learn {learned[0]}={value}"
    remedy = suggestion(flag, [text for text in known if text.startswith("--")])
    return f"{command.prog} has no flag {flag}{remedy}"


def _methods_with(option: str) -> list[str]:
    from hfmerge.methods import registry

    return [name for name, method in registry().items() if option in option_names(method)]
