"""Makes the plan of a merge from configuration files and headers alone, before weights are downloaded.

`make_plan` is pure in the weights: it reads no tensor. Read this file first, then `engine/executor.py`,
then `methods/opcm.py`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.behaviour import CHOICES, files_of, template, unlike_base
from hfmerge.checkpoint.custom_code import check_allowed, own_code
from hfmerge.checkpoint.delta import Delta
from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.headers import FLOATS
from hfmerge.checkpoint.heads import Head
from hfmerge.checkpoint.layout import Layout
from hfmerge.checkpoint.lora import NO_ENDS, Ends
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.side_files import side_files
from hfmerge.checkpoint.streaming.session import Streaming, leave_session
from hfmerge.checkpoint.vocabulary import MergedVocabulary, align
from hfmerge.checkpoint.writer import MOST_SHARDS, SINGLE, Slot, shard_names, split_slots
from hfmerge.engine.adapter_chain import below_adapters
from hfmerge.engine.estimate import with_estimate
from hfmerge.engine.model_match import Layouts, incomplete_base, match_source, some
from hfmerge.engine.plan import SAFETENSORS_DTYPES, BaseLayout, Estimate, Param, Plan, Prior, folder_of
from hfmerge.engine.untying import TIE_FLAG, one_sided, untie
from hfmerge.errors import HfMergeError, Problem, RecipeError, UnsupportedError
from hfmerge.hub.reference import distinct_names
from hfmerge.methods import MergeMethod, faulty, registry
from hfmerge.recipe.chat_template import SUFFIX, ChatTemplate
from hfmerge.recipe.recipe import ModelEntry, Recipe
from hfmerge.recipe.united import UNION
from hfmerge.recipe.values import FITS, base_problem, count_problem, option_names, sum_problem, weights_problem
from hfmerge.recipe.weights import PatternWeights, read_weight, written
from hfmerge.task_vector import WHOLE
from hfmerge.validation.values import Section, show


def build_method(recipe: Recipe) -> MergeMethod:
    """The recipe's method with its options.

    Raises:
        UnsupportedError: the ledger names a method that is not installed, or options that it does not have.
    """
    kind = registry().get(recipe.method.name)
    if kind is None or not {*recipe.method.options} <= {*option_names(kind)}:
        options = ", ".join(recipe.method.options)
        raise UnsupportedError(
            f"the method {show(recipe.method.name)} with the options {show(options)} is not here; "
            "install the version of hfmerge, or the package, that it was merged with."
        )
    return kind(**recipe.method.options)


def make_plan(
    recipe: Recipe,
    *,
    prior: Prior | None = None,
    leaving: Sequence[ModelEntry] = (),
    origin: str = "recipe",
    on_source: Callable[[Model], object] | None = None,
    code_was_run: bool = False,
    copies: Mapping[str, Path] | None = None,
    faults: Sequence[Problem] = (),
) -> Plan:
    """Work out a merge from headers.

    Args:
        recipe: a recipe whose form is checked already.
        prior: carried state to continue from; its models are not read.
        leaving: models that are subtracted from `prior`, with the weights they were added with.
        origin: name of the recipe in errors.
        on_source: called with base and models once all are described, before the slow part of planning.
        code_was_run: the ledger of a merge that is planned again says that code of its models was run. A model with
            code of its own that `recipe` does not trust is then a problem: without this code the merge differs.
        copies: see `pin`.
        faults: problems of the recipe. With any, no plan is made, and only the sources that it names are checked.

    Returns:
        The plan. Its recipe holds only the consents that the sources needed. The ledger records these.

    Raises:
        RecipeError: all problems of base and models at once.
    """
    warnings: list[str] = list(recipe.notes)
    streaming = Streaming() if recipe.stream else None
    places, base, sources, problems = _described(recipe, leaving, streaming, copies, faults, code_was_run)
    layouts = Layouts(recipe.trust_remote_code)
    _check_duplicates(sources[: len(recipe.models)], problems)
    if on_source is not None and not problems:
        for source in filter(None, (base, *sources)):
            on_source(source)
    known = _base_layout(layouts, base, sources, problems, warnings)
    if known is None:
        raise RecipeError([*problems, *_layout_problems(layouts, places, sources)], origin)
    base, layout, matched = _with_ends(recipe, *known, layouts, sources)
    problems += [Problem(places[i], text) for i, text in matched.problems]
    warnings += matched.warnings
    if problems:
        raise RecipeError(problems, origin)
    whole, gone = matched.deltas[: len(recipe.models)], matched.deltas[len(recipe.models) :]
    vocabulary = _vocabulary(recipe, base, layout, whole, matched.sizes, leaving=bool(gone), origin=origin)
    method = build_method(recipe)
    params = _params(recipe, base, layout, whole, gone, vocabulary, warnings, origin)
    if not any(param.touched for param in params):
        raise RecipeError([Problem("models", "no model changes any parameter that is merged")], origin)
    _check_beside(params, whole, origin)
    keep = _kept_states(recipe, method, len(whole), prior.count if prior else 0)
    chosen = _chosen(recipe, whole, vocabulary, origin)
    needed = _as_needed(recipe, base, whole, chosen)
    differing = tuple(unlike_base(base.snapshot, delta.source.snapshot) for delta in whole)
    warnings += _unlike([delta.source for delta in whole], differing, chosen, vocabulary)
    of_base = BaseLayout(layout.architecture, layout.tied, layout.missing, layout.unexpected)
    plan = Plan(
        needed, method, base, of_base, tuple(whole), params, tuple(matched.heads), vocabulary,
        _side_files(recipe, base, params), keep, prior, Estimate(0, 0, 0, 0, 0, 0, 0, 0.0), tuple(warnings),
        tuple(gone), tuple(entry.weight for entry in leaving), matched.untied, chosen, differing,
    )  # fmt: skip
    plan = with_estimate(replace(plan, warnings=(*plan.warnings, *_weights_that_meet(plan, origin))))
    if streaming is not None:
        leave_session(streaming)
    return plan


def _described(
    recipe: Recipe,
    leaving: Sequence[ModelEntry],
    streaming: Streaming | None,
    copies: Mapping[str, Path] | None,
    faults: Sequence[Problem],
    code_was_run: bool,
) -> tuple[list[str], Model | None, list[Model | None], list[Problem]]:
    """Keys of the models in errors; the base; all models, and then those that leave; and what is wrong with them.

    Args:
        streaming, copies, faults, code_was_run: as of `make_plan`.
    """
    problems = list(faults) or _form(recipe)
    base: Model | None = None
    shared: dict[str, Any] = {"allow_pickle": recipe.allow_pickle, "streaming": streaming, "copies": copies}
    try:
        base = describe(recipe.base, **shared) if recipe.base else None
        if base is not None and base.kind != "full" and base_problem(recipe.base) is not None:
            problems.append(Problem("base", f"{base_problem(recipe.base)}."))
        elif base is not None and base.kind != "full":
            problems.append(
                Problem("base", f"{base.snapshot.label} is an adapter; name the full model it was trained on.")
            )
    except HfMergeError as error:
        problems.append(Problem("base", str(error)))
    places = [*(f"models[{i}]" for i in range(len(recipe.models))), *(f"leaving[{j}]" for j in range(len(leaving)))]
    files = () if problems else build_method(recipe).files()
    sources: list[Model | None] = []
    for place, entry in zip(places, (*recipe.models, *leaving), strict=True):
        try:
            named = entry.model  # not where the recipe's own fault is that it names none
            sources.append(describe(named, base=base, beside=files, **shared) if named else None)
        except HfMergeError as error:
            problems.append(Problem(place, str(error)))
            sources.append(None)
    if code_was_run and not recipe.trust_remote_code:
        problems += _code_problems(("base", *places), (base, *sources), base)
    return places, base, _with_names(recipe.models, sources, problems), problems


def _base_layout(
    layouts: Layouts,
    base: Model | None,
    sources: Sequence[Model | None],
    problems: list[Problem],
    warnings: list[str],
) -> tuple[Model, Layout] | None:
    """A full base and what its stored tensors mean; None and a problem if nobody knows."""
    if base is None or base.kind != "full":
        return None
    try:
        layout = layouts.of(base)
    except HfMergeError as error:
        problems.append(Problem("base", str(error)))
        return None
    try:
        fault, remark = incomplete_base(base, layout, layouts, sources)
    except HfMergeError:  # of a model, which is reported where it is matched
        return base, layout
    problems += [Problem("base", fault)] if fault else []
    warnings += [remark] if remark else []
    return base, layout


def _layout_problems(layouts: Layouts, places: Sequence[str], sources: Sequence[Model | None]) -> Iterator[Problem]:
    """Models whose layout nobody knows, such as those with code of their own. It needs no base to say so."""
    for place, source in zip(places, sources, strict=True):
        try:
            if source is not None and source.kind == "full":
                layouts.of(source)
        except HfMergeError as error:
            yield Problem(place, str(error))


@dataclass
class _Matched:
    """All models in the base's layout.

    Attributes:
        deltas: of the models that fit.
        heads: index of a model that has a head, and the head.
        sizes: for each model, the size of its vocabulary where it differs.
        problems: why models do not fit, each with the model's index.
        untied: indices of the models for which the base was untied.
    """

    deltas: list[Delta] = field(default_factory=list)
    heads: list[tuple[int, Head]] = field(default_factory=list)
    sizes: list[int | None] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untied: tuple[int, ...] = ()


def _matched(
    recipe: Recipe,
    base: Model,
    layout: Layout,
    layouts: Layouts,
    sources: Sequence[Model | None],
    ends: Ends = NO_ENDS,
) -> _Matched:
    found = _Matched()
    for i, source in enumerate(sources):
        found.sizes.append(None)
        if source is None:
            continue
        try:
            delta, head, size = match_source(recipe, base, layouts, layout, source, found.warnings, ends)
        except HfMergeError as error:
            found.problems.append((i, str(error)))
            continue
        found.sizes[i] = size
        found.deltas.append(delta)
        if head is not None and i < len(recipe.models) and not recipe.models[i].subtracted:
            found.heads.append((i, head))
    below = below_adapters(base, sources)
    found.problems += below.problems
    found.warnings += below.warnings
    for one in (base, *sources):
        if one is not None and one.pickled:
            found.warnings.append(
                f"{one.snapshot.label}: pickled weights have no header, so the file was fetched to read it."
            )
    return found


def _with_ends(
    recipe: Recipe, base: Model, layout: Layout, layouts: Layouts, sources: Sequence[Model | None]
) -> tuple[Model, Layout, _Matched]:
    """All models in the layout of the base, which is untied if a model changes one end of a tie alone."""
    found = _matched(recipe, base, layout, layouts, sources)
    if found.problems:
        return base, layout, found
    merged = found.deltas[: len(recipe.models)]
    untied = one_sided(merged, lambda key: is_merged(recipe, key))
    if not untied:
        return base, layout, found
    names = list(dict.fromkeys(name for i in untied for name in merged[i].apart))
    try:
        other = untie(base, layout, layouts, names)
    except UnsupportedError as error:
        found.problems.append((untied[0], str(error)))
        return base, layout, found
    found = _matched(recipe, other.base, other.layout, layouts, sources, other.ends)
    for i in untied:
        found.warnings.append(
            f"{merged[i].source.snapshot.label} changes {some(merged[i].apart)} apart from the weight that the base "
            f"ties it to; the merge has a tensor for each, and `{TIE_FLAG}: false`."
        )
    return other.base, other.layout, replace(found, untied=untied)


def _vocabulary(
    recipe: Recipe,
    base: Model,
    layout: Layout,
    models: Sequence[Delta],
    sizes: Sequence[int | None],
    *,
    leaving: bool,
    origin: str,
) -> MergedVocabulary | None:
    """How the rows of different vocabularies are aligned; None if all models have the base's vocabulary.

    Raises:
        RecipeError: they cannot be aligned.
    """
    if all(size is None for size in sizes):
        return None
    if leaving:
        # rows are found by the tokens of the models that are in the merge
        raise RecipeError([Problem("leaving", "models of differing vocabularies are merged again instead")], origin)
    if recipe.vocabulary is None:
        return None
    rows = {layout.shapes[key][axis] for key, axis in layout.vocab_axis.items()}
    try:
        marked = recipe.tokenizer == UNION  # ledgers of older merges do not say so
        return align(recipe.vocabulary, base, min(rows), [delta.source for delta in models], sizes, marked=marked)
    except HfMergeError as error:
        raise RecipeError([Problem("vocabulary", str(error))], origin) from error


def _code_problems(places: Sequence[str], sources: Sequence[Model | None], base: Model | None) -> Iterator[Problem]:
    """Models that bring code of their own, which the recipe does not allow to run."""
    for place, source in zip(places, sources, strict=True):
        try:
            if source is not None:
                check_allowed(source, whole=source is base)
        except HfMergeError as error:
            yield Problem(place, str(error))


def _side_files(recipe: Recipe, base: Model, params: Sequence[Param]) -> tuple[str, ...]:
    """Files of the base that are copied; those of modules that are merged are written."""
    written = {param.file for param in params}
    every = side_files(base.snapshot, remote_code=recipe.trust_remote_code)
    return tuple(name for name in every if name not in written)


def _as_needed(recipe: Recipe, base: Model, deltas: Sequence[Delta], chosen: Mapping[str, int]) -> Recipe:
    """The recipe without a trust that nothing needed, so that what is recorded of it follows from the sources."""
    models = [one for delta in deltas for one in (delta.source, delta.source.beneath) if one is not None]
    code = bool(own_code(base, whole=True)) or any(own_code(one, whole=False) for one in models)
    pickled = any(one.pickled for one in (base, *models))
    # a ledger knows a model by its name, and never by a path
    names: dict[str, Any] = {
        choice: (recipe.models[i].alias or deltas[i].source.name) if i >= 0 else "base" for choice, i in chosen.items()
    }
    return replace(
        recipe,
        **names,
        trust_remote_code=recipe.trust_remote_code and code,
        allow_pickle=recipe.allow_pickle and pickled,
    )


def _form(recipe: Recipe) -> list[Problem]:
    """What a recipe file is checked for as well, since a changed merge is no file: method, models and weights."""
    weights = [entry.weight for entry in recipe.models]
    method = registry().get(recipe.method.name)
    if method is None:
        return [
            Problem(
                "method.name",
                f"{recipe.method.name} is not a method here; "
                + faulty().get(recipe.method.name, "install the package that brings it"),
            )
        ]
    faults: list[Problem] = []
    for i, weight in enumerate(weights):
        read_weight(Section({"weight": written(weight)}, f"models[{i}]", faults), "weight")
    if faults:
        return faults
    found = [count_problem(len(weights), method), weights_problem(weights, method) if weights else None]
    problems = [Problem("models", text) for text in found if text is not None]
    if recipe.stream and recipe.keep_sources:
        text = "copies of the sources are kept, which are read whole for it; leave stream out"
        problems.append(Problem("stream", text))
    return problems


def _check_duplicates(sources: Sequence[Model | None], problems: list[Problem]) -> None:
    seen: dict[tuple[Any, ...], int] = {}
    for i, source in enumerate(sources):
        if source is None:
            continue
        under = source.beneath.snapshot if source.beneath else None
        mark = (source.name, source.snapshot.commit, source.snapshot.folder, under and (under.name, under.commit))
        if mark in seen:
            problems.append(
                Problem(f"models[{i}]", f"{source.snapshot.label} is models[{seen[mark]}] again; list it once.")
            )
        seen.setdefault(mark, i)


def _with_names(
    entries: Sequence[ModelEntry], sources: Sequence[Model | None], problems: list[Problem]
) -> list[Model | None]:
    """The sources, each with what it is called; an alias must be nobody else's name, since it names a model to remove.

    Those that leave come after those of `entries`, and keep their own names.
    """
    result = list(sources)
    own = [
        (i, entry, source)
        for i, (entry, source) in enumerate(zip(entries, sources, strict=False))
        if source is not None
    ]
    names = [entry.alias or source.name for _, entry, source in own]
    marks = [
        (i, name.replace("/", "--").lower()) for i, entry, source in own for name in (entry.alias or "", source.name)
    ]
    for (i, entry, source), called in zip(own, distinct_names(names), strict=True):
        if called != source.name:
            result[i] = replace(source, called=called)
        if entry.alias is None:
            continue
        same = next((j for j, mark in marks if j != i and mark == entry.alias.lower()), None)
        if same is not None:
            text = f"alias {show(entry.alias)} is the name of models[{same}]; choose another."
            problems.append(Problem(f"models[{i}].alias", text))
    return result


def _params(
    recipe: Recipe,
    base: Model,
    layout: Layout,
    deltas: Sequence[Delta],
    leaving: Sequence[Delta],
    vocabulary: MergedVocabulary | None,
    warnings: list[str],
    origin: str,
) -> tuple[Param, ...]:
    """One entry per tensor of the base, in stored order: the output's keys are the base's keys."""
    slots = _slots(recipe, base, layout, vocabulary)
    files = _files(recipe, base, slots, origin)
    elementwise = build_method(recipe).needs == "elements" and recipe.method.norm not in FITS
    params = []
    for key, entry in base.tensors.items():
        axis, file, slot = layout.vocab_axis.get(key), files[key], slots[key]
        inside = is_merged(recipe, key)
        if key in layout.tied:
            params.append(Param(key, file, slot, "tied", owner=layout.tied[key]))
        elif entry.dtype not in FLOATS or not inside or 0 in entry.shape:  # nothing can be merged of no elements
            params.append(Param(key, file, slot, "copy", vocab_axis=axis))
        else:
            ranks = tuple(delta.rank(key) for delta in deltas)
            leaving_ranks = tuple(delta.rank(key) for delta in leaving)
            # a method of single elements ignores the matrices inside a tensor, unless `norm` fits their scale
            blocks = (WHOLE,) if elementwise else layout.blocks[key]
            params.append(Param(key, file, slot, "merge", None, blocks, ranks, axis, leaving_ranks))
    known = [*base.tensors, *(name for delta in deltas for name in delta.apart)]
    warnings.extend(
        f"pattern {pattern!r} matches no parameter."
        for pattern in dict.fromkeys((*recipe.include, *recipe.exclude))
        if not any(fnmatch.fnmatchcase(key, pattern) for key in known)
    )
    return tuple(params)


def _slots(recipe: Recipe, base: Model, layout: Layout, vocabulary: MergedVocabulary | None) -> dict[str, Slot]:
    """Tensor of the output -> its dtype and shape."""
    slots = {}
    for key, entry in base.tensors.items():
        dtype, shape, axis = entry.dtype, entry.shape, layout.vocab_axis.get(key)
        if entry.floating and recipe.dtype is not None:
            dtype = SAFETENSORS_DTYPES[recipe.dtype]
        if vocabulary is not None and vocabulary.added and axis is not None:
            shape = (*shape[:axis], vocabulary.size, *shape[axis + 1 :])
        slots[key] = Slot(dtype, shape)
    return slots


def _files(recipe: Recipe, base: Model, slots: Mapping[str, Slot], origin: str) -> dict[str, str]:
    """Tensor of the output -> its file: grouped as in the base, or in stored order up to the size that is asked for.

    Raises:
        RecipeError: more files than a model may have.
    """
    inside = {key: f"{folder_of(base.tensors[key].file)}{SINGLE}" for key in slots if base.is_of_module(key)}
    own = {key: slot for key, slot in slots.items() if key not in inside}
    size = recipe.out_shard_size
    if size is None:
        names = shard_names(sorted({base.tensors[key].file for key in own}))
        return {**inside, **{key: names[base.tensors[key].file] for key in own}}
    divided = split_slots(own, size)
    count = len(set(divided.values()))
    if count > MOST_SHARDS:
        least = sum(slot.nbytes for slot in own.values()) // MOST_SHARDS + 1
        text = f"gives {count} files, and a model may have {MOST_SHARDS}; choose more than {least} bytes"
        raise RecipeError([Problem("out_shard_size", text)], origin)
    return {**inside, **divided}


def is_merged(recipe: Recipe, key: str) -> bool:
    """Whether the recipe's patterns let models change a parameter."""
    inside = not recipe.include or any(fnmatch.fnmatchcase(key, pattern) for pattern in recipe.include)
    return inside and not any(fnmatch.fnmatchcase(key, pattern) for pattern in recipe.exclude)


