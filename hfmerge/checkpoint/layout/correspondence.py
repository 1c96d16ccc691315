"""Where each stored tensor of a base comes from in another checkpoint, in whatever layout that one is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfmerge.checkpoint.layout.conversion import Group
from hfmerge.checkpoint.layout.layout import Layout, MemoryLayout
from hfmerge.checkpoint.layout.skeleton import one_line
from hfmerge.errors import CorruptFileError, ShapeError, UnsupportedError


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Convert = Callable[[dict[str, "Tensor"]], "Tensor"]
"""From tensors by stored key to the tensor in the base's stored layout: same dtype, values moved and none computed."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor in the base's layout comes from in another checkpoint.

    Attributes:
        keys: stored keys of the source to read.
        converted: False if the one stored tensor is used as it is, True if it takes a `Convert` (see `Match`).
    """

    keys: tuple[str, ...]
    converted: bool = False


@dataclass(frozen=True)
class Match:
    """The match of a source with a base.

    Attributes:
        origins: base stored key -> origin; tied copies are not listed, they follow their owner.
        extra: stored keys of the source that the base has no place for: task heads, second towers, unknown keys.
        absent: base stored keys for which the source's class has no parameter, because it is a smaller model.
        converters: base stored key -> what makes its tensor, of origins that are converted.
    """

    origins: dict[str, Origin]
    extra: tuple[str, ...]
    absent: tuple[str, ...]
    converters: dict[str, Convert]


def match(base: Layout, source: Layout) -> Match:
    """Find every tensor of the base in the source.

    Names are aligned so that most parameters meet: as they are, or with one model as a tower of the other where both
    are of the same class (a CLIPVisionModel in a CLIPModel). Shapes have to agree, except along a vocabulary axis and
    in heads, which the caller compares.

    Raises:
        UnsupportedError: no parameter in common, two towers that fit equally well, or a layout that cannot be undone.
        ShapeError: other sizes, or another number of layers.
        CorruptFileError: the source lacks a tensor that its own class needs.
    """
    ours, theirs = base.memory, source.memory
    names = _align(ours, theirs)  # base name -> source name
    _same_depth(ours, theirs, names)
    free = {name for key in (*base.heads, *base.vocab_axis) for name in _outputs(ours, base.canonical[key])}
    _same_shapes(ours, theirs, names, free)
    origins: dict[str, Origin] = {}
    converters: dict[str, Convert] = {}
    absent: set[str] = set()
    lacking: list[str] = []
    for group in ours.groups:
        if group.keys[0] in base.tied:
            continue
        wanted = [names.get(name) for name in group.outputs]
        if None in wanted:
            absent.update(group.keys)
            continue
        filled = [_filling(theirs, name) for name in wanted if name is not None]
        if None in filled:
            lacking.extend(name for name, holder in zip(group.outputs, filled, strict=True) if holder is None)
            continue
        holders = [holder for holder in filled if holder is not None]
        origins.update(_origins(group, holders, base, source, converters))
    if lacking:
        raise CorruptFileError(
            f"{theirs.origin}: {len(lacking)} parameters of {source.architecture} are not stored, first {lacking[0]}"
        )
    used = {key for origin in origins.values() for key in origin.keys}
    return Match(
        origins={key: origins[key] for key in base.shapes if key in origins},
        extra=tuple(key for key in source.shapes if key not in used and key not in source.tied),
        absent=tuple(key for key in base.shapes if key in absent),
        converters=converters,
    )


def _outputs(memory: MemoryLayout, name: str) -> tuple[str, ...]:
    return tuple(part.partition("#")[0] for part in name.split("+"))


def _filling(memory: MemoryLayout, name: str) -> tuple[Group, int] | None:
    """The group that fills a parameter, itself or through a tie, and at which of its outputs."""
    for candidate in (name, memory.ties.get(name)):
        if candidate in memory.filling:
            group = memory.filling[candidate]
            return group, group.outputs.index(candidate)
    return None


def _origins(
    group: Group,
    holders: list[tuple[Group, int]],
    base: Layout,
    source: Layout,
    converters: dict[str, Convert],
) -> Mapping[str, Origin]:
    """Origins of all stored tensors of one group of the base; `converters` takes what makes those converted."""
    other = holders[0][0]
    whole = all(holder is other and at == i for i, (holder, at) in enumerate(holders))
    if whole and group.layout == other.layout:
        pairs = list(zip(group.keys, other.keys, strict=True))
        if not group.operations or all(base.shapes[mine] == source.shapes[its] for mine, its in pairs):
            return {mine: Origin((its,)) for mine, its in pairs}
    names = tuple(dict.fromkeys(name for holder, _ in holders for name in holder.keys))
    origins = {}
    for part, keys in enumerate(group.inputs):
        tried: set[tuple[int, ...]] = set()
        for index, key in enumerate(keys):
            origins[key] = Origin(names, converted=True)
            converters[key] = _converter(group, (part, index), holders, base, source)
            if base.shapes[key] not in tried:  # experts are converted alike: one of them shows whether it can be done
                _try(names, converters[key], base, source, key)
                tried.add(base.shapes[key])
    return origins


def _converter(
    group: Group, at: tuple[int, int], holders: list[tuple[Group, int]], base: Layout, source: Layout
) -> Convert:
    mine, its = _model(base), _model(source)

    def convert(stored: dict[str, Tensor]) -> Tensor:
        memory = [holder.forward(stored, its)[output] for holder, output in holders]
        return group.backward(memory, mine, at).contiguous()

    return convert


def _try(names: tuple[str, ...], convert: Convert, base: Layout, source: Layout, key: str) -> None:
    """Run a conversion on the meta device, so that what it cannot do shows now and not in the middle of a merge."""
    import torch

    text = f"{source.memory.origin}: {names[0]} cannot be brought into the layout of {base.memory.origin}: {key}"
    try:
        shape = tuple(convert({name: torch.empty(source.shapes[name], device="meta") for name in names}).shape)
    except (RuntimeError, ValueError, KeyError, IndexError, NotImplementedError, AttributeError) as error:
        raise UnsupportedError(f"{text} ({one_line(error)})") from error
    if shape != base.shapes[key]:
        raise UnsupportedError(f"{text} is {base.shapes[key]}, the conversion gives {shape}")


def _model(layout: Layout) -> PreTrainedModel | None:
    return None if layout.memory.skeleton is None else layout.memory.skeleton.model


def _align(ours: MemoryLayout, theirs: MemoryLayout) -> dict[str, str]:
    """Base name -> source name for every parameter both have, under the alignment in which most shapes agree.

    Where no shape agrees, the alignment with most names tells the caller which shapes do not.
    """
    towers = [("", "")]
    for mine, title in ours.submodels:
        for its, other in theirs.submodels:
            either = not (title and other) and not (mine and its)  # without classes: one first name more or less
            if (title == other or either) and (mine, its) not in towers:
                towers.append((mine, its))
    best: list[tuple[tuple[str, str], dict[str, str]]] = []
    most = (0, 0)
    for tower in towers:
        names = _under(ours, theirs, *tower)
        agreeing = sum(ours.parameters[name] == theirs.parameters[other] for name, other in names.items())
        score = (agreeing, 0 if agreeing else len(names))
        if score > most:
            best, most = [(tower, names)], score
        elif score == most:
            best.append((tower, names))
    if most == (0, 0):
        raise UnsupportedError(
            f"{theirs.origin} and {ours.origin} have no parameter in common; are they of the same family?"
        )
    (first, names), *others = best
    if most[0] and first != ("", "") and any(names != other for _, other in others):
        places = " or ".join(repr(tower[0] or tower[1]) for tower, _ in best)
        raise UnsupportedError(f"{theirs.origin} fits {ours.origin} equally well as {places}; which is not known")
    return names


def _under(ours: MemoryLayout, theirs: MemoryLayout, mine: str, its: str) -> dict[str, str]:
    """Base name -> source name if the source's tower `its` is the base's tower `mine`; the rest by equal names."""
    names: dict[str, str] = {}
    here, there = (f"{tower}." if tower else "" for tower in (mine, its))
    rest = []
    for name in theirs.parameters:
        inside = name.startswith(there) and name not in theirs.heads
        aligned = here + name[len(there) :] if inside else None
        if aligned in ours.parameters and aligned not in ours.heads and _fits(ours, aligned, theirs, name):
            names[aligned] = name
        else:
            rest.append(name)
    for name in rest:
        outside = name in ours.heads or bool(here and not name.startswith(here)) or (not here and not there)
        if outside and name in ours.parameters and name not in names and _fits(ours, name, theirs, name):
            names[name] = name
    return names


def _fits(ours: MemoryLayout, mine: str, theirs: MemoryLayout, its: str) -> bool:
    """What a class does not know is the same only if it looks the same."""
    known = mine not in ours.strange and its not in theirs.strange
    return known or ours.parameters[mine] == theirs.parameters[its]


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _same_depth(ours: MemoryLayout, theirs: MemoryLayout, names: Mapping[str, str]) -> None:
    """Raises ShapeError if one model has layers like those both have, but more of them."""
    for one, met in ((ours, set(names)), (theirs, set(names.values()))):
        apart = one.heads | one.strange | met
        matched = {_pattern(name) for name in met}
        for name in one.parameters:
            if name not in apart and _pattern(name) in matched:
                raise ShapeError(f"{theirs.origin}: another number of layers: {name} is in {one.origin} alone")


def _same_shapes(ours: MemoryLayout, theirs: MemoryLayout, names: Mapping[str, str], free: set[str]) -> None:
    wrong = [
        f"{mine} is {theirs.parameters[its]}, {ours.origin} has {ours.parameters[mine]}"
        for mine, its in names.items()
        if ours.parameters[mine] != theirs.parameters[its] and mine not in free and ours.ties.get(mine) not in free
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ShapeError(f"{theirs.origin}: {wrong[0]}{more}; not a fine-tune of this base")
