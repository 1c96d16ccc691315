"""Recipes: what is accepted, what is refused and in which words, and that writing one and reading it gives it back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmerge.errors import RecipeError
from hfmerge.methods import MergeMethod, registry
from hfmerge.recipe.overrides import apply_overrides
from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe, load_recipe, parse_recipe
from hfmerge.validation.strict_yaml import dump_yaml, parse_scalar, parse_yaml


FULL = """\
base: org/base
models:
  - org/a
  - {model: org/b@v2, weight: 0.5}
method: {name: opcm, alpha: 0.25, variant: paper, norm: 2}
dtype: bfloat16
include: ["encoder.*"]
exclude: ["*.position_ids"]
vocabulary: union
state: 3
output: ./merged
push_to: org/merged
private: true
allow_nonfinite: true
allow_pickle: true
trust_remote_code: true
"""


@dataclass(frozen=True)
class Toy(MergeMethod):
    """Has an option of every kind, one of them required, and a rule over two of them."""

    name: ClassVar[str] = "toy"
    arity: ClassVar[tuple[int, int | None]] = (2, 3)
    normalises_weights: ClassVar[bool] = True
    default_norm: ClassVar[str] = "mean"

    rate: float = field(metadata={"minimum": 0.0, "maximum": 1.0})
    steps: int = field(default=4, metadata={"minimum": 1})
    fast: bool = False
    label: str = "plain"
    mode: Literal["left", "right"] = "left"
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.fast and self.steps > 9:
            raise ValueError("fast takes at most 9 steps")


def minimal(**changes: Any) -> dict[str, Any]:
    return {"base": "org/base", "models": ["org/a", "org/b"], "method": "opcm"} | changes


def faults(call: Callable[[], object]) -> dict[str, str]:
    """Path -> text of all problems of a call that must fail; paths are unique."""
    with pytest.raises(RecipeError) as caught:
        call()
    problems = caught.value.problems
    result = {problem.path: problem.text for problem in problems}
    assert len(result) == len(problems), problems
    return result


def parse_faults(**changes: Any) -> dict[str, str]:
    return faults(lambda: parse_recipe(minimal(**changes), "test"))


def toy(**options: Any) -> Recipe:
    return parse_recipe(minimal(method={"name": "toy", **options}), "test", {"toy": Toy})


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_every_key_of_a_file_arrives(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, FULL)) == Recipe(
        base="org/base",
        models=(ModelEntry("org/a"), ModelEntry("org/b@v2", 0.5)),
        method=MethodChoice("opcm", {"alpha": 0.25, "variant": "paper", "spectral": "exact"}, 2.0),
        dtype="bfloat16",
        include=("encoder.*",),
        exclude=("*.position_ids",),
        vocabulary="union",
        tokenizer="union",
        state=3,
        output="./merged",
        push_to="org/merged",
        private=True,
        allow_nonfinite=True,
        allow_pickle=True,
        trust_remote_code=True,
    )


def test_defaults_are_filled_in() -> None:
    recipe = parse_recipe(minimal(), "test")
    assert recipe.method == MethodChoice("opcm", {"alpha": 0.5, "variant": "code", "spectral": "exact"}, "mean")
    assert [entry.weight for entry in recipe.models] == [1.0, 1.0]
    assert (recipe.dtype, recipe.vocabulary, recipe.state, recipe.private) == (None, None, "last", None)
    assert parse_recipe(minimal(method="task_arithmetic"), "test").method.norm == "none"


def test_null_is_the_default_of_keys_that_may_be_absent() -> None:
    nothing = dict.fromkeys(("dtype", "vocabulary", "output", "push_to", "private"))
    assert parse_recipe(minimal(**nothing), "test") == parse_recipe(minimal(), "test")
    unset = parse_recipe(minimal(method={"name": "slerp", "t": None}), "test")
    assert unset.method.options == {}


def test_names_are_trimmed_and_paths_are_text() -> None:
    recipe = parse_recipe(minimal(base=Path("some/folder"), models=[" org/a "], method=" opcm "), "test")
    assert (recipe.base, recipe.models[0].model, recipe.method.name) == ("some/folder", "org/a", "opcm")


def test_options_of_every_kind() -> None:
    assert toy(rate=1, cap=2, label="x", fast=True).method == MethodChoice(
        "toy", {"rate": 1.0, "steps": 4, "fast": True, "label": "x", "mode": "left", "cap": 2.0}, "mean"
    )
    assert "cap" not in toy(rate=0.0).method.options


@pytest.mark.parametrize("name", list(registry()))
def test_every_registered_method_is_a_recipe_by_name_alone(name: str) -> None:
    recipe = parse_recipe(minimal(method=name), "test")
    method = registry()[name](**recipe.method.options)
    assert recipe.method.name == name
    assert {k: v for k, v in dataclasses.asdict(method).items() if v is not None} == recipe.method.options


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("5E2", 500.0), ("-.5", -0.5), ("2", 2.0), ("+1.", 1.0)])
def test_unquoted_numbers_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path, f"base: b\nmodels: [{{model: a, weight: {text}}}]\nmethod: opcm\n")
    assert load_recipe(path).models[0].weight == value


def test_yaml_1_1_numbers_are_not_numbers() -> None:
    assert parse_yaml("[010, 1:30, 2024-01-01, 0x10, 1_000]", "x")[0] == [10, "1:30", "2024-01-01", "0x10", "1_000"]
    values = [parse_scalar(text) for text in ("1e-3", "7", "true", "null", "code", "<<", "a: b", "")]
    assert values == [1e-3, 7, True, None, "code", "<<", "a: b", None]


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_base_may_be_a_model_of_methods_of_the_weights(method: str) -> None:
    recipe = parse_recipe(minimal(models=["org/base", "org/b"], method=method), "test")
    assert recipe.models[0].model == recipe.base


# --- what is refused ----------------------------------------------------------------------------------------------


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    text = """\
base: org/base
base: org/other
modles: [org/a]
models:
  - org/a
  - {model: org/a, wieght: 0.5, weight: "0.5"}
  - org/other
  - {model: org/c, weight: .nan}
  - {weight: 1}