def _chosen(
    recipe: Recipe, deltas: Sequence[Delta], vocabulary: MergedVocabulary | None, origin: str
) -> dict[str, int]:
    """Index of the model that each choice of the recipe names, -1 for the base.

    Raises:
        RecipeError: no model of the merge, or one without such files; a tokenizer beside a united vocabulary.
    """
    found: dict[str, int] = {}
    problems = []
    names = [delta.source.called or delta.source.name for delta in deltas]
    plain = [delta.source.name for delta, entry in zip(deltas, recipe.models, strict=True) if entry.alias is None]
    for choice in CHOICES:
        wanted = getattr(recipe, choice)
        if wanted is None or isinstance(wanted, ChatTemplate) or (choice, wanted) == ("tokenizer", UNION):
            continue
        at = named_model(wanted, recipe.models, [delta.source for delta in deltas])
        if at is None:
            text = f"{show(wanted)} is neither base nor a model of the merge: {', '.join(names)}"
            file = f"; the name of a file ends in {SUFFIX}" if choice == "chat_template" else ""
            problems.append(Problem(choice, text + file))
        elif at >= 0 and not (
            files_of(choice, deltas[at].source.snapshot)
            or (choice == "chat_template" and template(deltas[at].source.snapshot) is not None)
        ):
            problems.append(Problem(choice, f"{deltas[at].source.snapshot.label} has none"))
        elif at >= 0 and recipe.models[at].alias is None and plain.count(deltas[at].source.name) > 1:
            text = f"{deltas[at].source.name} is the name of several models; give this one an alias"
            problems.append(Problem(choice, text))
        elif choice == "tokenizer" and vocabulary is not None and vocabulary.added:
            problems.append(Problem(choice, "the vocabularies are united, and so is the tokenizer; leave it out"))
        else:
            found[choice] = at
    if problems:
        raise RecipeError(problems, origin)
    return found


