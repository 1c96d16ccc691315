"""Matches one model with the base: the tensors it changes, its own head, and reasons why it is no fine-tune."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hfmerge.checkpoint.delta import Delta, adapter_delta, full_delta
from hfmerge.checkpoint.heads import Head, adapter_head, full_head
from hfmerge.checkpoint.layout import Layout, Origin, describe_layout, match, with_modules
from hfmerge.checkpoint.layout.cache import relevant
from hfmerge.checkpoint.lora import NO_ENDS, PEFT_PREFIX, AdapterMap, Ends, map_adapter
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.vocabulary import has_tokenizer, in_padding, same_tokens
from hfmerge.engine.named_base import compare_base
from hfmerge.errors import CorruptFileError, ShapeError, UnsupportedError
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.united import UNION


class Layouts:
    """Layouts of one plan's checkpoints; those of one configuration and the same tensors are worked out once."""

    def __init__(self, trust_remote_code: bool):
        self._trust = trust_remote_code
        self._known: dict[str, Layout] = {}

    def of(self, source: Model) -> Layout:
        """The layout of a full checkpoint."""
        shapes = {key: shape for key, shape in source.shapes.items() if not source.is_of_module(key)}
        config = relevant(source.config)
        # code of a repository's own is its own, whatever its configuration says; it is that of the whole commit's id,
        # since a branch may be called like the beginning of one
        snapshot = source.snapshot
        label = f"{snapshot.name}@{snapshot.commit}" if snapshot.commit else snapshot.label
        own = label if config.get("auto_map") else ""
        key = json.dumps([own, config, sorted(source.shapes.items()), source.modules], sort_keys=True)
        if key not in self._known:
            layout = describe_layout(
                source.config, shapes, origin=own or snapshot.label, trust_remote_code=self._trust
            )
            self._known[key] = with_modules(layout, {k: s for k, s in source.shapes.items() if k not in shapes})
        return self._known[key]


def match_source(
    recipe: Recipe,
    base: Model,
    layouts: Layouts,
    layout: Layout,
    source: Model,
    warnings: list[str],
    ends: Ends = NO_ENDS,
) -> tuple[Delta, Head | None, int | None]:
    """One model in the base's layout: its delta, its head, and its embedding rows where its vocabulary differs.

    Args:
        ends: see `map_adapter`.
    """
    if source.kind == "adapter":
        said = compare_base(source.beneath or base, source, strict=recipe.strict_base)
        warnings.extend([said] if said else [])
        mapped = _own_head(map_adapter(source, layout, ends), source, base, layout)
        warnings.extend(mapped.notes)
        under: Delta | None = None
        if source.beneath is not None:
            under, _, rows = _match_full(recipe, base, layouts, layout, source.beneath, warnings)
            if rows is not None:
                raise UnsupportedError(
                    f"{source.beneath.snapshot.label} has another vocabulary than the base, which is not aligned "
                    "beneath "
                    "an adapter; merge the adapter into it with peft (merge_and_unload) and give the full model."
                )
        head = adapter_head(source, base, mapped.heads) if mapped.heads else None
        return (
            adapter_delta(source, mapped, under),
            head,
            _adapter_rows(recipe, base, layout, source, mapped, warnings),
        )
    delta, head_keys, size = _match_full(recipe, base, layouts, layout, source, warnings)
    head = full_head(source, head_keys) if head_keys else None
    return delta, head, size