method: {name: opcm, alhpa: 0.5, alpha: 1.5, variant: papers, norm: Mean}
dtype: bf16
include: enc*
vocabulary: Union
state: 0
output: ""
push_to: https://huggingface.co/org/x
private: 1
allow_nonfinite: "yes"
"""
    path = write(tmp_path, text)
    found = faults(lambda: load_recipe(path))
    assert found == {
        "base": "written twice, in lines 1 and 2; keep one",
        "modles": 'unknown key; did you mean "models"?',
        "method.alhpa": 'unknown option of opcm; did you mean "alpha"?',
        "method.alpha": "must be at most 1.0, not 1.5",
        "method.variant": '"papers" is not one of code, code-no-diagonal, paper; did you mean "paper"?',
        "method.norm": 'must be none, mean, fit, fit-matrix or a positive number, not "Mean"; did you mean "mean"?',
        "models[1].wieght": 'unknown key; did you mean "weight"?',
        "models[1].weight": 'must be a number, not the text "0.5"; remove the quotes',
        "models[1]": '"org/a" is models[0] again; remove one or change its revision',
        "models[2]": '"org/other" is the base, whose task vector is zero; remove it',
        "models[3].weight": "must be a finite number, not nan",
        "models[4].model": "is missing",
        "push_to": found["push_to"],
        "private": "must be true or false, not 1",
        "dtype": '"bf16" is not one of float32, float16, bfloat16, float64; did you mean "bfloat16"?',
        "include": 'must be a list of texts, not "enc*"; write [...]',
        "vocabulary": '"Union" is not one of base, union; did you mean "union"?',
        "state": "must be none, last, all or a positive whole number, not 0",
        "output": "must not be empty",
        "allow_nonfinite": 'must be true or false, not "yes"',
    }
    assert "is not a repository id, write org/name" in found["push_to"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines()[0] == f"{path}: 20 problems, nothing downloaded"


def test_an_empty_mapping_lacks_three_keys() -> None:
    found = faults(lambda: parse_recipe({}, "test"))
    assert list(found) == ["base", "method", "models"]
    assert found["method"].startswith("is missing; one of opcm, linear")


@pytest.mark.parametrize("data", [None, [], "org/base", 3])
def test_a_recipe_is_a_mapping(data: Any) -> None:
    assert list(faults(lambda: parse_recipe(data, "test"))) == ["recipe"]


@pytest.mark.parametrize(
    "models, path, text",
    [
        ([], "models", "must not be empty"),
        ("org/a", "models", 'must be a list, not "org/a"'),
        (None, "models", "is missing"),
        ({"model": "a"}, "models", "must be a list, not a mapping"),
        (["org/a", 3], "models[1].model", "must be text, not 3"),
        (["org/a", None], "models[1].model", "has no value"),
        (["org/a", "  "], "models[1].model", "must not be empty"),
        (["org/a", "b\nc"], "models[1].model", "must be one line"),
        (["org/a", {"model": "b", "weight": True}], "models[1].weight", "must be a number, not true"),
        (["org/a", {"model": "b", "weight": None}], "models[1].weight", "has no value; give one or remove the key"),
        (["org/a", {"model": "b", "weight": float("inf")}], "models[1].weight", "must be a finite number, not inf"),
        (
            ["org/a", {"model": "b", "weight": 10**400}],
            "models[1].weight",
            "must be a finite number, not a huge number",
        ),
        (["org/a", {"model": "b", "weight": [1]}], "models[1].weight", "must be a number, not a list"),
        (["org/a", {"model": "b", "weight": "high"}], "models[1].weight", 'must be a number, not the text "high"'),
        (["org/a@v1", " org/a@v1 "], "models[1]", '"org/a@v1" is models[0] again'),
        (["./a", "b", "./a/"], "models[2]", '"./a/" is models[0] again'),
        (["org/a", "org/base"], "models[1]", '"org/base" is the base'),
        ([{"model": "a", "weight": 0}, {"model": "b", "weight": 0.0}], "models", "all weights are zero"),
    ],
)
def test_faulty_models(models: Any, path: str, text: str) -> None:
    found = parse_faults(models=models)
    assert list(found) == [path]
    assert found[path].startswith(text)


def test_two_revisions_of_one_model_are_two_models() -> None:
    assert len(parse_recipe(minimal(models=["org/a@v1", "org/a@v2"]), "test").models) == 2


@pytest.mark.parametrize("weights", [(1, -1), (0.1, 0.2, -0.3), (1e30, 1.0, -1e30, -1.0)])
def test_weights_that_sum_to_zero_are_refused_where_they_are_a_divisor(weights: tuple[float, ...]) -> None:
    models = [{"model": f"m{i}", "weight": weight} for i, weight in enumerate(weights)]
    assert "sum to zero and linear divides" in parse_faults(models=models, method="linear")["models"]
    assert len(parse_recipe(minimal(models=models, method="task_arithmetic"), "test").models) == len(weights)


@pytest.mark.parametrize(
    "count, text",
    [(1, "slerp takes exactly 2 models, 1 given"), (3, "slerp takes exactly 2 models, 3 given")],
)
def test_number_of_models_of_a_registered_method(count: int, text: str) -> None:
    assert parse_faults(models=[f"m{i}" for i in range(count)], method="slerp") == {"models": text}


@pytest.mark.parametrize(
    "count, text", [(1, "toy takes 2 to 3 models, 1 given"), (4, "toy takes 2 to 3 models, 4 given")]
)
def test_number_of_models_in_a_range(count: int, text: str) -> None:
    data = minimal(models=[f"m{i}" for i in range(count)], method={"name": "toy", "rate": 0})
    assert faults(lambda: parse_recipe(data, "test", {"toy": Toy})) == {"models": text}


@pytest.mark.parametrize(
    "written, near",
    [
        ("task-arithmetic", "task_arithmetic"),
        ("Task Arithmetic", "task_arithmetic"),
        ("OPCM", "opcm"),
        ("tie", "ties"),
    ],
)
def test_unknown_methods_get_a_suggestion(written: str, near: str) -> None:
    assert parse_faults(method=written) == {"method": f'"{written}" is not a method; did you mean "{near}"?'}
    assert list(parse_faults(method={"name": written, "anything": 1})) == ["method.name"]


def test_an_unknown_method_with_no_near_name_gets_the_list() -> None:
    assert parse_faults(method="quantum")["method"].endswith("; one of " + ", ".join(registry()))


@pytest.mark.parametrize(
    "method, path, text",
    [
        ({}, "method.name", "is missing"),
        ({"alpha": 0.5}, "method.name", "is missing"),
        (["opcm"], "method", "must be a name or a mapping with a name, not a list"),
        ({"name": 3}, "method.name", "must be text, not 3"),
        ({"name": "opcm", "alpha": -1}, "method.alpha", "must be at least 0.0, not -1"),
        ({"name": "opcm", "alpha": float("nan")}, "method.alpha", "must be a finite number, not nan"),
        ({"name": "opcm", "alpha": None}, "method.alpha", "has no value"),
        ({"name": "opcm", "variant": True}, "method.variant", "true is not one of code"),
        ({"name": "opcm", "variant": ["code"]}, "method.variant", "a list is not one of code"),
        (
            {"name": "opcm", "norm": 0},
            "method.norm",
            "must be none, mean, fit, fit-matrix or a positive number, not 0",
        ),
        ({"name": "opcm", "norm": True}, "method.norm", "must be a number, not true"),
        ({"name": "opcm", "norm": "2"}, "method.norm", 'must be a number, not the text "2"; remove the quotes'),
        ({"name": "opcm", "norm": None}, "method.norm", "has no value"),
        ({"name": "opcm", 7: 1}, "method.7", "unknown option of opcm; one of name, alpha, variant, spectral, norm"),
        ({"name": "task_arithmetic", "alpha": 1}, "method.alpha", "unknown option of task_arithmetic"),
    ],
)
def test_faulty_methods(method: Any, path: str, text: str) -> None:
    found = parse_faults(method=method)
    assert list(found) == [path]
    assert found[path].startswith(text)


@pytest.mark.parametrize(
    "options, path, text",
    [
        ({}, "method.rate", "is missing"),
        ({"rate": 2}, "method.rate", "must be at most 1.0, not 2"),
        ({"rate": 0, "steps": 3.0}, "method.steps", "must be a whole number, not 3.0"),
        ({"rate": 0, "steps": True}, "method.steps", "must be a number, not true"),
        ({"rate": 0, "steps": 0}, "method.steps", "must be at least 1, not 0"),
        ({"rate": 0, "fast": 1}, "method.fast", "must be true or false, not 1"),
        ({"rate": 0, "label": 1}, "method.label", "must be text, not 1; quote it"),
        ({"rate": 0, "mode": "rihgt"}, "method.mode", '"rihgt" is not one of left, right; did you mean "right"?'),
        ({"rate": 0, "cap": "x"}, "method.cap", 'must be a number, not the text "x"'),
        ({"rate": 0, "fast": True, "steps": 10}, "method", "toy refuses these options: fast takes at most 9 steps"),
    ],
)
def test_faulty_options(options: dict[str, Any], path: str, text: str) -> None:
    found = faults(lambda: toy(**options))
    assert list(found) == [path]
    assert found[path].startswith(text)


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("base", None, "has no value; give one"),
        ("base", ["a"], "must be text, not a list"),
        ("dtype", "float8_e4m3fn", "has too few bits for a merge without scales of its own"),
        ("dtype", "torch.int8", 'Write "bfloat16", and quantise the result'),
        ("dtype", "FP16", 'did you mean "float16"?'),
        ("dtype", "torch.bfloat16", 'did you mean "bfloat16"?'),
        ("dtype", "double", 'did you mean "float64"?'),
        ("dtype", 16, "16 is not one of float32"),
        ("include", ["a", 3], "item 1 must be text, not 3"),
        ("exclude", [""], "item 0 must not be empty"),
        ("exclude", None, "has no value; give one or remove the key"),
        ("state", True, "must be none, last, all or a positive whole number, not true"),
        ("state", 2.0, "must be none, last, all or a positive whole number, not 2.0"),
        ("state", "al", 'did you mean "all"?'),
        ("push_to", "org/a--b", "is not a repository id"),
        ("push_to", "org/../b", "is not a repository id"),
        ("private", True, "has no effect without push_to"),
        ("trust_remote_code", "true", 'must be true or false, not "true"'),
        ("base_model", "x", 'unknown key; did you mean "base"?'),
        ("alpha", 0.5, "unknown key; options stand under the method, write method: {name: ..., alpha: ...}"),
        ("zzz", 1, "unknown key; one of base, models, method"),
    ],
)
def test_faulty_keys(key: str, value: Any, text: str) -> None:
    found = parse_faults(**{key: value})
    assert list(found) == [key]
    assert text in found[key]


# --- YAML itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, path, words",
    [
        ("base: [a\nmodels: b]:\n", "line 2, column 7", "not valid YAML"),
        ("base: a\n\tmodels: b\n", "line 2, column 1", "found a tab character"),
        ("base: a\n---\nbase: b\n", "line 2, column 1", "a second document begins here"),
        ("base: !!python/object:os.system {}\n", "line 1, column 7", "could not determine a constructor"),
        ("base: !!int x\n", "line 1, column 7", "is not of the type its tag says"),
        ("base: !!bool x\n", "line 1, column 7", "is not of the type its tag says"),
        ("base: !!timestamp x\n", "line 1, column 7", "could not determine a constructor"),
        ("base: *nobody\n", "line 1, column 7", "undefined alias"),
        ("base: a\n[x]: 1\n", "line 2, column 1", "unhashable key"),
        ("base: a\nmodels: \x07\n", "line 2, column 9", "characters are not allowed"),
        ("[" * 1200, "line 1, column 1001", "nesting depth"),
    ],
)
def test_syntax_errors_say_where(tmp_path: Path, text: str, path: str, words: str) -> None:
    found = faults(lambda: load_recipe(write(tmp_path, text)))
    assert list(found) == [path]
    assert words in found[path]


def test_repeated_keys_are_found_at_every_level(tmp_path: Path) -> None:
    text = (
        "base: b\nmodels:\n  - {model: a, weight: 1, weight: 2}\nmethod:\n  name: opcm\n  alpha: 0.1\n  alpha: 0.2\n"
    )
    assert faults(lambda: load_recipe(write(tmp_path, text))) == {
        "models[0].weight": "written twice, in lines 3 and 3; keep one",
        "method.alpha": "written twice, in lines 6 and 7; keep one",
    }


def test_merge_keys_are_not_repeated_keys(tmp_path: Path) -> None:
    text = "base: b\nmodels:\n  - &first {model: a, weight: 2}\n  - {<<: *first, model: c}\nmethod: opcm\n"
    assert load_recipe(write(tmp_path, text)).models == (ModelEntry("a", 2.0), ModelEntry("c", 2.0))


def test_aliases_that_would_explode_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    text = "\n".join([*lines, "base: *a59", "models: [a]", "method: opcm"])
    assert (
        "values once aliases are written out; the limit is"
        in faults(lambda: load_recipe(write(tmp_path, text)))["file"]
    )
    text = "base: a\nmodels: &m [*m]\nmethod: opcm\n"
    assert (
        "an alias in line 2 stands within what it names" in faults(lambda: load_recipe(write(tmp_path, text)))["file"]
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert faults(lambda: load_recipe(tmp_path / "none.yaml")) == {"file": "cannot be read: No such file or directory"}
    assert faults(lambda: load_recipe(tmp_path)) == {"file": "cannot be read: Is a directory"}
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("base: a\nmodels: [é]\n".encode("latin-1"))
    assert faults(lambda: load_recipe(latin)) == {"line 2": "is not UTF-8; save the file as UTF-8"}
    assert faults(lambda: load_recipe(write(tmp_path, "# nothing\n"))) == {"recipe": "is empty"}


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FULL, encoding="utf-8-sig")
    assert load_recipe(path).base == "org/base"


# --- there and back -----------------------------------------------------------------------------------------------


def test_round_trip_of_a_full_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), "test") == recipe


def test_yaml_is_short() -> None:
    method = "method:\n  name: opcm\n  alpha: 0.5\n  variant: code\n  spectral: exact\n  norm: mean\n"
    assert parse_recipe(minimal(), "test").to_yaml() == f"base: org/base\nmodels:\n- org/a\n- org/b\n{method}"


NAMES = st.text(min_size=1, max_size=12).map(str.strip).filter(bool)
FINITE = st.floats(-3.4e38, 3.4e38).filter(lambda x: abs(x) > 1e-200)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, database=None)
@given(
    base=NAMES | st.sampled_from(["no", "1e-3", "null", "1:30", "010", "<<", "=", "~", ".nan", "2024-01-01", "- a"]),
    models=st.lists(NAMES, min_size=1, max_size=4, unique_by=lambda name: name.rstrip("/") or name),
    weight=FINITE,
    scale=FINITE,
    norm=st.sampled_from(["none", "mean"]) | FINITE.map(abs),
    include=st.lists(NAMES, max_size=3),
    state=st.sampled_from(["none", "last", "all", 1, 12]),
)
def test_round_trip_of_any_recipe(
    tmp_path_factory: pytest.TempPathFactory,
    base: str,
    models: list[str],
    weight: float,
    scale: float,
    norm: str | float,
    include: list[str],
    state: str | int,
) -> None:
    entries = [{"model": name, "weight": weight} for name in models]
    method = {"name": "task_arithmetic", "scale": scale, "norm": norm}
    data = {"base": base, "models": entries, "method": method, "include": include, "state": state}
    try:
        recipe = parse_recipe(data, "test")
    except RecipeError as error:
        # control characters, or the base among the models
        assert all("one line" in p.text or "is the base" in p.text for p in error.problems), error
        return
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), "test") == recipe


SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | FINITE | st.text()


@pytest.mark.slow
@settings(max_examples=120, deadline=None, database=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12))
def test_written_yaml_reads_back_equal(data: Any) -> None:
    assert parse_yaml(dump_yaml(data), "test") == (data, [])


# --- flags --------------------------------------------------------------------------------------------------------


def test_flags_alone_make_the_same_recipe_as_a_file(tmp_path: Path) -> None:
    recipe = apply_overrides(
        None,
        base="org/base",
        models=["org/a", "org/b@v2"],
        method="opcm",
        options=["alpha=0.25", "variant = paper"],
        weights=[1, "5e-1"],
        norm="2",
        dtype="bfloat16",
        include=["encoder.*"],
        exclude=["*.position_ids"],
        vocabulary="union",
        state="3",
        output="./merged",
        push_to="org/merged",
        private=True,
        allow_nonfinite=True,
        allow_pickle=True,
        trust_remote_code=True,
    )
    assert recipe == load_recipe(write(tmp_path, FULL))


def test_faulty_flags_come_at_once_and_name_their_origin() -> None:
    def call() -> Recipe:
        return apply_overrides(
            None,
            models=["org/a", "org/a"],
            method="opcm",
            options=["alhpa=1", "alpha", "variant=code", "variant=paper", "norm=mean", "alpha="],
            weights=["1", "x", "nan"],
            dtype="bf16",
            state="some",
        )

    found = faults(call)
    assert found == {
        "weights": "3 given for 2 models; give one a model, in their order",
        "method": 'option "alpha" is not of the form name=value',
        "method.variant": "given twice; keep one",
        "method.norm": "is not an option; it has a flag of its own",
        "base": "is missing",
        "method.alhpa": 'unknown option of opcm; did you mean "alpha"?',
        "method.alpha": "has no value; give one or remove the key",
        "models[1]": '"org/a" is models[0] again; remove one or change its revision',
        "dtype": found["dtype"],
        "state": 'must be none, last, all or a positive whole number, not "some"',
    }
    with pytest.raises(RecipeError, match="^command line: 10 problems"):
        call()


def test_weight_flags_are_checked_like_weights() -> None:
    found = faults(lambda: apply_overrides(None, base="b", models=["a", "c"], method="opcm", weights=["x", ".nan"]))
    assert found == {
        "models[0].weight": 'must be a number, not the text "x"',
        "models[1].weight": "must be a finite number, not nan",
    }


def test_options_without_a_method_are_a_fault_of_the_method() -> None:
    found = faults(lambda: apply_overrides(None, base="b", models=["a"], options=["alpha=1"]))
    assert found == {"method.name": "is missing"}
    assert list(faults(lambda: apply_overrides(None, base="b", models=["a"]))) == ["method"]


def test_a_flag_without_a_value_is_a_fault_and_not_ignored() -> None:
    for text in ("null", ""):
        found = faults(lambda text=text: apply_overrides(None, base="b", models=["a"], method="linear", state=text))
        assert found == {"state": "has no value; give one or remove the key"}


def test_a_flag_that_no_key_has_is_a_fault() -> None:
    found = faults(lambda: apply_overrides(None, base="b", models=["a"], method="linear", dtyp="float32"))
    assert found == {"dtyp": 'unknown key; did you mean "dtype"?'}


def test_flags_override_single_keys(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert apply_overrides(recipe) == recipe
    changed = apply_overrides(recipe, options=["alpha=1e-1"], dtype="float32", private=False, state="none")
    method = MethodChoice("opcm", {"alpha": 0.1, "variant": "paper", "spectral": "exact"}, 2.0)
    assert changed == dataclasses.replace(recipe, method=method, dtype="float32", private=False, state="none")


def test_another_method_drops_the_options_of_the_first(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert apply_overrides(recipe, method="ties").method == MethodChoice(
        "ties", {"density": 0.2, "scale": 1.0, "scope": "tensor"}, "none"
    )
    same = apply_overrides(recipe, method="opcm", norm="none").method
    assert same == MethodChoice("opcm", {"alpha": 0.25, "variant": "paper", "spectral": "exact"}, "none")


def test_models_and_weights_as_flags(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    weighted = apply_overrides(recipe, weights=[2, 3])
    assert weighted.models == (ModelEntry("org/a", 2.0), ModelEntry("org/b@v2", 3.0))
    assert apply_overrides(recipe, models=["x"]).models == (ModelEntry("x", 1.0),)
    assert list(faults(lambda: apply_overrides(recipe, models=["x"], weights=[1, 2]))) == ["weights"]


def test_reading_a_recipe_needs_no_heavy_library(tmp_path: Path) -> None:
    path = write(tmp_path, FULL.replace("push_to: org/merged\nprivate: true\n", ""))
    code = (
        "import sys; from hfmerge.recipe.recipe import load_recipe; load_recipe(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'huggingface_hub') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