def named_model(wanted: str, entries: Sequence[ModelEntry], sources: Sequence[Model]) -> int | None:
    """Index of the model with a reference or a name, -1 for the word base, None for no model."""
    if wanted == "base":
        return -1
    pairs = enumerate(zip(entries, sources, strict=True))
    hits = [
        i for i, (entry, source) in pairs if wanted in (entry.model, entry.alias, source.name, source.snapshot.label)
    ]
    return hits[0] if len(hits) == 1 else None


def _unlike(
    models: Sequence[Model],
    differing: Sequence[tuple[str, ...]],
    chosen: Mapping[str, int],
    vocabulary: MergedVocabulary | None,
) -> Iterator[str]:
    """One line for each model that is used otherwise than the base, and whose files the merge does not get."""
    united = vocabulary is not None and vocabulary.added
    choices = [choice for choice in CHOICES if not united or choice != "tokenizer"]
    for i, (model, words) in enumerate(zip(models, differing, strict=True)):
        if words and i not in chosen.values():
            keys = " or ".join(f"`{choice}: {model.name}`" for choice in choices)
            yield (
                f"{model.snapshot.label} is used otherwise than the base: {', '.join(words)}. The merge has what the "
                f"base has; choose its own with {keys}."
            )


def _check_beside(params: Sequence[Param], deltas: Sequence[Delta], origin: str) -> None:
    """Files beside the models' weights hold a tensor for every parameter that changes.

    Raises:
        RecipeError: names the first tensor of each file that is missing, or of another shape or no floating one.
    """
    problems = []
    for i, delta in enumerate(deltas):
        for file, entries in delta.source.beside.items():
            for param in params:
                entry, shape = entries.get(param.key), param.slot.shape
                if not param.touched or (entry is not None and entry.shape == shape and entry.floating):
                    continue
                what = "is missing" if entry is None else f"is {entry.dtype} of shape {list(entry.shape)}"
                text = f"{delta.source.snapshot.label}: {file}: {param.key} of shape {list(shape)} {what}"
                problems.append(Problem(f"models[{i}]", text))
                break
    if problems:
        raise RecipeError(problems, origin)


