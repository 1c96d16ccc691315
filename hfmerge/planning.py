"""The plan: everything a merge will do, worked out from configuration files and headers alone, before any download.

`make_plan` is pure in the weights: it reads no tensor. Reading order of the whole system: this file, `execute.py`,
`methods/opcm.py`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfmerge.asking import hub_api, hub_errors
from hfmerge.blockstore import MEMORY
from hfmerge.checkpoint.adapters import PREFIX, AdapterMap, map_adapter
from hfmerge.checkpoint.deltas import Delta, adapter_delta, full_delta
from hfmerge.checkpoint.heads import Head, adapter_head, full_head
from hfmerge.checkpoint.names import Layout, Origin, match
from hfmerge.checkpoint.names import describe as describe_layout
from hfmerge.checkpoint.remembered import relevant
from hfmerge.checkpoint.sidefiles import side_files
from hfmerge.checkpoint.vocabulary import Vocabulary, align, same_tokens
from hfmerge.checkpoint.writer import Slot, shard_names
from hfmerge.describing import describe
from hfmerge.digest import canonical_json
from hfmerge.errors import (
    CorruptFileError,
    HfMergeError,
    Problem,
    RecipeError,
    ShapeError,
    SourceError,
    UnsupportedError,
)
from hfmerge.fetching import cached
from hfmerge.methods import FoldMethod, JointMethod, MergeMethod, registry
from hfmerge.pool import AHEAD, core_count
from hfmerge.recipe import Recipe
from hfmerge.recipe_values import count_problem, weights_problem
from hfmerge.source import FLOATS, Source
from hfmerge.streaming import Streaming
from hfmerge.taskvector import WHOLE, Block


DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
DTYPE_NAMES = {short: long for long, short in DTYPES.items()}
IMPORT_BYTES = 450_000_000
"""Resident memory of the libraries, measured after importing torch and transformers."""


@dataclass(frozen=True)
class Param:
    """One tensor of the output.

    Attributes:
        key: stored key, the base's.
        file: output file.
        slot: dtype and shape in the output.
        mode: "merge", "copy" (the base's value, cast to the output's dtype if floating), or "tied" (the value of
            `owner`).
        owner: the parameter a tied copy follows.
        blocks: what methods see.
        ranks: per model, rank of its change: 0 none, None dense.
        vocab_axis: axis with one row per token, if any.
    """

    key: str
    file: str
    slot: Slot
    mode: str
    owner: str | None = None
    blocks: tuple[Block, ...] = ()
    ranks: tuple[int | None, ...] = ()
    vocab_axis: int | None = None

    @property
    def touched(self) -> bool:
        """True when some model changes it."""
        return self.mode == "merge" and any(rank != 0 for rank in self.ranks)


@dataclass(frozen=True)
class Prior:
    """A carried state to continue from: after the first `count` models of the plan, in the safetensors file `path`."""

    count: int
    path: Path
    squared_norms: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """What the work needs, in bytes and seconds; an estimate, printed as such.

    `download` goes into the Hugging Face cache; `stream` is read from the Hub and not kept.
    """

    download: int
    stream: int
    read: int
    output: int
    state: int
    disk: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """See the module's docstring; `execute.run` takes it from here."""

    recipe: Recipe
    method: MergeMethod
    base: Source
    base_layout: Layout = field(repr=False)
    deltas: tuple[Delta, ...] = field(repr=False)
    params: tuple[Param, ...] = field(repr=False)
    heads: tuple[tuple[int, Head], ...]
    vocabulary: Vocabulary | None = field(repr=False)
    side_files: tuple[str, ...]
    keep: tuple[int, ...]
    prior: Prior | None
    estimate: Estimate
    warnings: tuple[str, ...]
    streaming: Streaming | None = field(default=None, repr=False, compare=False)

    @property
    def weights(self) -> tuple[float, ...]:
        """One per model, in order."""
        return tuple(entry.weight for entry in self.recipe.models)

    @property
    def norm(self) -> str | float:
        """What the merged task vector is rescaled to."""
        return self.recipe.method.norm

    def slots(self) -> dict[str, dict[str, Slot]]:
        """Output file -> tensor -> slot."""
        files: dict[str, dict[str, Slot]] = {}
        for param in self.params:
            files.setdefault(param.file, {})[param.key] = param.slot
        return files

    def state_slots(self, count: int) -> dict[str, Slot]:
        """Tensors of the carried state after the first `count` models."""
        slots: dict[str, Slot] = {}
        if not isinstance(self.method, FoldMethod):
            return slots
        for param in self.params:
            if param.mode != "merge" or all(rank == 0 for rank in param.ranks[:count]):
                continue
            for block in param.blocks:
                slots |= carry_slots(self.method, param, block, count)
        return slots


