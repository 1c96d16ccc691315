"""YAML text to plain data and back, strictly: positions in every error, repeated keys found, YAML 1.2 numbers.

YAML 1.1, which PyYAML implements, reads `1e-3` as text, `010` as eight and `1:30` as ninety. Here an unquoted scalar
is a number exactly when YAML 1.2's core schema says so: `1e-3` is a number, `010` is ten, `1:30` and `2024-01-01` are
text. A quoted scalar is always text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hfmerge.errors import Problem, RecipeError
from hfmerge.validation.limits import YAML_BYTES, YAML_DEPTH, YAML_NUMBER, YAML_VALUES
from hfmerge.validation.strict_json import read_limited


NULL, BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
MERGE, STR, SEQ, MAP = (f"tag:yaml.org,2002:{name}" for name in ("merge", "str", "seq", "map"))
INT_PATTERN = re.compile(r"^[-+]?[0-9]{1,400}$")
FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


_Plain: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's reader, which is ten times as fast and counts levels, where PyYAML was built with it."""


class _Loader(_Plain):
    """SafeLoader of plain data only, whose unquoted numbers are those of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag in (NULL, BOOL, MERGE)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (NULL, BOOL, INT, FLOAT, STR, SEQ, MAP, None)
    }


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either YAML version would not read back as it was, and never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_scalar(loader: _Loader, node: yaml.Node) -> int | float | bool:
    """A number or truth value, checked since an explicit tag (`!!int x`) may stand before any text."""
    assert isinstance(node, yaml.ScalarNode)
    value = loader.construct_scalar(node)
    if node.tag == INT and INT_PATTERN.match(value):
        return int(value)
    if node.tag == FLOAT and FLOAT_PATTERN.match(value):
        return float(loader.construct_yaml_float(node))
    if node.tag == BOOL and value.lower() in loader.bool_values:
        return loader.bool_values[value.lower()]
    raise yaml.constructor.ConstructorError(None, None, f"{value!r} is not of the type its tag says", node.start_mark)


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # Unicode line breaks survive only as escapes, which only this style has
    return dumper.represent_scalar(STR, value, style='"' if re.search("[\x85\u2028\u2029]", value) else None)


_Dumper.add_representer(str, _represent_text)
for _tag in (INT, FLOAT, BOOL):
    _Loader.add_constructor(_tag, _construct_scalar)
_Loader.add_implicit_resolver(INT, INT_PATTERN, list("-+0123456789"))
_Loader.add_implicit_resolver(FLOAT, FLOAT_PATTERN, list("-+.0123456789"))
_Dumper.add_implicit_resolver(FLOAT, FLOAT_PATTERN, list("-+.0123456789"))


def read_yaml(path: str | Path) -> tuple[Any, list[Problem]]:
    """The data of a YAML file and the keys written twice in it.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, or is not one YAML document; with line and column.
    """
    origin = str(path)
    try:
        content = read_limited(Path(path), YAML_BYTES)
    except OSError as error:
        raise RecipeError([Problem("file", f"cannot be read: {error.strerror or error}")], origin) from error
    except ValueError as error:
        raise RecipeError([Problem("file", str(error))], origin) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError([Problem(f"line {line}", "is not UTF-8; save the file as UTF-8")], origin) from error
    return parse_yaml(text, origin)


def parse_yaml(text: str, origin: str) -> tuple[Any, list[Problem]]:
    """The data of one YAML document and a problem for each key written twice; of those the last value is in the data.

    Raises:
        RecipeError: not one well-formed document; the problem's path is the line and column, both from 1.
    """
    problems: list[Problem] = []
    try:
        return _constructed(_Loader, text, problems), problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        if isinstance(error, yaml.composer.ComposerError) and "another document" in (error.problem or ""):
            text = "a second document begins here; put each into a file of its own, and give one of them"
            raise RecipeError([Problem(where, text)], origin) from error
        what = ", ".join(part for part in (error.problem, error.context) if part)
        raise RecipeError([Problem(where, f"not valid YAML: {what}")], origin) from error
    except yaml.reader.ReaderError as error:
        before = text.encode()[: error.position].decode("utf-8", "ignore")
        where = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
        raise RecipeError([Problem(where, f"not valid YAML: {error.reason}; remove the character")], origin) from error
    except RecursionError as error:
        raise RecipeError([Problem("file", "not usable YAML: nested too deeply")], origin) from error
    except ValueError as error:
        raise RecipeError([Problem("file", f"not usable YAML: {error}")], origin) from error


def parse_front(text: str) -> Any:
    """The data of a card's front matter, which other tools wrote and read as YAML 1.1.

    Raises:
        ValueError: not YAML, or beyond a limit.
    """
    try:
        return _constructed(_Plain, text, None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # what a scalar's tag does not fit raises anything; a ReaderError is no MarkedYAMLError
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(f"{' '.join(what.split())}{where}") from error


def _constructed(kind: Any, text: str, problems: list[Problem] | None) -> Any:
    """The data of one document, measured before it is made; keys written twice go to `problems`. Raises ValueError."""
    YAML_BYTES.check(len(text))
    YAML_VALUES.check(sum(map(text.count, ",\n:")))  # nearly every value needs one of them
    loader = kind(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _measure(node, {})
    if problems is not None:
        _find_repeated(node, "", problems, {})
    return loader.construct_document(node)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values and levels of a node with all aliases written out. Raises ValueError beyond a limit."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (INT, FLOAT):
            YAML_NUMBER.check(len(node.value))
        return 1, 0
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError(f"an alias in line {node.start_mark.line + 1} stands within what it names")
        return found
    known[id(node)] = None
    pairs = isinstance(node, yaml.MappingNode)
    size, height = 1, 0
    for child in (part for pair in node.value for part in pair) if pairs else node.value:
        values, levels = _measure(child, known)
        size, height = size + values, max(height, levels)
    YAML_VALUES.check(size)
    YAML_DEPTH.check(height + 1)
    known[id(node)] = size, height + 1
    return size, height + 1


def parse_scalar(text: str) -> Any:
    """The value that `text` has as an unquoted YAML scalar: number, true or false, null, else the text itself."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text)) if tag in (NULL, BOOL, INT, FLOAT) else text


def dump_yaml(data: Any) -> str:
    """Block-style YAML of plain data, keys in their order, that `parse_yaml` reads back as equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _find_repeated(node: yaml.Node, path: str, problems: list[Problem], seen: dict[int, yaml.Node]) -> None:
    """Add a problem for each key that one mapping holds twice; `seen` ends the walk at aliases."""
    if id(node) in seen:
        return
    seen[id(node)] = node
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _find_repeated(item, f"{path}[{i}]", problems, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            here = f"{path}.{name}" if path else name
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, name) in lines:
                    where = f"in lines {lines[key.tag, name]} and {line}"
                    problems.append(Problem(here, f"written twice, {where}; keep one"))
                lines.setdefault((key.tag, name), line)
            _find_repeated(value, here, problems, seen)
