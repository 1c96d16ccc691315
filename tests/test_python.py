"""The Python door: plain values beside recipes, every fault a `RecipeError`, names that are found by completion."""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import hfmerge
from hfmerge import MethodChoice, ModelEntry, PatternWeights, Recipe, RecipeError
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    return root


def test_plain_values_are_the_recipe_that_they_say(root: Path, tmp_path: Path) -> None:
    """As keywords, as a mapping, as a recipe of plain values, and as a recipe of classes: the same bytes."""
    models: list[Any] = [root / "m0", {"model": str(root / "m1"), "weight": 0.5}]
    method: Mapping[str, Any] = {"name": "opcm", "alpha": 0.4}
    wholly = Recipe(
        base=str(root / "base"),
        models=(ModelEntry(str(root / "m0")), ModelEntry(str(root / "m1"), 0.5)),
        method=MethodChoice("opcm", {"alpha": 0.4}, "mean"),
        dtype="bfloat16",
    )
    plainly: Any = {"base": root / "base", "models": models, "method": method, "dtype": "bfloat16"}
    ways = {
        "keywords": lambda out: hfmerge.merge(
            base=root / "base", models=models, method=method, dtype="bfloat16", output=out
        ),
        "mapping": lambda out: hfmerge.merge(plainly, output=out),
        "plain recipe": lambda out: hfmerge.merge(Recipe(**plainly), output=out),
        "recipe": lambda out: hfmerge.merge(wholly, output=str(out)),
    }
    for name, way in ways.items():
        assert way(tmp_path / name).folder == tmp_path / name
    first, *others = (tiny.files(tmp_path / name) for name in ways)
    assert all(other == first for other in others)
    assert hfmerge.plan(**plainly).recipe == hfmerge.plan(wholly).recipe


def test_keywords_count_instead_of_the_keys_of_a_recipe(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {root / 'base'}\nmodels: [{root / 'm0'}, {root / 'm1'}]\nmethod: linear\nstate: none\n")
    planned = hfmerge.plan(path, models=[root / "m2"], method="task_arithmetic", exclude=["*norm*"])
    assert [entry.model for entry in planned.recipe.models] == [str(root / "m2")]
    assert planned.recipe.method.name == "task_arithmetic"
    assert (planned.recipe.exclude, planned.recipe.state) == (("*norm*",), "none")
    foreign = {
        "merge_method": "task_arithmetic",
        "base_model": "org/b",
        "models": [{"model": str(root / "m0"), "parameters": {"weight": 1}}],
    }
    assert hfmerge.plan(foreign, base=root / "base").recipe.base == str(root / "base")


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        (lambda: hfmerge.merge(output="x"), {"base", "models", "method"}),
        (lambda: hfmerge.merge(base=3, models="org/a", methd="opcm"), {"base", "models", "methd", "method"}),  # type: ignore[arg-type]
        (lambda: hfmerge.merge(Recipe("org/b", ["org/a", 3], "opmc")), {"models[1].model", "method"}),  # type: ignore[arg-type]
        (lambda: hfmerge.plan(Recipe("org/b", None, MethodChoice("opcm", None, "none"))), {"method"}),  # type: ignore[arg-type]
        (lambda: hfmerge.plan(Recipe("org/b", (ModelEntry("a", PatternWeights((1,))),), "opcm")), {"models"}),  # type: ignore[arg-type]
        (lambda: hfmerge.plan(Recipe("org/b", (ModelEntry("a", "much"),), "opcm")), {"models[0].weight"}),  # type: ignore[arg-type]
        (lambda: hfmerge.plan(5), {"recipe"}),  # type: ignore[arg-type]
        (lambda: hfmerge.plan(["org/a"], base="org/b"), {"recipe"}),  # type: ignore[arg-type]
        (lambda: hfmerge.inspect(Recipe("org/b", ("org/a",), 7)), {"method"}),  # type: ignore[arg-type]
        (lambda: hfmerge.add("org/m", []), {"models"}),
        (lambda: hfmerge.add("org/m", 3), {"models[0].model"}),  # type: ignore[arg-type]
        (lambda: hfmerge.add("org/m", {"model": "org/a", "wight": 1}), {"models[0].wight"}),
        (lambda: hfmerge.add("org/m", [ModelEntry("org/a", "x")]), {"models[0].weight"}),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_a_recipe_error(given: Any, paths: set[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        given()
    found = {problem.path for problem in caught.value.problems}
    # that there is no such model, or no output, is told in the same list
    assert paths <= found <= paths | {"base", "models[0]", "output"}


def test_one_model_may_be_added_without_a_list(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hfmerge.merge(base=root / "base", models=[root / "m0"], method="linear", output=out)
    hfmerge.add(out, str(root / "m1"))
    hfmerge.add(out, {"model": root / "m2", "weight": 0.25})
    assert [(model.name, model.weight) for model in hfmerge.history(out)[-1].entry.models] == [
        *(("m0", 1.0), ("m1", 1.0), ("m2", 0.25))
    ]


def test_completion_and_help_show_what_there_is() -> None:
    assert dir(hfmerge) == sorted(hfmerge.__all__)
    for verb in (hfmerge.merge, hfmerge.plan):
        shown = pydoc.plain(pydoc.render_doc(verb))
        assert f"hfmerge.{verb.__name__}(" in shown and "method=" in shown
        # the example names only arguments that there are
        used = re.findall(r"(\w+)=", shown.split("Examples:")[1].split("Raises:")[0])
        assert used and set(used) <= set(inspect.signature(verb).parameters)