def carry_slots(method: FoldMethod, param: Param, block: Block, count: int) -> dict[str, Slot]:
    """State tensors of one block after `count` models, by their name in the state file."""
    shape = block.shape(param.slot.shape)
    slots = {}
    for name, rank in method.carry_ranks(shape, list(param.ranks[:count])).items():
        stem = state_name(param, block, name)
        if rank is None:
            slots[stem] = Slot(method.carry_dtype, shape)
        else:
            slots[f"{stem}.up"] = Slot(method.carry_dtype, (shape[0], rank))
            slots[f"{stem}.down"] = Slot(method.carry_dtype, (rank, shape[1]))
    return slots


def state_name(param: Param, block: Block, name: str) -> str:
    """Name of one carried task vector in a state file."""
    return f"{param.key}#{block.label}:{name}" if block.label else f"{param.key}:{name}"


def build_method(recipe: Recipe) -> MergeMethod:
    """The recipe's method with its options."""
    return registry()[recipe.method.name](**recipe.method.options)


def make_plan(
    recipe: Recipe,
    *,
    prior: Prior | None = None,
    origin: str = "recipe",
    on_source: Callable[[Source], object] | None = None,
) -> Plan:
    """Work out a merge from headers.

    Args:
        recipe: already checked for form.
        prior: a state to continue from; its models are not read.
        origin: names the recipe in errors.
        on_source: called with base and models once all are described, before the slow part of planning.

    Raises:
        RecipeError: all problems of all models at once. SourceError: the base itself cannot be read.
    """
    problems = _form(recipe)
    warnings: list[str] = list(recipe.notes)
    sources: list[Source | None] = []
    base: Source | None = None
    streaming = Streaming() if recipe.stream else None
    try:
        base = describe(recipe.base, allow_pickle=recipe.allow_pickle, streaming=streaming)
        if base.kind != "full":
            problems.append(
                Problem("base", f"{base.pinned.label} is an adapter; name the full model it was trained on.")
            )
    except HfMergeError as error:
        problems.append(Problem("base", str(error)))
    for i, entry in enumerate(recipe.models):
        try:
            sources.append(describe(entry.model, allow_pickle=recipe.allow_pickle, base=base, streaming=streaming))
        except HfMergeError as error:
            problems.append(Problem(f"models[{i}]", str(error)))
            sources.append(None)
    if base is None or base.kind != "full":
        raise RecipeError(problems, origin)
    if on_source is not None and not problems:
        for source in (base, *sources):
            if source is not None:
                on_source(source)
    layouts = _Layouts(recipe.trust_remote_code)
    layout = None
    try:
        layout = layouts.of(base)
        if layout.missing:
            text = f"{base.pinned.label} lacks {_some(layout.missing)} of its own class {layout.architecture}."
            problems.append(Problem("base", text))
    except HfMergeError as error:
        problems.append(Problem("base", str(error)))
    if layout is None:
        raise RecipeError(problems, origin)
    _check_duplicates(sources, problems)
    deltas: list[Delta | None] = []
    heads: list[tuple[int, Head]] = []
    sizes: list[int | None] = []
    for i, source in enumerate(sources):
        deltas.append(None)
        sizes.append(None)
        if source is None:
            continue
        try:
            delta, head, size = _match_source(recipe, base, layouts, layout, source, warnings)
            deltas[i], sizes[i] = delta, size
            if head is not None:
                heads.append((i, head))
        except HfMergeError as error:
            problems.append(Problem(f"models[{i}]", str(error)))
    for source in (base, *sources):
        if source is not None and source.pickled:
            warnings.append(
                f"{source.pinned.label}: pickled weights have no header, so the file was fetched to read it."
            )
    if not problems:
        _check_slugs(sources, problems)
    if problems:
        raise RecipeError(problems, origin)
    whole = [delta for delta in deltas if delta is not None]
    vocabulary = None
    if recipe.vocabulary is not None and any(size is not None for size in sizes):
        rows = {layout.shapes[key][axis] for key, axis in layout.vocab_axis.items()}
        try:
            vocabulary = align(recipe.vocabulary, base, min(rows), [d.source for d in whole], sizes)
        except HfMergeError as error:
            raise RecipeError([Problem("vocabulary", str(error))], origin) from error
    method = build_method(recipe)
    params = _params(recipe, base, layout, whole, vocabulary, warnings)
    if not any(param.touched for param in params):
        raise RecipeError([Problem("models", "no model changes any parameter that is merged")], origin)
    keep = _kept_states(recipe, method, len(whole), prior.count if prior else 0)
    sides = tuple(side_files(base.pinned, remote_code=recipe.trust_remote_code))
    plan = Plan(
        recipe, method, base, layout, tuple(whole), params, tuple(heads), vocabulary, sides, keep, prior,
        Estimate(0, 0, 0, 0, 0, 0, 0, 0.0), tuple(warnings), streaming,
    )  # fmt: skip
    return _with_estimate(plan)


