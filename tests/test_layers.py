"""Every file says its job, and public names exist and are hidden by no module."""

import ast
import importlib
from pathlib import Path

import hfmerge


PACKAGE = Path(hfmerge.__file__).parent


def modules() -> list[tuple[str, Path]]:
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        result.append((".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path))
    return result


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
    importlib.import_module("hfmerge.api")
    assert callable(hfmerge.plan) and callable(hfmerge.verify) and callable(hfmerge.unmerge)
