"""What the site shows and nobody writes by hand: references of command line, recipe and Python, facts of the methods.

A hook of mkdocs. The pages of methods are written by hand, with equations and advice; options, properties and citation
are added from the registry. Equations in fences of kind `math` become MathML, so that no page needs a script.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import hfmerge
from hfmerge.cli.program import build_parser, main
from hfmerge.methods import registry
from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.recipe import parse_recipe
from hfmerge.recipe.reference import default_of_key, recipe_reference, values_of_key


VERBS = (
    *("plan", "merge", "add", "unmerge", "unmerge_checked", "replace", "reorder", "rebase", "restore", "dry_run"),
    *("history", "diff", "verify", "certify", "purge_history", "push"),
    *("inspect", "evaluate", "load_with_head", "load_recipe", "load_suite"),
)


def on_config(config: Any) -> Any:
    """Have equations shown without JavaScript."""
    fence = {"name": "math", "class": "math", "format": equation}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    pages = {"reference/cli.md": cli(), "reference/recipe.md": recipe(), "reference/python.md": python()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    missing = [name for name in built_in() if files.get_file_from_path(f"methods/{name}.md") is None]
    if missing:
        raise PluginError(f"docs/methods: no page of {', '.join(missing)}; write its equation and when to use it")
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add what the registry says to the page of a method, and a table of all to their overview."""
    folder, _, name = page.file.src_uri.removesuffix(".md").partition("/")
    if folder != "methods":
        return markdown
    return markdown + ("\n".join(overview()) if name == "index" else "\n".join(facts(built_in()[name])))


def equation(source: str, *_: Any, **__: Any) -> str:
    """MathML of one equation in LaTeX's notation."""
    return f'<p class="math">{convert(" ".join(source.split()), display="block")}</p>'


def built_in() -> Mapping[str, Any]:
    """The methods of the package itself, by name."""
    return {name: one for name, one in registry().items() if one.__module__.startswith("hfmerge.")}


def overview() -> Iterator[str]:
    """A table of all methods."""
    yield from ("", "| method | what it does | kind | leaves by | weights can be learned |", "|---|---|---|---|---|")
    for name, method in built_in().items():
        kind = _kind(method)
        learnable = "yes" if _learnable(name) else "no"
        yield f"| [`{name}`]({name}.md) | {_first(method)} | {kind} | {LEAVES[kind]} | {learnable} |"


def facts(method: Any) -> Iterator[str]:
    """Options, properties, source and citation of one method."""
    yield from ("", "## Options", "", "| option | values | default | meaning |", "|---|---|---|---|")
    for key in keys_of(method):
        meaning = key.declared.get("help", "")
        yield f"| `{key.name}` | {values_of_key(key)} | {default_of_key(key)} | {meaning} |"
    yield f"| `norm` | none, mean, fit, fit-matrix or a number | `{method.default_norm}` | norm of the merged change |"
    low, high = method.arity
    count = f"exactly {low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    yield from ("", "## Properties", "", f"* Kind: {_kind(method)}.", f"* Number of models: {count}.")
    yield f"* Weights are divided by their sum: {'yes' if method.normalises_weights else 'no'}."
    yield f"* `learn` can find the weights: {'yes' if _learnable(method.name) else 'no'}."
    yield from ("", "## Definition in the code", "", _quoted(method), "", "## Source", "")
    for citation in method.citations:
        yield from (f"[{citation.title}]({citation.url})", "", "```bibtex", citation.bibtex, "```", "")


def _learnable(name: str) -> bool:
    """Whether a recipe may ask to learn this method's weights."""
    try:
        data = {"base": "org/base", "models": ["org/a", "org/b"], "method": name, "learn": {}}
        parse_recipe(data, "documentation")
    except hfmerge.RecipeError:
        return False
    return True


def _kind(method: Any) -> str:
    if hasattr(method, "step"):
        return "fold, exact sum" if method.additive else "fold, depends on the order"
    return "joint"


LEAVES = {
    "fold, exact sum": "exact subtraction",
    "fold, depends on the order": "replay from a kept state",
    "joint": "merging again",
}