class _Layouts:
    """Layouts of one plan's checkpoints; those of one configuration and the same tensors are worked out once."""

    def __init__(self, trust_remote_code: bool):
        self._trust = trust_remote_code
        self._known: dict[bytes, Layout] = {}

    def of(self, source: Source) -> Layout:
        """The layout of a full checkpoint."""
        config = relevant(source.config)
        # code of a repository's own is its own, whatever its configuration says
        own = source.pinned.label if config.get("auto_map") else ""
        key = canonical_json([own, config, sorted(source.shapes.items())])
        if key not in self._known:
            self._known[key] = describe_layout(
                source.config, source.shapes, origin=source.pinned.label, trust_remote_code=self._trust
            )
        return self._known[key]


def _form(recipe: Recipe) -> list[Problem]:
    """What a recipe file is checked for as well, since a changed merge is no file: method, models and weights."""
    weights = [entry.weight for entry in recipe.models]
    method = registry().get(recipe.method.name)
    if method is None:
        return [
            Problem("method.name", f"{recipe.method.name} is not a method here; install the package that brings it")
        ]
    if wrong := [i for i, weight in enumerate(weights) if not math.isfinite(weight)]:
        return [Problem(f"models[{i}].weight", f"must be a finite number, not {weights[i]}") for i in wrong]
    found = [count_problem(len(weights), method), weights_problem(weights, method) if weights else None]
    return [Problem("models", text) for text in found if text is not None]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_duplicates(sources: Sequence[Source | None], problems: list[Problem]) -> None:
    seen: dict[tuple[Any, ...], int] = {}
    for i, source in enumerate(sources):
        if source is None:
            continue
        under = source.beneath.pinned if source.beneath else None
        mark = (source.name, source.pinned.commit, source.pinned.folder, under and (under.name, under.commit))
        if mark in seen:
            problems.append(
                Problem(f"models[{i}]", f"{source.pinned.label} is models[{seen[mark]}] again; list it once.")
            )
        seen.setdefault(mark, i)


def _check_slugs(sources: Sequence[Source | None], problems: list[Problem]) -> None:
    """Two sources of one name would share a head's folder and an entry of the ledger."""
    seen: dict[str, int] = {}
    for i, source in enumerate(sources):
        if source is not None and seen.setdefault(source.slug.lower(), i) != i:
            text = (
                f"{source.name} has the name of models[{seen[source.slug.lower()]}]; rename the folder or repository."
            )
            problems.append(Problem(f"models[{i}]", text))


def _match_source(
    recipe: Recipe, base: Source, layouts: _Layouts, layout: Layout, source: Source, warnings: list[str]
) -> tuple[Delta, Head | None, int | None]:
    """One model in the base's layout: its delta, its head, and its embedding rows where its vocabulary differs."""
    if source.kind == "adapter":
        _check_adapter_base(base, source)
        mapped = _own_head(map_adapter(source, layout), source, base, layout)
        beneath: dict[str, Origin] = {}
        if source.beneath is not None:
            under, _, rows = _match_full(recipe, base, layouts, layout, source.beneath, warnings)
            if rows is not None:
                raise UnsupportedError(
                    f"{source.beneath.pinned.label} has another vocabulary than the base, which is not aligned "
                    "beneath "
                    "an adapter; merge the adapter into it with peft (merge_and_unload) and give the full model."
                )
            beneath = dict(under.full)
        head = adapter_head(source, base.config, mapped.heads) if mapped.heads else None
        return adapter_delta(source, mapped, beneath), head, None
    delta, head_keys, size = _match_full(recipe, base, layouts, layout, source, warnings)
    head = full_head(source, head_keys) if head_keys else None
    return delta, head, size


