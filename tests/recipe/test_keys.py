"""A key of a recipe is declared once: toy keys, added in one file of a copy of the package, show what follows."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hfmerge
from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.reference import recipe_reference
from tests.fixtures import tiny


PACKAGE = Path(hfmerge.__file__).parent
BEFORE = "    learn: Learning | None = field("
TOYS = """\
    toy_count: int = field(default=3, metadata=Declared(help="how many toys", minimum=1, recorded="set", result=True))
    toy_names: tuple[str, ...] = field(default=(), metadata=Declared(help="what toys are called", metavar="NAME"))
    toy_box: str | None = field(default=None, metadata=Declared(help="where toys lie", foreign=("chest",)))
"""
READ = """
import json, sys
from hfmerge.errors import RecipeError
from hfmerge.recipe.recipe import parse_recipe
try:
    recipe = parse_recipe(json.loads(sys.argv[1]), "test")
except RecipeError as error:
    print(json.dumps({problem.path: problem.text for problem in error.problems}))
else:
    print(json.dumps({"read": recipe.to_dict(), "written": recipe.to_yaml()}))
"""
REFERENCE = """
import dataclasses, json
from hfmerge.recipe.reference import recipe_reference
print(json.dumps([dataclasses.asdict(key) for key in recipe_reference()]))
"""
WORK = """
import json, sys
from hfmerge.engine.fingerprint import work_of
from hfmerge.engine.planner import make_plan
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.recipe.recipe import load_recipe
recipe = load_recipe(sys.argv[1])
works = [work_of(make_plan(apply_overrides(recipe, **change))) for change in json.loads(sys.argv[2])]
print(json.dumps([work["settings"] for work in works]))
"""


class Copy:
    """A copy of the package with the toy keys, used in child processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(PACKAGE, folder / "hfmerge", ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / "hfmerge" / "recipe" / "recipe.py"
        text = path.read_text(encoding="utf-8")
        assert text.count(BEFORE) == 1
        path.write_text(text.replace(BEFORE, TOYS + BEFORE), encoding="utf-8")

    def python(self, *arguments: object) -> tiny.Run:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(self.folder), "COLUMNS": "100"},
        )
        return tiny.Run(done.returncode, done.stdout, done.stderr)

    def cli(self, *arguments: object) -> tiny.Run:
        return self.python("-m", "hfmerge", *arguments)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i in range(2):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    return root


def read(copy: Copy, **toys: object) -> dict[str, object]:
    data = {"base": "org/base", "models": ["org/a", "org/b"], "method": "opcm", **toys}
    run = copy.python("-c", READ, json.dumps(data))
    assert run.code == 0, run.err
    found: dict[str, object] = run.json
    return found


