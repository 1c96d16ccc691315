"""mergekit files as recipes: the meaning is kept to rounding, and what cannot be kept is refused by name.

The expected weights are computed here from mergekit 0.1.5's formulas, written down again and not taken from its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfmerge.errors import RecipeError
from hfmerge.methods import FoldMethod, JointMethod, registry
from hfmerge.recipe.mergekit.convert import KEYS, OTHER_METHODS, SHARED, convert
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe, load_recipe, parse_recipe
from hfmerge.task_vector import Dense
from tests.fixtures import reference


def entry(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": parameters} if parameters else {"model": model}


def config(method: str = "task_arithmetic", *models: dict[str, Any], **keys: Any) -> dict[str, Any]:
    models = models or (entry("a", weight=0.7), entry("b", weight=0.3))
    return {"merge_method": method, "base_model": "z", "models": list(models), **keys}


def sliced(*sources: dict[str, Any], **keys: Any) -> dict[str, Any]:
    data = config("slerp", parameters={"t": 0.5}, slices=[{"sources": list(sources)}], **keys)
    del data["models"]
    return data


def faults(data: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        convert(data, "test")
    result = {problem.path: problem.text for problem in caught.value.problems}
    assert len(result) == len(caught.value.problems), caught.value.problems
    return result


# --- the meaning is kept ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A base z and three models around it, (37, 53), with elements on which signs agree and disagree."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(37, 53, generator=generator)
    return {"z": base} | {name: base + 0.3 * torch.randn(37, 53, generator=generator) for name in "abc"}


def merged(recipe: Recipe, weights: dict[str, Tensor]) -> Tensor:
    """The weight that a recipe makes, by the registered method and without any file."""
    assert recipe.method.norm == "none"
    method = registry()[recipe.method.name](**recipe.method.options)
    base = weights[recipe.base]
    taus = [Dense(weights[model.model] - base) for model in recipe.models]
    factors = [model.weight for model in recipe.models]
    if isinstance(method, FoldMethod):
        carry = None
        for tau, factor in zip(taus, factors, strict=True):
            carry = method.step(carry, tau, factor, matrix=True)
        assert carry is not None
        return base + method.emit(carry, factors, matrix=True).to_dense().float()
    assert isinstance(method, JointMethod)
    return base + method.combine(taus, factors, base.clone, None).to_dense()


def average(weights: dict[str, Tensor], factors: dict[str, float]) -> Tensor:
    return sum(factor * weights[name] for name, factor in factors.items()) / sum(factors.values())  # type: ignore


def arithmetic(weights: dict[str, Tensor], factors: dict[str, float], scale: float) -> Tensor:
    return weights["z"] + scale * sum(f * (weights[name] - weights["z"]) for name, f in factors.items())


def ties(weights: dict[str, Tensor], factors: dict[str, float], density: float, scale: float) -> Tensor:
    """Trim each change, weigh it, keep per element what has the sign of the sum, divide by the weights kept."""
    changes = []
    for name, factor in factors.items():
        change = weights[name] - weights["z"]
        order = change.abs().flatten().argsort(descending=True)[: round(density * change.numel())]
        kept = torch.zeros(change.numel()).index_fill_(0, order, 1.0).reshape(change.shape)
        changes.append(factor * change * kept)
    stack = torch.stack(changes)
    agreeing = torch.sign(stack) == torch.sign(stack.sum(0))
    agreeing &= stack != 0
    share = (agreeing * torch.tensor(list(factors.values())).reshape(-1, 1, 1)).sum(0)
    return weights["z"] + scale * (stack * agreeing).sum(0) / torch.where(share == 0, 1.0, share)


def great_circle(weights: dict[str, Tensor], other: str, t: float) -> Tensor:
    first, second = weights["z"].double(), weights[other].double()
    angle = math.acos(float((first * second).sum() / (first.norm() * second.norm())))
    near, far = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (near * first + far * second).float()


Expected = Callable[[dict[str, Tensor]], Tensor]


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(
            {
                "merge_method": "linear",
                "models": [entry("a", weight=1), entry("b", weight=0.3), entry("c", weight=-0.2)],
            },
            lambda w: average(w, {"a": 1, "b": 0.3, "c": -0.2}),
            id="linear without a base",
        ),
        pytest.param(
            config("linear", entry("a", weight=1), entry("z", weight=0.5)),
            lambda w: average(w, {"a": 1, "z": 0.5}),
            id="linear with the base among the models",
        ),
        pytest.param(
            config("linear", entry("a"), entry("b", weight=0.2), parameters={"weight": 0.7}),
            lambda w: average(w, {"a": 0.7, "b": 0.2, "z": 0.7}),
            id="linear adds the base with the weight for all",
        ),
        pytest.param(
            config("linear", entry("a", weight=0.7), entry("z", weight=0.3), parameters={"normalize": False}),
            lambda w: 0.7 * w["a"] + 0.3 * w["z"],
            id="linear not normalised, weights sum to 1",
        ),
        pytest.param(
            config("task_arithmetic", entry("a", weight=0.7), entry("z"), entry("b", weight=-0.3)),
            lambda w: arithmetic(w, {"a": 0.7, "b": -0.3}, 1.0),
            id="task arithmetic ignores the base among the models",
        ),
        pytest.param(
            config(parameters={"lambda": 0.4, "normalize": True, "weight": 9}),
            lambda w: arithmetic(w, {"a": 0.7, "b": 0.3}, 0.4 / 1.0),
            id="task arithmetic, a model's weight wins",
        ),
        pytest.param(
            config("task_arithmetic", entry("a", weight=2), entry("b"), parameters={"normalize": True, "weight": 3}),
            lambda w: arithmetic(w, {"a": 2, "b": 3}, 1 / 5),
            id="task arithmetic normalised",
        ),
        pytest.param(
            config("task_arithmetic", entry("a", weight=1), entry("b", weight=-1), parameters={"normalize": True}),
            lambda w: arithmetic(w, {"a": 1, "b": -1}, 1.0),
            id="task arithmetic with a zero sum is not divided",
        ),
        pytest.param(
            config("ties", entry("a", weight=1), entry("b", weight=0.4), entry("c", weight=0.7)),
            lambda w: ties(w, {"a": 1, "b": 0.4, "c": 0.7}, 1.0, 1.0),
            id="ties keeps everything by default",
        ),
        pytest.param(
            config(
                "ties",
                entry("a", density=0.25),
                entry("b", density=0.25),
                entry("c", density=[0.25, 0.25], weight=0.1),
                parameters={"weight": 0.5, "lambda": 0.8, "int8_mask": True, "normalize": True},
            ),
            lambda w: ties(w, {"a": 0.5, "b": 0.5, "c": 0.1}, 0.25, 0.8),
            id="ties trimmed",
        ),
        pytest.param(
            config("slerp", entry("z"), entry("b"), parameters={"t": 0.3}),
            lambda w: great_circle(w, "b", 0.3),
            id="slerp from the base",
        ),
        pytest.param(
            config("slerp", entry("b"), entry("z"), parameters={"t": [{"value": 0.3}]}),
            lambda w: great_circle(w, "b", 0.3),
            id="slerp with the base last",
        ),
        pytest.param(
            sliced({"model": "b", "layer_range": [0, 2]}, {"model": "z", "layer_range": [0, 2]}),
            lambda w: great_circle(w, "b", 0.5),
            id="slerp of slices",
        ),
    ],
)
def test_meaning(data: dict[str, Any], expected: Expected, weights: dict[str, Tensor]) -> None:
    recipe = parse_recipe(data, "test")
    torch.testing.assert_close(merged(recipe, weights), expected(weights), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "data, name, options",
    [
        pytest.param(
            config(
                "dare_linear",
                entry("a", density=0.3),
                entry("b", density=0.3),
                parameters={"weight": 0.5, "lambda": 2},
            ),
            "dare_linear",
            {"density": 0.3, "scale": 2.0, "rescale": True, "seed": 0},
            id="dare_linear",
        ),
        pytest.param(
            config("dare_linear", parameters={"normalize": True, "rescale": False, "density": 0.5}),
            "dare_linear",
            {"density": 0.5, "scale": 1.0, "rescale": False, "seed": 0},
            id="dare_linear normalised",
        ),
        pytest.param(
            config("dare_ties", parameters={"density": 0.5}),
            "dare_ties",
            {"density": 0.5, "scale": 1.0, "rescale": True, "average": False, "seed": 0},
            id="dare_ties sums",
        ),
        pytest.param(
            config("della", parameters={"density": 0.4, "epsilon": 0.1, "lambda": 0.9}),
            "della",
            {"density": 0.4, "epsilon": 0.1, "scale": 0.9, "rescale": True, "average": True, "seed": 0},
            id="della averages",
        ),
        pytest.param(
            config("della_linear"),
            "della_linear",
            {"density": 1.0, "epsilon": 0.0, "scale": 1.0, "rescale": True, "seed": 0},
            id="della_linear keeps everything by default",
        ),
        pytest.param(
            config("breadcrumbs", parameters={"density": 0.4}),
            "breadcrumbs",
            {"density": 0.4, "gamma": 0.01, "scale": 1.0},
            id="breadcrumbs",
        ),
        pytest.param(
            config("breadcrumbs_ties", parameters={"density": 0.4, "gamma": 0.1, "normalize": True}),
            "breadcrumbs_ties",
            {"density": 0.4, "gamma": 0.1, "scale": 1.0, "average": True},
            id="breadcrumbs_ties",
        ),
        pytest.param(
            config("karcher", entry("a"), entry("b"), parameters={"max_iter": 20, "tol": 1e-6}),
            "karcher",
            {"steps": 20, "tolerance": 1e-6},
            id="karcher",
        ),
        pytest.param(
            {"merge_method": "nuslerp", "models": [entry("a", weight=1), entry("b", weight=3)]},
            "slerp",
            {},
            id="nuslerp without a base",
        ),
        pytest.param(
            config("nuslerp", parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
            "nuslerp",
            {"by": "column"},
            id="nuslerp along the first axis",
        ),
    ],
)
def test_options(data: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    assert parse_recipe(data, "test").method == MethodChoice(name, options, "none")


def flat(weights: dict[str, Tensor], *names: str) -> list[list[float]]:
    return [(weights[name] - weights["z"]).reshape(-1).tolist() for name in names]


def outliers(weights: dict[str, Tensor], factors: dict[str, float], density: float, gamma: float) -> Tensor:
    """Without the largest `gamma` share and without all but the `density` share that follows."""
    total = weights["z"].clone()
    for name, factor in factors.items():
        change = weights[name] - weights["z"]
        order = change.abs().flatten().argsort()
        count, kept, top = change.numel(), round(density * change.numel()), round(gamma * change.numel())
        mask = torch.zeros(count).index_fill_(0, order[count - kept - top : count - top], 1.0)
        total += factor * change * mask.reshape(change.shape)
    return total


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(
            config("breadcrumbs", entry("a", weight=0.7), entry("b", weight=-0.3), parameters={"density": 0.25}),
            lambda w: outliers(w, {"a": 0.7, "b": -0.3}, 0.25, 0.01),
            id="breadcrumbs",
        ),
        pytest.param(
            config(
                "breadcrumbs_ties", entry("a"), entry("b"), parameters={"density": 1.0, "weight": 1, "normalize": True}
            ),
            lambda w: ties(w, {"a": 1.0, "b": 1.0}, 1.0, 1.0),
            id="breadcrumbs_ties that keeps everything",
        ),
        pytest.param(
            config("sce", entry("a"), entry("b"), entry("c"), parameters={"select_topk": 0.25}),
            lambda w: w["z"] + torch.tensor(reference.sce(flat(w, *"abc"), [1.0] * 3, 0.25)).reshape(37, 53),
            id="sce",
        ),
        pytest.param(
            config("model_stock", entry("a"), entry("b"), entry("c")),
            lambda w: (w["z"] + reference.model_stock([w[name] - w["z"] for name in "abc"])).float(),
            id="model_stock",
        ),
        pytest.param(
            config("nuslerp", entry("a", weight=1), entry("b", weight=3)),
            lambda w: (w["z"] + reference.slerp(w["a"] - w["z"], w["b"] - w["z"], 0.75)).float(),
            id="nuslerp",
        ),
        pytest.param(
            config("multislerp", entry("a", weight=1), entry("b", weight=3), entry("c", weight=0.5)),
            lambda w: (w["z"] + reference.multislerp([w[n] - w["z"] for n in "abc"], [1, 3, 0.5])).float(),
            id="multislerp",
        ),
        pytest.param(
            config("karcher", entry("a"), entry("b"), parameters={"max_iter": 100, "tol": 1e-9}),
            lambda w: reference.karcher([w[name] for name in "zab"], [1.0] * 3).float(),
            id="karcher counts the base",
        ),
        pytest.param(
            config("nearswap", entry("a"), parameters={"t": 0.1}),
            lambda w: reference.nearswap(w["z"], w["a"], 0.1).float(),
            id="nearswap",
        ),
        pytest.param(
            config("arcee_fusion", entry("a")),
            lambda w: reference.arcee_fusion(w["z"], w["a"], 1.5).float(),
            id="arcee_fusion",
        ),
    ],
)
def test_meaning_of_further_methods(data: dict[str, Any], expected: Expected, weights: dict[str, Tensor]) -> None:
    recipe = parse_recipe(data, "test")
    torch.testing.assert_close(merged(recipe, weights), expected(weights), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "data, path, words",
    [
        (config("breadcrumbs", parameters={"density": 0.5, "rescale": True}), "parameters.rescale", "true cannot be"),
        (config("della", entry("a", weight=-1), parameters={"density": 0.5}), "models[0].parameters.weight",
         "negative"),
        (config("dare_ties", entry("a", density=0.5, weight=1), entry("b", density=0.2, weight=1)), "models",
         "densities [0.5, 0.2] cannot be expressed"),
        (config("della", entry("a", epsilon=0.1, weight=1), entry("b", weight=1), parameters={"density": 0.5}),
         "models", "values of epsilon [0.1, 0.15] cannot be expressed"),
        (config("sce", parameters={"select_topk": 0}), "parameters.select_topk", "drops every change"),
        (config("nearswap", entry("a")), "parameters.t", "is missing; nearswap needs it"),
        (config("arcee_fusion"), "models", "arcee_fusion takes the base and one other model, 2 others given"),
        (config("multislerp", base_model=None), "base_model", "is missing; multislerp needs one"),
        (config("multislerp", parameters={"normalize_weights": False}, models=[entry("a", weight=2)]),
         "parameters.normalize_weights", "false with weights that do not sum to 1"),
        (config("nuslerp", base_model=None, parameters={"nuslerp_flatten": False}), "parameters.nuslerp_flatten",
         "false without a base_model"),
    ],
)  # fmt: skip
def test_further_refusals(data: dict[str, Any], path: str, words: str) -> None:
    assert words in faults(data)[path]


def test_defaults_are_written_out() -> None:
    assert parse_recipe(config("ties"), "test").method == MethodChoice(
        "ties", {"density": 1.0, "scale": 1.0, "scope": "tensor"}, "none"
    )
    assert parse_recipe(config(), "test").method == MethodChoice(
        "task_arithmetic", {"sums": "float64", "scale": 1.0}, "none"
    )


def test_slices_with_a_base_that_is_no_source_leave_it_out_of_linear() -> None:
    part = {
        "sources": [{"layer_range": [0, 4], **entry("a", weight=1)}, {"layer_range": [0, 4], **entry("b", weight=3)}]
    }
    data = {"merge_method": "linear", "base_model": "z", "slices": [part]}
    recipe = parse_recipe(data, "test")
    assert (recipe.base, recipe.models) == ("z", (ModelEntry("a", 1.0), ModelEntry("b", 3.0)))


def test_parameters_of_a_slice_win_over_those_of_the_file() -> None:
    sources = [{"layer_range": [0, 4], **entry("a", weight=1)}, {"model": "z", "layer_range": [0, 4]}]
    part = {"sources": sources, "parameters": {"lambda": 0.25}}
    data = {"merge_method": "task_arithmetic", "base_model": "z", "slices": [part], "parameters": {"lambda": 0.5}}
    assert parse_recipe(data, "test").method.options["scale"] == 0.25


# --- the rest of the file -----------------------------------------------------------------------------------------


FILE = """\
merge_method: ties
base_model: org/base@v1
models:
  - model: org/base@v1   # no parameters needed
  - model: org/a
    parameters: {density: 0.5, weight: 1e-1}
  - model: org/b+org/lora
    parameters: {density: 0.5, weight: 0.3}