def _own_head(mapped: AdapterMap, source: Source, base: Source, layout: Layout) -> AdapterMap:
    """The adapter's copy of the base's head is its own head unless a config.json beside it names the same labels."""
    if source.config.get("id2label") and _labels(source.config) == _labels(base.config):
        return mapped
    own = {t: key for t, key in mapped.replaced.items() if t in layout.heads and t not in layout.vocab_axis}
    heads = {**mapped.heads, **{key: key.removeprefix(PREFIX) for key in own.values()}}
    return AdapterMap(mapped.lora, {t: key for t, key in mapped.replaced.items() if t not in own}, heads)


def _check_adapter_base(base: Source, source: Source) -> None:
    """An adapter says which model it was trained on; the merge's base, or the model beneath, must be that one."""
    under = source.beneath or base
    named = str((source.adapter or {}).get("base_model_name_or_path") or "")
    is_path = not named or named.startswith((".", "/", "~")) or named.count("/") != 1
    if is_path or under.pinned.folder is not None:
        return
    if named.lower() != under.name.lower():
        raise SourceError(
            f"{source.pinned.label} was trained on {named}, not on {under.name}; use that base, or write `{named}+"
            f"{source.name}` to merge the pair."
        )
    revision = (source.adapter or {}).get("revision")
    if revision and under.pinned.commit:
        with hub_errors(f"{named}@{revision}"):
            commit = hub_api().resolve_revision(named, revision=str(revision)).resolved
        if commit != under.pinned.commit:
            raise SourceError(
                f"{source.pinned.label} was trained on {named}@{commit[:8]}, the base is at "
                f"{under.pinned.commit[:8]}; "
                f"pin it: `{named}@{commit[:8]}`."
            )


def _match_full(
    recipe: Recipe, base: Source, layouts: _Layouts, layout: Layout, source: Source, warnings: list[str]
) -> tuple[Delta, tuple[str, ...], int | None]:
    """A full checkpoint in the base's layout: its delta, its head's stored keys, and differing embedding rows."""
    label = source.pinned.label
    theirs = source.config.get("model_type")
    if theirs != layout.model_type and not str(theirs).startswith(f"{layout.model_type}_"):
        ours = str(layout.model_type)
        if not ours.startswith(f"{theirs}_"):
            raise UnsupportedError(f"{label} is a {theirs} model, the base {base.pinned.label} a {ours} one.")
    other = layouts.of(source)
    if other.missing:
        raise CorruptFileError(f"{label} lacks {_some(other.missing)} of its own class {other.architecture}.")
    found = match(layout, other)
    labels_differ = _labels(base.config) != _labels(source.config)
    heads = list(found.extra)
    origins: dict[str, Origin] = {}
    wrong: list[str] = []
    size: int | None = None
    for key, where in found.origins.items():
        wanted, got = layout.shapes[key], _origin_shape(where, other, layout, key)
        axis = layout.vocab_axis.get(key)
        if got == wanted:
            if key in layout.heads and axis is None and labels_differ:
                heads.extend(where.keys)
            else:
                origins[key] = where
        elif axis is not None and _without(wanted, axis) == _without(got, axis):
            size = got[axis]
            origins[key] = where
        elif key in layout.heads:
            heads.extend(where.keys)
        else:
            wrong.append(f"{key} is {got}, the base has {wanted}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ShapeError(f"{label}: {wrong[0]}{more}; not a fine-tune of {base.pinned.label}.")
    if layout.vocab_axis and size is None and same_tokens(base.pinned, source.pinned) is False:
        size = min(layout.shapes[key][axis] for key, axis in layout.vocab_axis.items())
    if size is not None and recipe.vocabulary is None:
        rows = min(layout.shapes[key][axis] for key, axis in layout.vocab_axis.items())
        what = f"{size} rows, the base {rows}" if size != rows else "the same number of tokens but other ones"
        raise ShapeError(
            f"{label}: its vocabulary has {what}; set `vocabulary: base` (the base's tokens) or `vocabulary: union`."
        )
    if found.absent:
        merged = len(found.origins)
        warnings.append(
            f"{label} ({other.architecture}) has no {_some(found.absent)}: it changes {merged} of "
            f"{merged + len(found.absent)} parameters, the others keep the base's value as far as it is concerned."
        )
    if strange := [key for key in other.unexpected if key in heads]:
        heads = [key for key in heads if key not in strange]
        warnings.append(f"{label}: {_some(strange)} belongs to no part of {other.architecture} and is left out.")
    return full_delta(source, origins, dict(other.tied)), tuple(heads), size


def _origin_shape(where: Origin, other: Layout, base: Layout, key: str) -> tuple[int, ...]:
    """Shape an origin will have in the base's layout; a conversion checks its own parts and gives the base's."""
    return other.shapes[where.keys[0]] if where.convert is None else base.shapes[key]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _labels(config: Mapping[str, Any]) -> list[str]:
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=lambda k: int(k))]


