"""The recipe of a merge, read strictly from YAML or from a mapping.

All problems of a recipe are raised together, before anything is downloaded. The planner checks what needs the models
themselves: whether they exist, whether two of them are the same commit, whether their shapes match.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.errors import Problem, RecipeError
from hfmerge.hub.reference import in_subfolder
from hfmerge.recipe import values
from hfmerge.recipe.chat_template import ChatTemplate, chat_template, with_template
from hfmerge.recipe.keys import Declared, jsonable, keys_of, read_key, read_keys
from hfmerge.recipe.learning import Learning, read_learning, restored_learning
from hfmerge.recipe.united import both_united
from hfmerge.recipe.weights import Weight, read_weight, written
from hfmerge.validation.strict_yaml import dump_yaml, read_yaml
from hfmerge.validation.values import Section, show, suggestion, text


if TYPE_CHECKING:
    from hfmerge.methods import MergeMethod


MIXTURE = (
    "this is a recipe of mergekit-moe, which makes one mixture of experts out of models; make that with mergekit-moe, "
    "or list under `models` what is to be merged into `base`"
)


@dataclass(frozen=True)
class ModelEntry:
    """One model to merge.

    Attributes:
        model: reference: `org/name[@revision]`, a folder, an `hf://` URI, or `base+adapter`.
        weight: a number, or `PatternWeights` for numbers by the names of parameters.
        subfolder: the folder of the model's repository or folder that is merged. The reference `org/name/folder` says
            the same.
        alias: what the merge calls the model: the folder of its head, the card, and `unmerge`. Without an alias the
            model is called by its name, and a second model of that name by the name with a number, such as `name-2`.
        subtracted: the model was approximately subtracted from the merge (see `ledger.entry.Material`). A recipe file
            cannot set this.
    """

    model: str
    weight: Weight = 1.0
    subtracted: bool = field(default=False, metadata=Declared(unwritten=True))
    subfolder: str | None = None
    alias: str | None = field(default=None, metadata=Declared(kind=values.model_alias))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as a recipe writes it."""
        data = {"model": self.model, "weight": written(self.weight)}
        return data | {key: name for key in ("subfolder", "alias") if (name := getattr(self, key)) is not None}