def incomplete_base(
    base: Model, layout: Layout, layouts: Layouts, sources: Sequence[Model | None]
) -> tuple[str | None, str | None]:
    """Why a base that lacks parameters of its class cannot be merged, or else what a user has to know of it.

    A base may lack what no model has either: a part of its class, such as a pooler, that it was saved without, or
    what a full model lacks as well. The merge then lacks it too.
    """
    if not layout.missing:
        return None, None
    said = f"{base.snapshot.label} lacks {some(layout.missing)} of its own class {layout.architecture}"
    lacking = layout.lacking()
    stored = {name.partition(".")[0] for name in layout.memory.filling}
    apart = all(name.partition(".")[0] not in stored for name in lacking)
    agreed = False
    for source in sources:
        full = source if source is None or source.kind == "full" else source.beneath
        if full is None:
            continue
        other = layouts.of(full)
        ends = tuple(f".{name}" for name in lacking)
        if held := [name for name in other.memory.filling if name in lacking or name.endswith(ends)]:
            return f"{said}, and {full.snapshot.label} has {some(held)}; give the base that it was tuned from.", None
        agreed |= lacking <= other.lacking()
    if not apart and not agreed:
        return f"{said}; get it again.", None
    return None, f"{said}; no model has it either, and so the merge lacks it too."


def _own_head(mapped: AdapterMap, source: Model, base: Model, layout: Layout) -> AdapterMap:
    """The adapter's copy of the base's head is its own head unless a config.json beside it names the same labels."""
    if source.config.get("id2label") and _labels(source.config) == _labels(base.config):
        return mapped
    own = {
        t: key
        for t, key in mapped.replaced.items()
        if t in layout.heads and t not in layout.vocab_axis and not base.is_of_module(t)
    }
    heads = {**mapped.heads, **{key: key.removeprefix(PEFT_PREFIX) for key in own.values()}}
    return replace(mapped, replaced={t: key for t, key in mapped.replaced.items() if t not in own}, heads=heads)


def _match_full(
    recipe: Recipe, base: Model, layouts: Layouts, layout: Layout, source: Model, warnings: list[str]
) -> tuple[Delta, tuple[str, ...], int | None]:
    """A full checkpoint in the base's layout: its delta, its head's stored keys, and differing embedding rows."""
    label = source.snapshot.label
    other = layouts.of(source)
    if not _related(source.config, other, base.config, layout):
        raise UnsupportedError(
            f"{label} is a {other.model_type} model, the base {base.snapshot.label} a {layout.model_type} one, and "
            "neither is a part of the other; merge it with models of its own type."
        )
    if other.missing and not other.lacking() <= layout.lacking():
        raise CorruptFileError(f"{label} lacks {some(other.missing)} of its own class {other.architecture}.")
    matched = match(layout, other)
    labels_differ = _labels(base.config) != _labels(source.config)
    heads = list(matched.extra)
    origins: dict[str, Origin] = {}
    wrong: list[str] = []
    size: int | None = None
    for key, where in matched.origins.items():
        wanted, got = layout.shapes[key], _origin_shape(where, other, layout, key)
        axis = layout.vocab_axis.get(key)
        if got == wanted:
            if key in layout.heads and axis is None and labels_differ and not base.is_of_module(key):
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
        raise ShapeError(f"{label}: {wrong[0]}{more}; not a fine-tune of {base.snapshot.label}.")
    if layout.vocab_axis and size is None and same_tokens(base.snapshot, source.snapshot) is False:
        size = _base_rows(layout)
        fresh = in_padding(base.snapshot, source.snapshot, size)
        if fresh and recipe.tokenizer in (source.ref, source.name):
            size = None  # row by row: the model's tokenizer comes with its rows
        elif fresh and recipe.vocabulary is None:
            raise ShapeError(
                f"{label}: its tokenizer has {some(fresh)} in rows of the embedding that the base has no tokens for; "
                f"set `tokenizer: union` or `tokenizer: {source.name}` to have them in the merge, or "
                "`vocabulary: base` to leave them out."
            )
        elif fresh and recipe.vocabulary == "base":
            warnings.append(f"{label}: {some(fresh)} are tokens that the base does not have; the merge lacks them.")
    if size is not None and recipe.vocabulary is None:
        raise ShapeError(_other_vocabulary(layout, source, size))
    if matched.absent:
        merged = len(matched.origins)
        warnings.append(
            f"{label} ({other.architecture}) has no {some(matched.absent)}: it changes {merged} of "
            f"{merged + len(matched.absent)} parameters and leaves the others as they are in the base."
        )
    if strange := [key for key in other.unexpected if key in heads]:
        heads = [key for key in heads if key not in strange]
        warnings.append(f"{label}: {some(strange)} belongs to no part of {other.architecture} and is left out.")
    apart = tuple(key for key in heads if other.canonical[key] in layout.memory.ties)
    return (
        full_delta(source, origins, dict(other.tied), apart),
        tuple(key for key in heads if key not in apart),
        size,
    )