def _params(
    recipe: Recipe,
    base: Source,
    layout: Layout,
    deltas: Sequence[Delta],
    vocabulary: Vocabulary | None,
    warnings: list[str],
) -> tuple[Param, ...]:
    """One entry per tensor of the base, in stored order: the output's keys are the base's keys."""
    files = shard_names(sorted({entry.file for entry in base.tensors.values()}))
    used: dict[str, bool] = dict.fromkeys((*recipe.include, *recipe.exclude), False)

    def chosen(key: str) -> bool:
        inside = not recipe.include
        for pattern in recipe.include:
            if fnmatch.fnmatchcase(key, pattern):
                used[pattern] = inside = True
        for pattern in recipe.exclude:
            if fnmatch.fnmatchcase(key, pattern):
                used[pattern] = True
                inside = False
        return inside

    elementwise = build_method(recipe).elementwise
    params = []
    for key, entry in base.tensors.items():
        dtype, shape = entry.dtype, entry.shape
        if entry.floating and recipe.dtype is not None:
            dtype = DTYPES[recipe.dtype]
        axis = layout.vocab_axis.get(key)
        if vocabulary is not None and vocabulary.added and axis is not None:
            shape = (*shape[:axis], vocabulary.size, *shape[axis + 1 :])
        file, slot = files[entry.file], Slot(dtype, shape)
        inside = chosen(key)
        if key in layout.tied:
            params.append(Param(key, file, slot, "tied", owner=layout.tied[key]))
        elif entry.dtype not in FLOATS or not inside:
            params.append(Param(key, file, slot, "copy", vocab_axis=axis))
        else:
            ranks = tuple(delta.rank(key) for delta in deltas)
            # element by element, the matrices inside a tensor do not matter
            blocks = (WHOLE,) if elementwise else layout.blocks[key]
            params.append(Param(key, file, slot, "merge", None, blocks, ranks, axis))
    warnings.extend(f"pattern {pattern!r} matches no parameter." for pattern, hit in used.items() if not hit)
    return tuple(params)


def _kept_states(recipe: Recipe, method: MergeMethod, count: int, start: int) -> tuple[int, ...]:
    """After how many models a state is written; a run that continues after `start` models has only the later ones."""
    if recipe.state == "none" or not isinstance(method, FoldMethod):
        return ()
    if recipe.state == "last":
        return (count,)
    every = 1 if recipe.state == "all" else int(recipe.state)
    return tuple(sorted({*(kept for kept in range(every, count + 1, every) if kept > start), count}))


