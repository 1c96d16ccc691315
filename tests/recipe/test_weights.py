"""Weights by pattern: read strictly, honoured by every method, recorded, printed, and undone exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import hfmerge
from hfmerge.errors import LedgerError, RecipeError
from hfmerge.ledger.entry import Entry, Material
from hfmerge.ledger.schema import material as checked_material
from hfmerge.methods import registry
from hfmerge.recipe.mergekit.convert import convert
from hfmerge.recipe.recipe import ModelEntry, load_recipe, parse_recipe
from hfmerge.recipe.weights import PatternWeights, restored, shown, stored, weight_at
from tests.fixtures import tiny


LAYERS = {"model.layers.0.*": 0.5, "*.layers.*": 2.0, "*": 0.25}


def faults(weight: Any, method: str = "linear", **more: Any) -> dict[str, str]:
    data = {"base": "org/z", "models": [{"model": "org/a", "weight": weight}, "org/b"], "method": method}
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**data, **more}, "test")
    return {problem.path: problem.text for problem in caught.value.problems}


def parsed(weight: Any) -> Any:
    data = {"base": "org/z", "models": [{"model": "org/a", "weight": weight}], "method": "linear"}
    return parse_recipe(data, "test").models[0].weight


# --- reading and writing -------------------------------------------------------------------------------------------


def test_the_first_pattern_that_fits_counts() -> None:
    weight = parsed(LAYERS)
    assert weight == PatternWeights((("model.layers.0.*", 0.5), ("*.layers.*", 2.0), ("*", 0.25)))
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight", "model.norm.weight")
    assert [weight_at(weight, name) for name in names] == [0.5, 2.0, 0.25]
    assert weight.unused(names[1:]) == ["model.layers.0.*"] and weight.unused(names) == []
    assert parsed({"*": 3}) == 3.0 and weight_at(0.7, "any") == 0.7


def test_recipes_come_back_as_they_were(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {"base": "org/z", "models": [{"model": "org/a", "weight": LAYERS}, "org/b"], "method": "linear"}, "test"
    )
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), "test") == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    turned = {name: LAYERS[name] for name in ("*.layers.*", "model.layers.0.*", "*")}
    assert parsed(turned) != parsed(LAYERS), "the order counts"


@pytest.mark.parametrize(
    ("weight", "path", "words"),
    [
        ({}, "weight", "must not be empty"),
        ({"a.*": 1}, "weight", 'must end with the pattern "*"'),
        ({"*": 1, "a.*": 2}, "weight", '"a.*" never counts'),
        ({"a": math.nan, "*": 1}, "weight.a", "must be a finite number, not nan"),
        ({"a": "0.5", "*": 1}, "weight.a", "remove the quotes"),
        ({"a": True, "*": 1}, "weight.a", "must be a number, not true"),
        ({"a": None, "*": 1}, "weight.a", "has no value"),
        ({"a": [1], "*": 1}, "weight.a", "must be a number, not a list"),
        ({7: 1, "*": 1}, "weight", "a pattern must be text, not 7"),
        ({"": 1, "*": 1}, "weight", "a pattern must not be empty"),
        ({"a": 1, " a": 2, "*": 1}, "weight.a", "given twice"),
        (math.inf, "weight", "must be a finite number"),
        ([["a", 1]], "weight", "must be a number, not a list"),
    ],
)
def test_faulty_weights(weight: Any, path: str, words: str) -> None:
    found = faults(weight)
    assert list(found) == [f"models[0].{path}"]
    assert words in found[f"models[0].{path}"]


def test_all_faults_come_at_once() -> None:
    assert list(faults({"a": "x", "b": math.inf}, method="lineer")) == [
        "method",
        "models[0].weight.a",
        "models[0].weight.b",
        "models[0].weight",
    ]


def test_weights_that_are_all_zero() -> None:
    data = {"base": "z", "models": [{"model": "a", "weight": {"b.*": 0, "*": 0}}], "method": "task_arithmetic"}
    with pytest.raises(RecipeError, match="all weights are zero"):
        parse_recipe(data, "test")


def test_they_are_shown_in_a_few_words() -> None:
    many = PatternWeights((*((f"layers.{i}.*", 0.1 * i) for i in range(12)), ("*", 1.0)))
    assert [shown(weight) for weight in (0.5, parsed(LAYERS), many)] == [
        "0.5",
        "model.layers.0.*: 0.5, *.layers.*: 2, *: 0.25",
        "0 to 1.1 by 13 patterns",
    ]


def test_the_ledger_keeps_numbers_as_they_were_and_patterns_in_order() -> None:
    plain = Material("org/a", "0" * 40, None, "full", 0.5, {})
    assert plain.to_dict()["weight"] == 0.5
    material = dataclasses.replace(plain, weight=parsed(LAYERS))
    data = json.loads(json.dumps(material.to_dict(), sort_keys=True))
    assert data["weight"] == [["model.layers.0.*", 0.5], ["*.layers.*", 2.0], ["*", 0.25]]
    assert Material.from_dict(data) == material and restored(stored(material.weight)) == material.weight
    for bad in ("0.5", [], [["a.*", 1.0]], [["*"]], [1.0]):
        with pytest.raises((ValueError, TypeError)):
            checked_material({**data, "weight": bad})


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    tiny.adapter(root / "a0", tiny.attention(), 7)
    return root


def recipe_of(root: Path, method: Any, weights: list[Any], names: tuple[str, ...] = ("m0", "m1", "m2")) -> Any:
    models = [{"model": str(root / name), "weight": weight} for name, weight in zip(names, weights, strict=True)]
    return parse_recipe({"base": str(root / "base"), "models": models, "method": method}, "test")


METHODS = [name for name, method in registry().items() if method.arity[1] is None]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_each_parameter_by_its_own_weights(root: Path, tmp_path: Path, name: str) -> None:
    """As cut out of merges with one number a model."""
    other = {"model.layers.1.*": 0.0, "*": 1.5}
    method = {"name": name, "norm": "none"}
    names = ("m0", "m1", "a0")
    hfmerge.merge(recipe_of(root, method, [LAYERS, 1.0, other], names), output=tmp_path / "out")
    found = tiny.tensors(tmp_path / "out")
    sets = {(0.5, 1.0, 1.5): "model.layers.0.", (2.0, 1.0, 0.0): "model.layers.1.", (0.25, 1.0, 1.5): ""}
    left = set(found)
    for i, (weights, prefix) in enumerate(sets.items()):
        folder = tmp_path / str(i)
        hfmerge.merge(recipe_of(root, method, list(weights), names), output=folder)
        plain = tiny.tensors(folder)
        for key in sorted(key for key in left if key.startswith(prefix)):
            assert torch.equal(found[key], plain[key]), (key, weights)
            left.remove(key)
    assert not left


@pytest.mark.slow
def test_slerp_takes_its_share_by_pattern(root: Path, tmp_path: Path) -> None:
    weights = [{"model.layers.0.*": 3.0, "*": 1.0}, 1.0]
    hfmerge.merge(recipe_of(root, "slerp", weights, ("m0", "m1")), output=tmp_path / "out")
    found = tiny.tensors(tmp_path / "out")
    for share, inside in ((0.25, True), (0.5, False)):
        hfmerge.merge(
            recipe_of(root, {"name": "slerp", "t": share}, [1, 1], ("m0", "m1")), output=tmp_path / f"{share}"
        )
        plain = tiny.tensors(tmp_path / f"{share}")
        assert all(torch.equal(found[k], plain[k]) for k in found if k.startswith("model.layers.0.") == inside)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "gram", "opcm", "mdm_oc"])
def test_models_come_and_go_as_if_they_never_had(root: Path, tmp_path: Path, name: str) -> None:
    """Exact subtraction, replay and merging again, with patterns on those who leave and those who stay."""
    other = {"*.1.*": 0.5, "*": 1.0}
    every, some = tmp_path / "every", tmp_path / "some"
    hfmerge.merge(recipe_of(root, name, [LAYERS, other, 0.7]), output=every)
    hfmerge.merge(recipe_of(root, name, [LAYERS, 0.7], ("m0", "m2")), output=some)
    assert hfmerge.verify(every, replay=True).ok
    hfmerge.unmerge(every, "m1", output=tmp_path / "without")
    assert tiny.files(tmp_path / "without") == tiny.files(some)
    weight = PatternWeights((("*.1.*", 0.5), ("*", 1.0)))
    hfmerge.add(some, [ModelEntry(str(root / "m1"), weight)], output=tmp_path / "again")
    moved = tmp_path / "moved"
    hfmerge.merge(recipe_of(root, name, [LAYERS, 0.7, other], ("m0", "m2", "m1")), output=moved)
    assert tiny.files(tmp_path / "again") == tiny.files(moved)
    told: dict[str, Any] = json.loads((tmp_path / "again" / "merge_history" / "0002.json").read_bytes())
    assert told["materials"]["models"][2]["weight"] == [["*.1.*", 0.5], ["*", 1.0]]


def test_a_changed_weight_is_another_model_in_a_state(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hfmerge.merge(recipe_of(root, "opcm", [LAYERS, 1.0], ("m0", "m1")), output=out)
    hfmerge.replace(out, "m0", str(root / "m0"), weight=0.5)
    assert "weight" in tiny.done("diff", out).out
    hfmerge.merge(recipe_of(root, "opcm", [0.5, 1.0], ("m0", "m1")), output=tmp_path / "other")
    assert tiny.files(out) == tiny.files(tmp_path / "other")


def test_they_are_printed_and_can_be_merged_again_from_the_card(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of(root, "linear", [LAYERS, 0.7], ("m0", "m1")).to_yaml(), encoding="utf-8")
    text = "model.layers.0.*: 0.5, *.layers.*: 2, *: 0.25"
    assert f"weight {text}, changes" in tiny.done("plan", path).out
    out = tmp_path / "out"
    assert f"weight {text} norm" in tiny.done("merge", path, "--output", out).out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| `{text}` |" in card and "model.layers.0.*: 0.5\n" in card
    assert f"weight {text}, norm" in tiny.done("history", out).out
    assert f"weight {text}" in tiny.done("history", out, "--graph").out
    tiny.done("merge", path, "--weight", "0.5", "--weight", "0.5", "--output", tmp_path / "flags")
    assert tiny.done("verify", out, "--replay").code == 0


def test_sums_are_checked_where_weights_meet(root: Path, tmp_path: Path) -> None:
    one, other = {"model.layers.0.*": 1.0, "*": -1.0}, {"model.layers.1.*": 1.0, "*": 2.0}
    recipe = recipe_of(root, "linear", [one, other], ("m0", "m1"))
    with pytest.raises(RecipeError, match=r"in model\.layers\.1\.\S+ the weights sum to zero"):
        hfmerge.plan(recipe)
    hfmerge.plan(recipe_of(root, "task_arithmetic", [one, other], ("m0", "m1")))
    # 1 and -1 never meet in a parameter of these models
    apart = {"model.layers.7.*": -2.0, "*": 1.0}
    planned = hfmerge.plan(recipe_of(root, "linear", [apart, 2.0], ("m0", "m1")))
    assert "pattern 'model.layers.7.*' of the weight of models[0] counts for no parameter." in planned.warnings


def test_weights_built_in_python_are_checked_too(root: Path) -> None:
    recipe = recipe_of(root, "linear", [1.0, 1.0], ("m0", "m1"))
    for pairs, words in (((), "must not be empty"), ((("a", math.nan), ("b", 1.0)), "finite number")):
        entry = dataclasses.replace(recipe.models[0], weight=PatternWeights(pairs))
        with pytest.raises(RecipeError, match=words):
            hfmerge.plan(dataclasses.replace(recipe, models=(entry, recipe.models[1])))


def test_a_ledger_with_other_weights_is_broken(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hfmerge.merge(recipe_of(root, "linear", [LAYERS, 0.7], ("m0", "m1")), output=out)
    data = json.loads((out / "merge_history" / "0001.json").read_bytes())
    data["materials"]["models"][0]["weight"] = [["model.*", 1.0]]
    with pytest.raises(LedgerError, match="not a ledger entry"):
        Entry.from_bytes(json.dumps(data).encode(), "here")


# --- mergekit ------------------------------------------------------------------------------------------------------


def converted(*weights: Any, method: str = "task_arithmetic", **parameters: Any) -> list[Any]:
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip("abc", weights, strict=False)]
    data = {"merge_method": method, "base_model": "z", "models": models, "parameters": parameters}
    return [entry["weight"] for entry in convert(data, "test")[0]["models"]]


def test_filters_become_patterns() -> None:
    filters = [{"filter": "self_attn", "value": 0.2}, {"filter": "mlp[", "value": 1}, {"value": 0.5}]
    wanted = {"*self_attn*": 0.2, "*mlp[[]*": 1.0, "*": 0.5}
    assert converted(filters, 0.3) == [wanted, 0.3]
    assert list(converted(filters, 0.3)[0]) == list(wanted)
    assert converted([{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0.5}]) == [0.5]
    # what a model's filters leave open, the file says
    assert converted([{"filter": "mlp", "value": 2}], weight=0.5) == [{"*mlp*": 2.0, "*": 0.5}]
    name = "model.layers.0.mlp.up_proj.weight"
    assert weight_at(PatternWeights(tuple(converted(filters)[0].items())), name) == 0.5


@pytest.mark.parametrize(
    ("weights", "more", "path", "words"),
    [
        ([[{"filter": "mlp", "value": 1}]], {}, "models[0].parameters.weight", 'no value but for the filter "mlp"'),
        ([[{"filter": "mlp", "value": [0, 1]}, {"value": 1}]], {}, "models[0].parameters.weight", "a gradient"),
        ([[{"filter": "mlp", "valu": 1}, {"value": 1}]], {}, "models[0].parameters.weight", "{filter, value}"),
        ([[{"filter": "mlp", "value": 2}, {"value": 1}]], {"normalize": True}, "parameters.normalize", "by filter"),
        (
            [[{"filter": "a", "value": 2}, {"value": 1}], [{"filter": "b", "value": -1}, {"value": 1}]],
            {"method": "ties"},
            "models[1].parameters.weight",
            "-1.0 for b is negative",
        ),
        (
            [[{"filter": "a", "value": 0.5}, {"value": 1}], 0],
            {"method": "linear", "normalize": False, "weight": 0},
            "parameters.normalize",
            "do not sum to 1",
        ),
        (
            [[{"filter": "a", "value": 2}, {"value": 1}], [{"filter": "b", "value": -1}, {"value": 1}]],
            {"normalize": True},
            "parameters.normalize",
            "by filter",
        ),
    ],
)
def test_filters_that_cannot_be_expressed(weights: list[Any], more: Any, path: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        converted(*weights, **more)
    found = {problem.path: problem.text for problem in caught.value.problems}
    assert list(found) == [path] and words in found[path]


def test_filters_whose_sums_agree_can_be_expressed() -> None:
    first = [{"filter": "mlp", "value": 0.25}, {"value": 0.5}]
    second = [{"filter": "mlp", "value": 0.75}, {"value": 0.5}]
    wanted = [{"*mlp*": 0.25, "*": 0.5}, {"*mlp*": 0.75, "*": 0.5}]
    assert converted(first, second, normalize=True) == wanted
    assert converted(first, second, method="linear", normalize=False, weight=0)[:2] == wanted