def _related(theirs: Mapping[str, Any], other: Layout, ours: Mapping[str, Any], layout: Layout) -> bool:
    """Whether two models are of one type, or one is a part of the other, as a language model is of one that sees."""
    its, mine = other.model_type, layout.model_type
    if its == mine or its.startswith(f"{mine}_") or mine.startswith(f"{its}_"):
        return True
    return its in _named_parts(ours) or mine in _named_parts(theirs) or its in _parts(layout) or mine in _parts(other)


def _named_parts(config: Mapping[str, Any]) -> set[str]:
    """Types of the models inside a model, as its config.json names them."""
    return {str(value.get("model_type")) for value in config.values() if isinstance(value, Mapping)}


def _parts(layout: Layout) -> set[str]:
    """Types of the models inside a model, as its class has them: config.json leaves out what is the default."""
    skeleton = layout.memory.skeleton
    if skeleton is None:
        return set()
    config = skeleton.model.config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return {str(part.model_type) for part in parts if part is not None}


def _adapter_rows(
    recipe: Recipe, base: Model, layout: Layout, source: Model, mapped: AdapterMap, warnings: list[str]
) -> int | None:
    """Rows of an adapter's embedding where its vocabulary differs from the base's; None where it does not."""
    changed = {key for key in (*mapped.replaced, *mapped.lora) if key in layout.vocab_axis}
    if mapped.rows is not None:
        if recipe.vocabulary is None:
            raise ShapeError(_other_vocabulary(layout, source, mapped.rows))
        without = [key for key in layout.vocab_axis if key not in changed and key not in layout.tied]
        if without and recipe.vocabulary == UNION:
            warnings.append(
                f"{source.snapshot.label}: holds no rows of {some(without)} for tokens that the base does not have; "
                "the merge has zeros there."
            )
        return mapped.rows
    chosen = recipe.tokenizer in (source.ref, source.name)
    if not changed or chosen or same_tokens(base.snapshot, source.snapshot) is not False:
        return None
    rows = _base_rows(layout)
    fresh = in_padding(base.snapshot, source.snapshot, rows)
    if fresh and recipe.tokenizer == UNION and changed <= {*mapped.replaced}:
        return rows
    if fresh:
        warnings.append(
            f"{source.snapshot.label}: {some(fresh)} are tokens that the base does not have; the merge has rows for "
            f"them, and its tokenizer lacks them. Set `tokenizer: {source.name}` to have them."
        )
    return None


def _base_rows(layout: Layout) -> int:
    return min(layout.shapes[key][axis] for key, axis in layout.vocab_axis.items())


def _other_vocabulary(layout: Layout, source: Model, size: int) -> str:
    """What is wrong with a model of another vocabulary where the recipe does not say how it is aligned."""
    rows, label = _base_rows(layout), source.snapshot.label
    what = f"{size} rows, the base {rows}" if size != rows else "as many tokens as the base's, but other ones"
    text = f"{label}: its vocabulary has {what}; set `vocabulary: base` (the base's tokens) or `vocabulary: union`"
    if not has_tokenizer(source.snapshot):
        text += ", and put the files of the tokenizer that it was trained with beside it"
    return f"{text}."


def _origin_shape(where: Origin, other: Layout, base: Layout, key: str) -> tuple[int, ...]:
    """Shape an origin will have in the base's layout; a conversion checks its own parts and gives the base's."""
    return other.shapes[where.keys[0]] if not where.converted else base.shapes[key]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _labels(config: Mapping[str, Any]) -> list[str]:
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=lambda k: int(k))]


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