def _with_estimate(plan: Plan) -> Plan:
    import dataclasses

    done = plan.prior.count if plan.prior else 0
    wanted: dict[tuple[str, str | None, str], int] = {}
    for source in [plan.base, *(d.source for d in plan.deltas[done:])]:
        for place in (source, source.beneath):
            for entry in place.tensors.values() if place is not None else ():
                assert place is not None
                if entry.file not in place.streams and cached(place.pinned, entry.file) is None:
                    wanted[place.name, place.pinned.commit, entry.file] = place.pinned.files[entry.file].size
    output = sum(param.slot.nbytes for param in plan.params)
    state = sum(slot.nbytes for count in plan.keep for slot in plan.state_slots(count).values())
    read = sum(e.nbytes for e in plan.base.tensors.values())
    read += sum(d.stored_bytes(p.key) for d in plan.deltas[done:] for p in plan.params if p.mode == "merge")
    scratch = (
        0
        if plan.keep or not needs_two_passes(plan)
        else sum(slot.nbytes for slot in plan.state_slots(len(plan.deltas)).values())
    )
    spectral = 0.0
    if plan.method.matrixwise:
        for param in plan.params:
            steps = sum(rank is None for rank in param.ranks[done:]) if param.mode == "merge" else 0
            for block in param.blocks:
                shape = block.shape(param.slot.shape)
                if block.matrix and len(shape) == 2:
                    small, large = sorted(shape)
                    spectral += max(0, steps - (done == 0)) * (6.0 * large * small**2 + 20.0 * small**3)
    workers = core_count()
    stream = _streamed(plan)
    seconds = (
        3.0 + (sum(wanted.values()) + stream) / 50e6 + (read + output + state) / 500e6 + spectral / (10e9 * workers)
    )
    needs = sorted(
        (visit_bytes(p, p.slot.shape, p.touched and plan.method.matrixwise) for p in plan.params), reverse=True
    )
    memory = IMPORT_BYTES + sum(needs[: workers + AHEAD]) + stream_memory(plan)
    disk = output + state + scratch + sum(plan.base.pinned.files[n].size for n in plan.side_files)
    estimate = Estimate(sum(wanted.values()), stream, read, output, state, disk, memory, seconds)
    return dataclasses.replace(plan, estimate=estimate)


def visit_bytes(param: Param, shape: tuple[int, ...], spectral: bool) -> int:
    """About the bytes that computing a parameter, or a piece of it of this shape, holds at its peak.

    The base and a task vector in float32 with what they are read from; of a spectral method the accumulator, the task
    vector, its projection and their sum in float64, square matrices of the smaller side, and what the libraries hold
    for them: measured, 60 bytes an element.
    """
    size = math.prod(shape)
    if not spectral or not any(block.matrix for block in param.blocks):
        return 24 * size
    sides = [min(found) for block in param.blocks if len(found := block.shape(shape)) == 2 and block.matrix]
    return 60 * size + 60 * max(side * side for side in sides)


def stream_memory(plan: Plan) -> int:
    """Bytes that streamed blocks may hold: more where whole parameters of all models are read side by side."""
    if plan.streaming is None:
        return 0
    models = [plan.base, *(delta.source for delta in plan.deltas)]
    largest = max(entry.nbytes for source in models for entry in source.tensors.values())
    # half of it for what is read ahead, and half for what visits go over once more
    return min(8 * MEMORY, max(MEMORY, 2 * stream_readers(plan) * len(models) * largest * (not _sliced(plan))))


def stream_readers(plan: Plan) -> int:
    """Places of one streamed file that are read side by side: one where visits follow each other closely."""
    return 1 if _sliced(plan) else core_count() + AHEAD


def _sliced(plan: Plan) -> bool:
    return plan.method.elementwise and plan.norm == "none"


def _streamed(plan: Plan) -> int:
    """Bytes that a run reads from the Hub without keeping them."""
    base, count = plan.base, plan.prior.count if plan.prior else 0
    measured = isinstance(plan.method, JointMethod) and plan.method.measured
    total = sum(plan.deltas[model].source.streamed_bytes(head.tensors.values()) for model, head in plan.heads)
    ties = [(base, plan.base_layout.tied), *((delta.source, delta.tied) for delta in plan.deltas[count:])]
    total += sum(source.streamed_bytes(pair) for source, tied in ties for pair in tied.items())
    for param in plan.params:
        dense = param.touched and any(rank is None for rank in param.ranks[count:])
        first = dense or not needs_two_passes(plan)
        times = first + needs_two_passes(plan) + (measured and dense) if param.touched else param.mode != "tied"
        total += times * base.streamed_bytes([param.key])
        if param.touched:
            total += (1 + measured) * sum(
                delta.stored_bytes(param.key, streamed=True) for delta in plan.deltas[count:]
            )
    return total


def needs_two_passes(plan: Plan) -> bool:
    """True when a number over all parameters is needed before anything can be written."""
    return plan.norm != "none"


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
