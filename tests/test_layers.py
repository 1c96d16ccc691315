"""The layer table of ARCHITECTURE.md, held: a module imports only lower layers; public names exist."""

import ast
import importlib
from pathlib import Path

import pytest

import hfmerge


PACKAGE = Path(hfmerge.__file__).parent

LAYERS = [
    ["version", "errors", "digest", "limits", "jsonio", "quoting"],
    [
        *(
            "taskvector",
            "environment",
            "lockstep",
            "device",
            "options",
            "pool",
            "watch",
            "runtime",
            "fields",
            "yamlio",
            "source_schema",
        ),
        *(
            "source",
            "trees",
            "private",
            "headers",
            "asking",
            "commits",
            "fetching",
            "ordered",
            "ranged",
            "blockstore",
            "remote",
        ),
        *("spans", "streaming", "served", "describing", "notes", "stamps", "digesting", "dsse", "signers"),
    ],
    ["methods.base", "methods.spectral", "methods.trimming"],
    ["methods.additive"],
    [
        "methods.gram",
        "methods.isotropic",
        "methods.linear",
        "methods.mdm_oc",
        "methods.opcm",
        "methods.subspace",
        "methods.slerp",
        "methods.ties",
    ],
    ["methods"],
    ["checkpoint"],
    ["learning.replay.asked", "learning.asked"],
    ["weights", "recipe_values", "mergekit_syntax", "mergekit_weights", "mergekit"],
    ["recipe", "flags", "ledger_schema"],
    ["ledger"],
    ["archives", "planned", "card", "templates", "journal", "removal", "comparing"],
    ["chunks"],
    ["estimating", "matching", "marked", "spectra"],
    ["planning", "scorecard"],
    ["merged", "workspace", "identity", "stacking", "trailing"],
    ["disks", "vanished", "starting", "steps", "pictures", "privacy", "seen"],
    ["recovering", "runfiles", "treeview", "witness"],
    ["chunkdata", "finishing", "changes", "statebranch", "measuring"],
    ["folding", "revising"],
    ["visits"],
    ["passes"],
    ["execute", "inspecting"],
    ["keeping", "recording", "hubserver", "gap"],
    ["replaying"],
    ["verifying"],
    ["targets", "certificate"],
    ["certifying", "evaluation", "hub", "purging", "admitting"],
    ["learning", "publishing"],
    ["running"],
    ["repeating"],
    ["nesting", "restoring", "evaluation.checking"],
    ["api", "lifecycle"],
    ["examining"],
    ["evaluation.continual"],
    ["commands"],
    ["cli"],
    ["__main__", "__init__"],
]
"""Lowest first. A package stands for all its modules, which may import one another."""


def layer_of(module: str) -> int:
    best, found = -1, None
    for level, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(f"{name}.")) and len(name) > best:
                best, found = len(name), level
    assert found is not None, f"hfmerge.{module} has no layer; add it to the table here and in ARCHITECTURE.md"
    return found


def modules() -> list[tuple[str, Path]]:
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        result.append((".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path))
    return result


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports when it is loaded (imports inside functions may look upwards)."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfmerge."):
            names.append(str(node.module).removeprefix("hfmerge."))
        elif isinstance(node, ast.Import):
            names.extend(a.name.removeprefix("hfmerge.") for a in node.names if a.name.startswith("hfmerge."))
    return names


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_lower_layers(module: str, path: Path) -> None:
    here = layer_of(module)
    for other in imported(path):
        there = layer_of(other)
        same_package = module.partition(".")[0] == other.partition(".")[0]
        assert there < here or (there == here and (same_package or here <= 9)), f"{module} imports {other}"


def test_every_file_says_its_job_in_its_first_line() -> None:
    for _, path in modules():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path.name} has no docstring"


def test_public_names_exist_and_no_module_hides_one() -> None:
    names = set(hfmerge.__all__)
    assert names == {value for home in hfmerge._HOMES.values() for value in home} | {"__version__"}
    for name in names:
        assert getattr(hfmerge, name) is not None
        assert not (PACKAGE / f"{name}.py").exists() and not (PACKAGE / name).is_dir()
    importlib.import_module("hfmerge.examining")
    assert callable(hfmerge.plan) and callable(hfmerge.verify) and callable(hfmerge.unmerge)