def _first(item: Any) -> str:
    return str(inspect.getdoc(item)).split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _quoted(item: Any) -> str:
    return "\n".join(["```text", str(inspect.getdoc(item)), "```"])


def recipe() -> str:
    """The page of all keys of a recipe, from the classes that declare them."""
    learning = hfmerge.Learning
    sections = (
        ("Keys", "", "The top of the file."),
        ("A model", "models", "An item of `models`: a text is the model, a mapping has these keys."),
        ("learn", "learn", "How weights are learned; `learn: {}` takes all defaults."),
        ("learn.replay", "learn.replay", "How rows are made to learn from."),
    )
    lines = ["# Recipe", "", INTRODUCTION]
    keys = list(recipe_reference())
    for title, section, text in sections:
        lines += ["", f"## {title}", "", text, "", "| key | values | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            if key.section == section:
                meaning = key.meaning.replace("|", "\\|")
                lines.append(f"| `{key.name}` | {key.values} | {key.default} | {meaning} |")
    lines += ["", "Generators, and the passes over the rows that each makes if `steps` is unset:", ""]
    lines += ["| kind of model | generators |", "|---|---|"]
    for kind, generators in sys.modules[type(learning().replay).__module__].GENERATORS.items():
        lines.append(f"| {kind} | {', '.join(f'`{name}`: {passes}' for name, passes in generators.items())} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """A recipe is a YAML file that says everything a merge does. Every key of its top is also a flag of
`hfmerge merge` and `hfmerge plan`, and a flag overrides the key. All faults of a recipe are reported at once, before
anything is downloaded. An unknown key is a fault.

A `method` is a name, or a mapping with `name`, the method's options and `norm`: see [Methods](../methods/index.md).
A weight is a number, or a mapping from patterns on the names of parameters to numbers: the first pattern that fits
counts, and the last pattern is `*`."""


def python() -> str:
    """The page of all public names."""
    lines = ["# Python", "", "`import hfmerge` costs nothing: a name is imported when it is first used.", ""]
    rest = [name for name in hfmerge.__all__ if name not in VERBS and name != "__version__"]
    for title, names in (("Functions", VERBS), ("Classes", rest)):
        lines += [f"## {title}", "", *(line for name in names for line in (f"::: hfmerge.{name}", ""))]
    return "\n".join(lines)


def cli() -> str:
    """The page of all commands, from the parser."""
    os.environ["COLUMNS"] = "100"  # of usages and helps
    parser = build_parser()
    lines = ["# Command line", "", f"{parser.description} {parser.epilog}", "", EXIT_CODES]
    for name, sub in _commands(parser).items():
        if name == "hub":
            continue
        lines += ["", f"## hfmerge {name}", "", str(sub.description), "", "```text"]
        lines += [*sub.format_usage().rstrip().splitlines(), "```"]
        for group in sub._action_groups:
            rows = [_row(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                lines += ["", f"*{group.title}*", "", "| argument | meaning |", "|---|---|", *rows]
    lines += ["", "## hfmerge hub", "", "A Hub on this machine. See [how to run one](../how-to/own-hub.md)."]
    for name in HUB:
        lines += ["", f"### hfmerge hub {name}", "", "```text", _help("hub", name).rstrip(), "```"]
    return "\n".join(lines) + "\n"


EXIT_CODES = """Results go to standard output, progress and warnings to standard error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error that one line explains, or a check that failed |
| 2 | wrong usage |
| 3 | `verify --replay`: equal only within the tolerance of other arithmetic |
| 130 | interrupted by Ctrl-C |

`HFMERGE_DEBUG=1` shows the traceback of an error."""
HUB = ("serve", "run", "import", "export", "fsck", "user", "token", "org")


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found.choices


def _row(action: argparse.Action) -> str:
    """One argument and what it means; a bar may stand in code, and elsewhere would end the cell."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    value = "|".join(map(str, action.choices)) if action.choices else value
    shown = f"{', '.join(action.option_strings)} {value}".strip()
    return f"| `{shown}` | {(action.help or '').replace('|', chr(92) + '|')} |"


def _help(*command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return out.getvalue()
