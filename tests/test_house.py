"""Figures of the code's structure that may only fall; a change that lowers one lowers its limit here too."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hfmerge


PACKAGE = Path(hfmerge.__file__).parent
ROOT = PACKAGE.parent
MOST = {
    "modules directly under hfmerge/": 7,
    "packages directly under hfmerge/": 13,
    "cycles of modules, imports for type checking counted": 0,
    "public names with two meanings": 0,
    "functions with more than 8 parameters": 3,
    "lines of the longest function": 70,
    "flags of the command line named outside of it": 0,
    "places outside methods/ that ask for a method's type or name": 0,
    "lines of ARCHITECTURE.md": 120,
    "words of README.md": 1000,
}
"""What was measured last; the aims are 7, 12, 0, 8, 3, 70, 0, 0, 120 and 1,000."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def functions() -> Iterator[Function]:
    for tree in trees().values():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(node: Function) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([one for one in given if one.arg not in ("self", "cls")])


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports anywhere at its top level, for type checking too."""
    known = {module(path) for path in trees()}
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees().items():
        own = module(path)
        for node in _outside_functions(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found[own].add(name if name in known else node.module)
            elif isinstance(node, ast.Import):
                found[own].update(alias.name for alias in node.names)
    return {own: {name for name in names if name in known and name != own} for own, names in found.items()}


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _outside_functions(child)


def cycles() -> int:
    """How many groups of modules import each other."""
    graph, index, low, stack, groups = imports(), dict[str, int](), dict[str, int](), list[str](), 0

    def visit(node: str) -> None:
        nonlocal groups
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            groups += len(group) > 1

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def homonyms() -> int:
    """Public names that two modules of the package define."""
    places: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees().items():
        if "hubserver" in path.parts:
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(module(path))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and not target.id.startswith("_"):
                        places[target.id].add(module(path))
    common = {"register", "Command"}  # each family of commands has one
    return sum(len(held) > 1 for name, held in places.items() if name not in common)


def flags_outside() -> int:
    """Texts below the command line that name one of its flags."""
    count = 0
    for path, tree in trees().items():
        inside = path.relative_to(PACKAGE).parts
        if inside[0] in ("cli", "hubserver"):
            continue
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                own = "accelerate launch" not in node.value  # a program of others, with flags of its own
                count += own and bool(re.search(r"(?<![\w-])--[a-z][a-z-]+", node.value))
    return count


def method_questions() -> int:
    """Places outside of `methods` that ask what kind of method one is; torch's `nn.Linear` is none."""
    kinds = "AdditiveFold|FoldMethod|JointMethod|MergeMethod|InParts|Declared|OPCM|MdmOc|MdmOcIso|MdmOcSubspace"
    kinds += "|Gram|IsoC|Ties|Slerp|Linear|TaskArithmetic"
    asked = re.compile(
        rf"(?:isinstance|issubclass)\([^)]*(?<!nn\.)\b(?:{kinds})\b|method\.name\s*(?:==|!=|in\b|not in\b)"
    )
    return sum(
        len(asked.findall(path.read_text(encoding="utf-8")))
        for path in trees()
        if path.relative_to(PACKAGE).parts[0] != "methods"
    )


FOUND = {
    "modules directly under hfmerge/": lambda: len(
        [p for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")]
    ),
    "packages directly under hfmerge/": lambda: len([p for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()]),
    "cycles of modules, imports for type checking counted": cycles,
    "public names with two meanings": homonyms,
    "functions with more than 8 parameters": lambda: sum(parameters(node) > 8 for node in functions()),
    "lines of the longest function": lambda: max((node.end_lineno or 0) - node.lineno + 1 for node in functions()),
    "flags of the command line named outside of it": flags_outside,
    "places outside methods/ that ask for a method's type or name": method_questions,
    "lines of ARCHITECTURE.md": lambda: len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()),
    "words of README.md": lambda: len((ROOT / "README.md").read_text(encoding="utf-8").split()),
}


@pytest.mark.parametrize("what", MOST)
def test_a_figure_does_not_rise(what: str) -> None:
    assert FOUND[what]() <= MOST[what]