@dataclass(frozen=True)
class MethodChoice:
    """A method by name, all its options (defaults filled in) and the norm of its result.

    Attributes:
        name: in the registry of methods.
        options: by name; an option that is unset by default is absent.
        norm: norm of the merged task vector: "none" (the method's own scale), "mean" (the mean of the task vectors'
            norms), a number, "fit" (matrices at the one scale that fits all models best, see `methods.fit`), or
            "fit-matrix" (a scale for each matrix).
    """

    name: str
    options: dict[str, values.Option]
    norm: str | float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as a recipe writes it: the options stand beside `name` and `norm`."""
        return {"name": self.name, **self.options, "norm": self.norm}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Each field declares one key; its reader and its flag follow from it (see `Declared`).

    Attributes:
        base: the model that all others were tuned from: a reference, or `{model: org/name, subfolder: folder}`.
        models: in order of arrival.
        method: with its options.
        dtype: dtype of the output: float32, float16, bfloat16 or float64; None: the base's.
        include, exclude: fnmatch patterns on names of output parameters; empty `include` means all. What is left
            out keeps the base's value.
        vocabulary: "base", "union", or None: vocabularies that differ are an error. "union" needs the united
            tokenizer too, so this and `tokenizer: union` are the same: either gives the other.
        tokenizer, generation_config: "base", or a model of `models`, by its reference or name, whose files the merge
            gets; None: the base's.
        chat_template: as `tokenizer`; or a file `*.jinja` in the folder of the recipe, or its text as `{text: ...}`,
            which the ledger keeps; None: that of the model whose tokenizer the merge gets.
        state: which carried states are kept: "none", "last", "all", or after every k-th model.
        output: folder.
        push_to: repository id on the Hub.
        private: visibility of a new repository; None: the Hub's default for the namespace.
        allow_nonfinite: accept NaN and Inf in the models.
        allow_pickle: read pickled checkpoints.
        trust_remote_code: run code from model repositories, and copy that of the base. This key and `allow_pickle`
            are consents for this run, by the person who gives the recipe. Changes and replays need them again.
        strict_base: refuse an adapter whose configuration names another base than the one it is merged onto, or one
            that cannot be told to be the same. Otherwise this is a warning.
        out_shard_size: most bytes of tensors in a weight file of the output; a larger tensor has its own file. A
            number, or a text such as "5GB", where a GB is 10^9 bytes. None: tensors lie in files as the base's do.
        stream: read weights from the Hub as they are needed instead of downloading them; the result is the same.
        keep_sources: keep a compressed copy of base and models beside the states, and publish it with them, so that
            the merge can be changed after they have vanished.
        learn: how the models' weights are learned before the merge is made; None: they are as given.
        notes: remarks for the user on the conversion from another format; they are not a key of the recipe.
    """

    base: str = field(
        metadata=Declared(
            help="the model that all others were tuned from (default: the recipe's)",
            metavar="MODEL",
            foreign=("base_model",),
            kind=values.model_place,
        )
    )
    models: tuple[ModelEntry, ...]
    method: MethodChoice = field(
        metadata=Declared(help="name of the method, see `hfmerge methods` (default: the recipe's)", metavar="NAME")
    )
    dtype: str | None = field(
        default=None,
        metadata=Declared(
            help="dtype of the output: float32, bfloat16, float16, float64 (default: the base's)",
            choices=values.DTYPES, kind=values.dtype, recorded="always", result=True,
        ),
    )  # fmt: skip
    include: tuple[str, ...] = field(
        default=(),
        metadata=Declared(
            help="merge only parameters with these names (default: all)", metavar="PATTERN",
            recorded="always", stored=values.patterns, result=True,
        ),
    )  # fmt: skip
    exclude: tuple[str, ...] = field(
        default=(),
        metadata=Declared(
            help="keep the base's value of parameters with these names (default: none)", metavar="PATTERN",
            recorded="always", stored=values.patterns, result=True,
        ),
    )  # fmt: skip
    vocabulary: str | None = field(
        default=None,
        metadata=Declared(
            help="how different vocabularies are aligned, by token (default: they are an error)", metavar="base|union",
            choices=values.VOCABULARIES, foreign=("tokenizer_source",), recorded="always", result=True,
        ),
    )  # fmt: skip
    tokenizer: str | None = field(
        default=None,
        metadata=Declared(
            help="the model whose tokenizer the merge gets, base (default), or union: as vocabulary says",
            metavar="base|union|MODEL",
            recorded="set", result=True,
        ),
    )  # fmt: skip
    chat_template: str | ChatTemplate | None = field(
        default=None,
        metadata=Declared(
            help="the model whose chat template the merge gets, base, or a file *.jinja (default: the tokenizer's)",
            metavar="base|MODEL|FILE", kind=chat_template, recorded="set", result=True,
        ),
    )  # fmt: skip
    generation_config: str | None = field(
        default=None,
        metadata=Declared(
            help="the model whose generation config the merge gets, or base (default)", metavar="base|MODEL",
            recorded="set", result=True,
        ),
    )  # fmt: skip
    state: str | int = field(
        default="last",
        metadata=Declared(
            help="which carried states are kept (default: last)", metavar="none|last|all|K",
            kind=values.state, recorded="always",
        ),
    )  # fmt: skip
    output: str | None = field(
        default=None, metadata=Declared(help="new folder for the result (default: none)", metavar="FOLDER")
    )
    push_to: str | None = field(
        default=None,
        metadata=Declared(
            help="repository to publish to (default: none)",
            metavar="REPO_ID",
            kind=values.repo_id,
            foreign=("hub_model_id", "repo_id"),
        ),
    )
    private: bool | None = field(default=None, metadata=Declared(help="make a new repository private"))
    allow_nonfinite: bool = field(
        default=False,
        metadata=Declared(help="accept NaN or Inf in a source", recorded="always", result=True),
    )
    allow_pickle: bool = field(
        default=False,
        metadata=Declared(
            help="read pickled .bin weights in this run; a ledger cannot give this consent", recorded="always"
        ),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=Declared(
            help="run code from the models' repositories in this run; a ledger cannot give this consent",
            recorded="always",
        ),
    )
    strict_base: bool = field(
        default=False,
        metadata=Declared(help="refuse an adapter that names another base, instead of a warning"),
    )
    out_shard_size: int | None = field(
        default=None,
        metadata=Declared(
            help='largest weight file of the output, such as "5GB" (default: files as the base has them)',
            metavar="SIZE", kind=values.shard_size, foreign=("max_shard_size",), recorded="set", result=True,
        ),
    )  # fmt: skip
    stream: bool = field(
        default=False,
        metadata=Declared(help="read weights from the Hub as they are needed, and store only the result"),
    )
    keep_sources: bool = field(
        default=False,
        metadata=Declared(
            help="keep compressed copies of base and models beside the states, readable by all who may read the merge",
            recorded="set",
        ),
    )
    learn: Learning | None = field(default=None, metadata=Declared(recorded="set", stored=restored_learning))
    notes: tuple[str, ...] = field(default=(), compare=False, metadata=Declared(unwritten=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able mapping of all keys. `parse_recipe` reads it back as an equal recipe."""
        return {key.name: jsonable(getattr(self, key.name)) for key in keys_of(Recipe)}

    def to_yaml(self) -> str:
        """The recipe as a YAML file, without the keys at their default, that `load_recipe` reads as an equal one."""
        data = self.to_dict()
        for key in keys_of(Recipe):
            if getattr(self, key.name) == key.default:
                del data[key.name]
        plain = [{"model": entry.model, "weight": 1.0} == entry.to_dict() for entry in self.models]
        data["models"] = [
            entry.model if bare else entry.to_dict() for bare, entry in zip(plain, self.models, strict=True)
        ]
        return dump_yaml(data)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; a mergekit file (it has `merge_method`) is converted, see `Recipe.notes`.

    Raises:
        RecipeError: all problems of the recipe. If the YAML syntax is wrong, only the first error, with line and
            column.
    """
    data, problems = read_yaml(path)
    return check_recipe(data, str(path), problems, None, Path(path).parent)


def parse_recipe(
    data: Mapping[str, Any], origin: str, methods: Mapping[str, type[MergeMethod]] | None = None
) -> Recipe:
    """Check a recipe given as plain data.

    Args:
        data: as YAML or JSON gives it; mergekit's keys are understood too.
        origin: what error messages call the recipe.
        methods: by name; None: `hfmerge.methods.registry()`.

    Raises:
        RecipeError: all problems, each with its dotted path.
    """
    return check_recipe(data, origin, [], methods)


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that somebody made in Python, as plain data for `parse_recipe`, whatever the fields hold.

    Raises:
        RecipeError: fields that cannot be written as a recipe.
    """
    data: dict[str, Any] = {}
    problems: list[Problem] = []
    for key in keys_of(Recipe):
        try:
            data[key.name] = jsonable(getattr(recipe, key.name))
        except (AttributeError, TypeError, ValueError) as error:
            problems.append(Problem(key.name, f"cannot be written as a recipe ({error})"))
    if problems:
        raise RecipeError(problems)
    return data


def read_models(given: Any, origin: str) -> tuple[ModelEntry, ...]:
    """Models that join a merge: a reference or a model of a recipe, or a list of them.

    Raises:
        RecipeError: all problems, each with its dotted path.
    """
    alone = isinstance(given, str | os.PathLike | Mapping | ModelEntry)
    listed = [given] if alone or not isinstance(given, Iterable) else list(given)
    problems: list[Problem] = []
    entries, _ = _entries(Section({}, "", problems), [jsonable(item) for item in listed], "", None)
    if not entries:
        problems.append(Problem("models", "must not be empty; name at least one model"))
    if problems:
        raise RecipeError(problems, origin)
    return entries


def check_recipe(
    data: Any,
    origin: str,
    problems: list[Problem],
    methods: Mapping[str, type[MergeMethod]] | None,
    folder: Path | None = None,
) -> Recipe:
    """`parse_recipe` after a reader that may have found problems of its own, which are raised with the others.

    Args:
        folder: of the recipe's file, if it is one.
    """
    notes: list[str] = []
    if not isinstance(data, Mapping):
        problems.append(Problem("recipe", "is empty" if data is None else f"must be a mapping, not {show(data)}"))
        raise RecipeError(problems, origin)
    if "experts" in data or "gate_mode" in data:
        problems.append(Problem("experts", MIXTURE))
        raise RecipeError(problems, origin)
    if "merge_method" in data:
        from hfmerge.recipe.mergekit.convert import convert

        try:
            data, notes = convert(data, origin)
        except RecipeError as error:
            raise RecipeError([*problems, *error.problems], origin) from error
    if methods is None:
        from hfmerge.methods import registry

        methods = registry()
    recipe = _recipe(Section(data, "", problems), methods, folder)
    if problems:
        raise RecipeError(problems, origin, recipe)
    return dataclasses.replace(recipe, notes=tuple(notes))


def _recipe(top: Section, methods: Mapping[str, type[MergeMethod]], folder: Path | None) -> Recipe:
    """Read all keys; what is returned is of use only if no problem was added."""
    named = top.data.get("method")
    name = named.get("name") if isinstance(named, Mapping) else named
    chosen = methods.get(name.strip()) if isinstance(name, str) else None
    keys = {key.name: key for key in keys_of(Recipe)}
    foreign = {word: name for name, key in keys.items() for word in key.declared.get("foreign", ())}
    options = [option for method in methods.values() for option in values.option_names(method)]

    def hint(key: str) -> str:
        if key in (*options, "norm"):
            return f"; options stand under the method, write method: {{name: ..., {key}: ...}}"
        return f'; did you mean "{foreign[key]}"?' if key in foreign else ""

    top.refuse_unknown(keys, "key", hint)
    base = read_key(top, keys["base"]) or ""
    if base and (problem := values.base_problem(base)) is not None:
        top.report("base", problem)
    method = _method(top, chosen, methods)
    models = _models(top, base, chosen)
    learn = read_learning(
        top.data.get("learn"), top, method.name, [one for one, kind in methods.items() if kind.learnable]
    )
    if learn is not None and any(entry.weight != 1.0 for entry in models):
        top.report("learn", "finds the models' weights; remove those given (`start` says where learning begins)")
    if learn is not None and method.norm != "none":
        top.report("learn", "finds what norm the merge shall have; remove `norm`")
    apart: dict[str, Any] = {"base": base, "models": models, "method": method, "learn": learn}
    rest = read_keys(top, [key for name, key in keys.items() if name not in apart])
    if rest["private"] is not None and top.data.get("push_to") is None:
        top.report("private", "has no effect without push_to; add push_to or remove it")
    both_united(rest, top)
    with_template(rest, top, folder)
    return Recipe(**apart, **rest)


def _method(top: Section, chosen: type[MergeMethod] | None, methods: Mapping[str, type[MergeMethod]]) -> MethodChoice:
    nothing = MethodChoice("", {}, "none")
    value = top.data.get("method")
    if value is None:
        top.report("method", f"is missing; one of {', '.join(methods)}")
        return nothing
    if not isinstance(value, str | Mapping):
        top.report("method", f"must be a name or a mapping with a name, not {show(value)}")
        return nothing
    section = Section({"name": value} if isinstance(value, str) else value, "method", top.problems)
    name = section.read("name", text, "", required=True)
    if chosen is None:
        section.read("norm", values.norm, "none")
        if name:
            from hfmerge.methods import faulty

            why = faulty().get(name)
            remedy = f"; {why}" if why else suggestion(name, methods) or f"; one of {', '.join(methods)}"
            top.report("method" if isinstance(value, str) else "method.name", f"{show(name)} is not a method{remedy}")
        return nothing
    section.refuse_unknown(("name", *values.option_names(chosen), "norm"), f"option of {name}")
    options = values.read_options(section, chosen)
    return MethodChoice(name, options, section.read("norm", values.norm, chosen.default_norm))


def _models(top: Section, base: str, chosen: type[MergeMethod] | None) -> tuple[ModelEntry, ...]:
    """The models, each checked by itself, then all together against each other, the base and the method."""
    given = top.data.get("models")
    if not isinstance(given, list | tuple) or not given:
        what = "is missing" if given is None else f"must be a list, not {show(given)}"
        what = "must not be empty" if isinstance(given, list | tuple) else what
        top.report("models", f"{what}; list the models in their order of arrival")
        return ()
    entries, faulty_weights = _entries(top, given, base, chosen)
    if chosen is not None and (problem := values.count_problem(len(given), chosen)):
        top.report("models", problem)
    if not faulty_weights and (problem := values.weights_problem([entry.weight for entry in entries], chosen)):
        top.report("models", problem)
    return entries


def _entries(
    top: Section, given: Sequence[Any], base: str, chosen: type[MergeMethod] | None
) -> tuple[tuple[ModelEntry, ...], bool]:
    """The models, each checked by itself and against the base, and whether a weight is faulty."""
    entries: list[ModelEntry] = []
    faulty_weights = False
    first_seen: dict[str, int] = {}
    for i, item in enumerate(given):
        section = Section(item if isinstance(item, Mapping) else {"model": item}, f"models[{i}]", top.problems)
        section.refuse_unknown([key.name for key in keys_of(ModelEntry)], "key")
        model = section.read("model", text, "", required=True)
        inside = section.read("subfolder", text, None, nullable=True)
        if model and inside is not None:
            model = section.read("subfolder", partial(_inside, model), model)
        alias = section.read("alias", values.model_alias, None, nullable=True)
        weight = read_weight(section, "weight") if "weight" in section.data else 1.0
        faulty_weights |= weight is None
        entries.append(ModelEntry(model, 1.0 if weight is None else weight, alias=alias))
        if not model:
            continue
        first = first_seen.setdefault(_identity(model), i)
        if first != i:
            top.report(f"models[{i}]", f"{show(model)} is models[{first}] again; remove one or change its revision")
        if base and _identity(model) == _identity(base) and chosen and not chosen.of_weights:
            top.report(f"models[{i}]", f"{show(model)} is the base, whose task vector is zero; remove it")
    return tuple(entries), faulty_weights


def _inside(model: str, subfolder: object) -> str:
    return in_subfolder(model, text(subfolder))


def _identity(model: str) -> str:
    """A key that two references share if they name the same model, before anything is resolved."""
    return model.rstrip("/") or model