def recipe_file(root: Path, folder: Path, more: str) -> Path:
    path = folder / "recipe.yaml"
    models = json.dumps([str(root / "m0"), str(root / "m1")])
    path.write_text(f"base: {root / 'base'}\nmodels: {models}\nmethod: linear\n{more}", encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_file_may_have_it_and_its_default_is_not_written(copy: Copy) -> None:
    given = read(copy, toy_count=5, toy_names=["bear"], toy_box="attic")
    assert isinstance(given["read"], dict) and isinstance(given["written"], str)
    assert [given["read"][name] for name in ("toy_count", "toy_names", "toy_box")] == [5, ["bear"], "attic"]
    assert "toy_count: 5\ntoy_names:\n- bear\ntoy_box: attic\n" in given["written"]
    plain = read(copy)
    assert isinstance(plain["read"], dict)
    assert [plain["read"][name] for name in ("toy_count", "toy_names", "toy_box")] == [3, [], None]
    assert "toy" not in str(plain["written"])


def test_all_its_faults_come_at_once_with_those_of_its_neighbours(copy: Copy) -> None:
    assert read(
        copy, toy_count=0, toy_name=["x"], toy_names="bear", toy_box=["attic"], chest="attic", dtype="bf16"
    ) == {
        "toy_count": "must be at least 1, not 0",
        "toy_name": 'unknown key; did you mean "toy_names"?',
        "toy_names": 'must be a list of texts, not "bear"; write [...]',
        "toy_box": "must be text, not a list; quote it if it is meant as text",
        "chest": 'unknown key; did you mean "toy_box"?',
        "dtype": '"bf16" is not one of float32, float16, bfloat16, float64; did you mean "bfloat16"?',
    }


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_help_shows_its_flag(copy: Copy, command: str) -> None:
    lines = [" ".join(line.split()) for line in copy.cli(command, "--help").out.splitlines()]
    assert {"--toy-count TOY_COUNT", "--toy-names NAME what toys are called"} <= {*lines}
    assert lines[lines.index("--toy-count TOY_COUNT") + 1] == "how many toys"


@pytest.fixture(scope="module")
def merged(copy: Copy, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of a recipe that says 5, by a flag that says 7."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = recipe_file(root, folder, "toy_count: 5\ntoy_box: attic\n")
    run = copy.cli("merge", recipe, "--toy-count", "7", "--toy-names", "bear", "--output", folder / "out")
    assert run.code == 0, run.err
    return folder / "out"


def settings(folder: Path, step: int) -> dict[str, object]:
    """The toy keys that the ledger records."""
    entry = json.loads((folder / "merge_history" / f"{step:04d}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in entry["settings"].items() if key.startswith("toy")}


@pytest.mark.slow
def test_its_flag_overrides_the_file_and_the_ledger_holds_what_is_declared_to_be_recorded(
    copy: Copy, merged: Path
) -> None:
    assert settings(merged, 1) == {"toy_count": 7}
    assert "toy_count: 7\n" in (merged / "README.md").read_text(encoding="utf-8")
    wrong = copy.cli("plan", merged.parent / "recipe.yaml", "--toy-count", "many")
    assert wrong.code == 1 and 'toy_count: must be a number, not the text "many"' in wrong.err


@pytest.mark.slow
def test_a_change_of_the_merge_goes_by_what_is_recorded(copy: Copy, merged: Path, tmp_path: Path) -> None:
    run = copy.cli("unmerge", merged, "--remove", "m1", "--output", tmp_path / "out")
    assert run.code == 0, run.err
    assert settings(tmp_path / "out", 2) == {"toy_count": 7}


@pytest.mark.slow
def test_a_key_at_its_default_is_not_recorded(copy: Copy, merged: Path, tmp_path: Path) -> None:
    run = copy.cli("merge", merged.parent / "recipe.yaml", "--toy-count", "3", "--output", tmp_path / "out")
    assert run.code == 0, run.err
    assert settings(tmp_path / "out", 1) == {}
    assert tiny.done("history", tmp_path / "out").out


@pytest.mark.slow
def test_a_ledger_with_an_unknown_key_or_a_faulty_value_is_refused(copy: Copy, merged: Path, tmp_path: Path) -> None:
    unknown = tiny.cli("history", merged)
    assert unknown.code == 1 and 'settings: has the unknown key "toy_count"' in unknown.err
    shutil.copytree(merged, tmp_path / "out")
    file = tmp_path / "out" / "merge_history" / "0001.json"
    text = file.read_text(encoding="utf-8")
    assert '"toy_count": 7' in text
    file.write_text(text.replace('"toy_count": 7', '"toy_count": 0'), encoding="utf-8")
    faulty = copy.cli("history", tmp_path / "out")
    assert faulty.code == 1 and "settings: toy_count: must be at least 1, not 0" in faulty.err


@pytest.mark.slow
def test_other_work_is_not_taken_over_from_a_killed_run(copy: Copy, root: Path, tmp_path: Path) -> None:
    changes = [{}, {"toy_count": 4}, {"toy_box": "attic"}]
    run = copy.python("-c", WORK, recipe_file(root, tmp_path, ""), json.dumps(changes))
    assert run.code == 0, run.err
    plain, counted, boxed = run.json
    assert plain == boxed != counted


def test_the_reference_lists_it(copy: Copy) -> None:
    found = {key["name"]: key for key in copy.python("-c", REFERENCE).json if key["section"] == ""}
    assert found["toy_count"] == {
        **{"section": "", "name": "toy_count", "values": "whole number at least 1", "default": "`3`"},
        **{"meaning": "how many toys", "flag": "--toy-count"},
    }
    assert (found["toy_names"]["values"], found["toy_names"]["default"]) == ("list", "none")


def test_the_reference_says_what_every_key_means() -> None:
    assert [key for key in recipe_reference() if not key.meaning or not key.values or not key.default] == []
    top = [key.name for key in recipe_reference() if key.section == ""]
    assert top == [key.name for key in keys_of(Recipe)] and "notes" not in top


SPELLED = {
    # keys whose values depend on each other, or that are read by themselves
    "recipe/recipe.py": {"private", "push_to"},
    "recipe/overrides.py": set[str](),
    # words of what `plan` prints of tensors and of its estimate
    "cli/merging.py": {"dtype", "output", "state"},
    # arguments of verbs that change a merge, which no recipe is given to
    "cli/shared.py": {"output", "push_to", "state", "stream"},
    # consents, which a ledger records and never gives
    "ledger/entry.py": {"allow_pickle", "trust_remote_code"},
    "ledger/schema.py": set[str](),
    "ledger/card.py": set[str](),
    "engine/fingerprint.py": set[str](),
}
"""File of the package -> the keys that it may spell, for what is true of them alone."""


@pytest.mark.parametrize("file", SPELLED)
def test_names_of_keys_are_spelled_where_they_are_declared(file: str) -> None:
    names = {key.name for key in keys_of(Recipe) if not key.required} - {"learn"}
    assert len(names) == 18
    spelled = set[str]()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        words = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        words += [node.arg] if isinstance(node, ast.keyword | ast.arg) and node.arg else []
        spelled |= {word.lstrip("-").replace("-", "_") for word in words} & names
    assert spelled == SPELLED[file]