parameters:
  normalize: true
  int8_mask: true
dtype: float32
out_dtype: bfloat16
tokenizer_source: union
"""


def test_a_file_is_recognised_and_its_notes_travel(tmp_path: Path) -> None:
    path = tmp_path / "mergekit_config.yml"
    path.write_text(FILE)
    recipe = load_recipe(path)
    assert recipe == Recipe(
        base="org/base@v1",
        models=(ModelEntry("org/a", 0.1), ModelEntry("org/b+org/lora", 0.3)),
        method=MethodChoice("ties", {"density": 0.5, "scale": 1.0, "scope": "tensor"}, "none"),
        dtype="bfloat16",
        vocabulary="union",
        tokenizer="union",
    )
    assert [note.split(":")[0] for note in recipe.notes] == ["base_model", "ties", "ties"]
    changed = apply_overrides(recipe, output="merged")
    assert (changed.output, changed.notes) == ("merged", recipe.notes)
    again = tmp_path / "recipe.yaml"
    again.write_text(recipe.to_yaml())
    assert (load_recipe(again), load_recipe(again).notes) == (recipe, ())


def test_a_conversion_is_plain_data_of_a_recipe() -> None:
    data, notes = convert(config("slerp", entry("a"), parameters={"t": 0.5}, dtype="torch.float16"), "test")
    assert data == {
        "base": "z",
        "models": [{"model": "z"}, {"model": "a"}],
        "method": {"name": "slerp", "t": 0.5, "norm": "none"},
        "dtype": "float16",
    }
    assert [note.split(":")[0] for note in notes] == ["dtype", "slerp"]


@pytest.mark.parametrize(
    "keys, vocabulary",
    [
        ({}, None),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "z"}, "base"),
        ({"tokenizer_source": {"model": {"path": "z"}}}, "base"),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer": {"source": "union", "tokens": {}, "pad_to_multiple_of": None}}, "union"),
    ],
)
def test_tokenizer(keys: dict[str, Any], vocabulary: str | None) -> None:
    assert parse_recipe(config(**keys), "test").vocabulary == vocabulary


@pytest.mark.parametrize(
    "model, text",
    [
        ({"path": "org/a", "revision": "v2"}, "org/a@v2"),
        ({"model": "org/a", "lora": "org/l"}, "org/a+org/l"),
        ({"model": {"path": "org/a"}, "lora": {"path": "org/l", "revision": "v3"}}, "org/a+org/l@v3"),
    ],
)
def test_models_written_as_mappings(model: dict[str, Any], text: str) -> None:
    data = config("task_arithmetic", {"model": model, "parameters": {"weight": 1}})
    assert parse_recipe(data, "test").models == (ModelEntry(text),)


@pytest.mark.parametrize(
    "data, words",
    [
        (config("linear", entry("a"), parameters={"weight": 1}), "z is added to the models"),
        ({"merge_method": "linear", "models": [entry("a", weight=1)]}, "no base_model: the first model, a,"),
        (config(name="soup"), "name: only a label"),
        (config(dtype="bfloat16"), "computes in bfloat16"),
        (config(), "no dtype: the output has the base's"),
        (config(parameters={"density": 0.5}), "parameters.density: without effect on task_arithmetic"),
        (config("ties", entry("a", weight=1, normalize=False)), "models[0].parameters.normalize: without effect"),
        (config("ties", parameters={"density": 0.5}), "one element a tensor may differ"),
        (config(parameters={"normalize": True, "lambda": 0.5}), "normalize: expressed as scale"),
        (sliced(*({"model": m, "layer_range": [0, 32]} for m in "az")), "exactly 32 of them"),
    ],
)
def test_notes(data: dict[str, Any], words: str) -> None:
    notes = parse_recipe(data, "test").notes
    assert sum(words in note for note in notes) == 1, notes


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_are_not_here_yet(method: str) -> None:
    text = f'"{method}" is not in hfmerge (yet); convertible: {", ".join(SHARED)}'
    assert faults(config(method)) == {"merge_method": text}


def test_unknown_methods_get_a_suggestion() -> None:
    assert faults(config("dare-tie")) == {
        "merge_method": '"dare-tie" is not a mergekit method; did you mean "dare_ties"?'
    }
    assert faults(config("opcm"))["merge_method"].startswith('"opcm" is not a mergekit method')


def test_all_faults_come_at_once() -> None:
    data = config(
        "ties",
        entry("a", densty=0.5, weight=-1),
        entry("b", weight=[0, 0.5, 1], density=0.5),
        entry("c", weight="0.5"),
        entry("d"),
        parmeters={"weight": 1},
        parameters={"normalize": False, "lambda": [{"filter": "mlp", "value": 1}, {"value": 2}]},
        tokenizer_source="org/other",
        chat_template="auto",
        modules={"text": {}},
        out_dtype=16,
    )
    assert faults(data) == {
        "parmeters": 'unknown mergekit key; did you mean "parameters"?',
        "modules": "merging modules differently cannot be expressed; list the models under `models`",
        "chat_template": "cannot be expressed; the merge keeps the base's, remove the key",
        "out_dtype": "must be text, not 16; quote it if it is meant as text",
        "tokenizer_source": 'the tokenizer of "org/other" cannot be expressed; only base and union can',
        "models[0].parameters.densty": 'unknown parameter; did you mean "density"?',
        "models[1].parameters.weight": "a gradient over the layers cannot be expressed; give one value",
        "models[2].parameters.weight": 'must be a number, not the text "0.5"; remove the quotes',
        "models[3].parameters.weight": "is missing; mergekit requires one for every model it merges",
        "models": "densities [1.0, 0.5, 1.0, 1.0] cannot be expressed; hfmerge has one density for all models",
        "parameters.lambda": 'different values by filter "mlp" cannot be expressed; give one value',
        "parameters.normalize": "false cannot be expressed with ties, which divides by the agreeing weights",
    }


@pytest.mark.parametrize(
    "data, path, words",
    [
        (config("ties", base_model=None), "base_model", "is missing; ties needs one"),
        (config("slerp", base_model=None, parameters={"t": 0.5}), "base_model", "is missing; slerp needs one"),
        (config("linear"), "base_model", "needs a weight in linear; add it to models (weight 0 leaves it out)"),
        (config("task_arithmetic", entry("z", weight=1)), "models", "holds nothing but the base"),
        (config("slerp", entry("a")), "parameters.t", "is missing; slerp needs it"),
        (config("slerp", entry("a", t=0.5)), "parameters.t", "is missing; slerp needs it"),
        (config("slerp", entry("a"), parameters={"t": [0, 0.5, 1]}), "parameters.t", "a gradient over the layers"),
        (config("slerp", entry("a"), parameters={"t": []}), "parameters.t", "is an empty list"),
        (config("slerp", entry("a"), parameters={"t": None}), "parameters.t", "has no value"),
        (
            config("slerp", entry("a"), parameters={"t": {"filter": "mlp", "value": 0.5}}),
            "parameters.t",
            'has no value but for the filter "mlp"; filters cannot be expressed',
        ),
        (
            config("slerp", entry("a"), parameters={"t": [{"filter": "mlp", "valu": 0.5}, {"value": 1}]}),
            "parameters.t",
            "must be a value or a list of {filter, value}",
        ),
        (config("slerp", parameters={"t": 0.5}), "models", "slerp takes the base and one other model, 2 others given"),
        (
            config("linear", entry("a", weight=0.5), entry("z", weight=0.6), parameters={"normalize": False}),
            "parameters.normalize",
            "false with weights that do not sum to 1",
        ),
        (config(parameters={"normalize": "no"}), "parameters.normalize", 'must be true or false, not "no"'),
        (config(parameters={"lambda": math.nan}), "parameters.lambda", "must be a finite number"),
        (config("ties", entry("a", weight=-0.5)), "models[0].parameters.weight", "-0.5 for a is negative"),
        (config("ties", parameters={"density": 0}), "parameters.density", "0.0 drops every change"),
        (
            config("ties", parameters={"density": 0.5, "rescale": True}),
            "parameters.rescale",
            "true cannot be expressed",
        ),
        (config(parameters=[1]), "parameters", "must be a mapping, not a list"),
        (config(models=[]), "models", "must not be empty"),
        (config(models="a"), "models", 'must be a list of models, not "a"'),
        (config(models=["a"]), "models[0]", 'must be a mapping with `model`, not "a"'),
        (config(models=None), "models", "is missing"),
        (config(models=[{"parameters": {}}]), "models[0].model", "is missing"),
        (config(models=[{"wieght": 1, **entry("a", weight=1)}]), "models[0].wieght", "unknown key"),
        (config(models=[{"model": {"path": "a", "override_architecture": "X"}}]), "models[0].model", "override_arch"),
        (config(models=[{"model": {"lora": "a"}}]), "models[0].model", "must be text, or a mapping with"),
        (config(slices=[{"sources": []}]), "slices", "stands beside models; keep one of the two"),
        (config(models=None, slices=[{}, {}]), "slices", "only one slice with all layers"),
        (config(models=None, slices=["a"]), "slices[0]", "must be a mapping with sources"),
        (config(models=None, slices=[{}]), "slices[0].sources", "must be a list of models, not null"),
        (
            sliced({"model": "a", "layer_range": [0, 8]}, {"model": "z", "layer_range": [8, 16]}),
            "slices[0].sources",
            "every layer_range must be the same [0, number of layers]",
        ),
        (
            sliced({"model": "a", "layer_range": [4, 8]}, {"model": "z", "layer_range": [4, 8]}),
            "slices[0].sources",
            "every layer_range must be the same [0, number of layers]",
        ),
        (sliced({"model": "a"}, {"model": "z"}), "slices[0].sources", "every layer_range must be the same"),
        (config(models=None, modules={"text": {}}), "modules", "merging modules differently cannot be expressed"),
        (config(tokenizer={}, tokenizer_source="base"), "tokenizer", "stands beside tokenizer_source"),
        (config(tokenizer="base"), "tokenizer", 'must be a mapping, not "base"'),
        (config(tokenizer={"tokens": {"<x>": {}}}), "tokenizer.tokens", "cannot be expressed; remove it"),
        (config(tokenizer={"pad_to_multiple_of": 64}), "tokenizer.pad_to_multiple_of", "cannot be expressed"),
        (config(tokenizer={"sorce": "base"}), "tokenizer.sorce", 'unknown key; did you mean "source"?'),
        (config(tokenizer_source=3), "tokenizer_source", "must be text, not 3"),
        (config(dtype=3), "dtype", "must be text, not 3"),
        (config(base="z"), "base", "unknown mergekit key"),
    ],
)
def test_single_faults(data: dict[str, Any], path: str, words: str) -> None:
    found = faults(data)
    assert list(found) == [path]
    assert words in found[path]


@pytest.mark.parametrize("key", ["base_model", "residual_weight"])
def test_settings_of_one_slice_are_refused(key: str) -> None:
    data = sliced({"model": "a", "layer_range": [0, 8]}, {"model": "z", "layer_range": [0, 8]})
    data["slices"][0][key] = "z" if key == "base_model" else 0.5
    assert list(faults(data)) == [f"slices[0].{key}"]


def test_one_faulty_setting_for_all_models_is_one_fault() -> None:
    data = config("ties", entry("a"), entry("b"), entry("c"), parameters={"weight": [0, 1]})
    assert list(faults(data)) == ["parameters.weight"]


def test_faults_of_the_file_and_of_the_conversion_come_together(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(FILE + "dtype: float16\nout_dtpye: float16\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [problem.path for problem in caught.value.problems] == ["dtype", "out_dtpye"]
    assert caught.value.origin == str(path)


@pytest.mark.parametrize(
    "data, path",
    [
        (config("slerp", entry("a"), parameters={"t": 1.5}), "method.t"),
        (config("task_arithmetic", entry("a", weight=1), entry("a", weight=1)), "models[1]"),
        (config("task_arithmetic", entry("a", weight=0)), "models"),
        (config("linear", entry("a", weight=1), entry("z", weight=-1)), "models"),
        (config(dtype="bf16"), "dtype"),
    ],
)
def test_what_the_recipe_refuses_is_refused_after_conversion(data: dict[str, Any], path: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "test")
    assert [problem.path for problem in caught.value.problems] == [path]


def test_no_convertible_method_is_missing_from_the_registry() -> None:
    assert set(SHARED) <= set(registry())
    assert not set(OTHER_METHODS) & set(SHARED)
    assert "merge_method" in KEYS


def test_a_recipe_of_a_mixture_of_experts_is_named() -> None:
    said = "this is a recipe of mergekit-moe"
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"base_model": "a/b", "gate_mode": "random", "experts": [{"source_model": "a/c"}]}, "moe.yaml")