def _weights_that_meet(plan: Plan, origin: str) -> list[str]:
    """Warnings on weights by pattern; like errors in them, they need the names of the parameters.

    Raises:
        RecipeError: the method divides by the sum of the weights, and it is zero where some of them meet.
    """
    merged = [param for param in plan.params if param.touched]
    problems: dict[tuple[float, ...], Problem] = {}
    for param in merged:
        weights = plan.weights_of(param)
        text = sum_problem(weights, type(plan.method))
        if text is not None:
            problems.setdefault(weights, Problem("models", f"in {param.key} {text}"))
    if problems:
        raise RecipeError(list(problems.values()), origin)
    warnings = []
    for i, entry in enumerate(plan.recipe.models):
        if isinstance(entry.weight, PatternWeights):
            unused = entry.weight.unused(param.key for param in merged)
            warnings += [f"pattern {one!r} of the weight of models[{i}] counts for no parameter." for one in unused]
    return warnings


def _kept_states(recipe: Recipe, method: MergeMethod, count: int, start: int) -> tuple[int, ...]:
    """After how many models a state is written; a run that continues after `start` models has only the later ones.

    Of an additive fold the last one is as good as all: any model leaves it. Where weights are learned every change of
    the models changes all weights, so no state would serve.
    """
    if recipe.state == "none" or recipe.learn is not None or not method.is_fold:
        return ()
    if recipe.state == "last" or method.additive:
        return (count,)
    every = 1 if recipe.state == "all" else int(recipe.state)
    return tuple(sorted({*(kept for kept in range(every, count + 1, every) if kept > start), count}))
