"""What the stored tensors of one checkpoint mean: names, ties, heads, vocabulary, real matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from hfmerge.checkpoint.layout.blocks import guessed_blocks, memory_blocks, stored_blocks
from hfmerge.checkpoint.layout.cache import cached_answer, relevant
from hfmerge.checkpoint.layout.conversion import Group, Renamer, complete, missing, trace
from hfmerge.checkpoint.layout.skeleton import Shape, Skeleton, build
from hfmerge.task_vector import WHOLE, Segment


@dataclass(frozen=True)
class MemoryLayout:
    """The in-memory side of a layout, in canonical names; `correspondence.match` and module paths need it.

    Attributes:
        origin: label of the checkpoint for messages.
        parameters: canonical name -> shape, with what the class does not know under the names it would have.
        groups: what is stored, with canonical outputs.
        ties: canonical name of a tied parameter -> the one it shares.
        heads: canonical names outside the backbone.
        strange: canonical names that the class does not know.
        submodels: (canonical path, class name) of models inside the backbone; "" is the backbone.
        build: gives the class on the meta device; None without a class.
    """

    origin: str
    parameters: dict[str, Shape]
    groups: tuple[Group, ...]
    ties: dict[str, str] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    strange: frozenset[str] = frozenset()
    submodels: tuple[tuple[str, str], ...] = ()
    build: Callable[[], Skeleton] | None = None

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The class on the meta device, built when first asked for; None without a class."""
        return None if self.build is None else self.build()

    @cached_property
    def filling(self) -> dict[str, Group]:
        """Canonical name -> the group that fills it."""
        return {name: group for group in self.groups for name in group.outputs}

    @cached_property
    def renamer(self) -> Renamer | None:
        """Renames for paths asked one by one."""
        return None if self.skeleton is None else Renamer(self.skeleton)


@dataclass(frozen=True)
class Layout:
    """What the stored tensors of one checkpoint mean.

    Attributes:
        architecture: class that was built, "BertForSequenceClassification"; what config.json says if none could be.
        model_type: of config.json.
        shapes: stored key -> shape.
        canonical: stored key -> in-memory name in the backbone, without the class's prefix
            ("encoder.layer.0.output.dense.weight"); heads keep theirs. "#3.1" is appended where several stored tensors
            fill one in-memory tensor (fourth expert, second pattern of the converter); names are joined by "+" where
            one stored tensor fills several. Every name occurs once.
        tied: stored key that is only a copy -> stored key that owns the value.
        heads: stored keys outside the backbone, in stored order.
        missing: in-memory names of parameters that the class needs and nothing fills, or not completely.
        unexpected: stored keys that the class does not know, such as `position_ids` of old files.
        vocab_axis: stored key -> its axis with one entry per token.
        blocks: stored key -> its real matrices, or the whole tensor; together they cover it exactly once.
    """

    architecture: str
    model_type: str
    shapes: dict[str, Shape]
    canonical: dict[str, str]
    tied: dict[str, str]
    heads: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    vocab_axis: dict[str, int]
    blocks: dict[str, tuple[Segment, ...]]
    memory: MemoryLayout = field(repr=False, compare=False)

    def lacking(self) -> frozenset[str]:
        """The `missing` ones in canonical names."""
        skeleton = self.memory.skeleton if self.missing else None
        return frozenset() if skeleton is None else frozenset(_canonical(name, skeleton) for name in self.missing)

    def parameter_of_module(self, path: str) -> str | None:
        """Stored key of the weight of a module, None if the checkpoint stores no tensor for that weight alone.

        Args:
            path: as an adapter names it, "bert.encoder.layer.0.attention.self.query", in the names of any version of
                transformers, with or without the class's prefix. A path to a parameter itself works as well. The path
                of a tied module gives the tensor it shares.
        """
        for key in (f"{path}.weight", path):
            if key in self.shapes and key not in self.unexpected:
                return self.tied.get(key, key)
        if self.memory.skeleton is None:
            return self._by_prefix(f"{path}.weight")
        return self._holder(f"{path}.weight") or self._holder(path)

    def module(self, path: str) -> tuple[str, Any] | None:
        """In-memory name of a module, and the module, of the class; None without a class, or where it has none such.

        Args:
            path: as for `parameter_of_module`.
        """
        if self.memory.skeleton is None:
            return None
        name, _ = self._in_memory(f"{path}.weight")
        modules = dict(self.memory.skeleton.model.named_modules())
        for known in (name.removesuffix(".weight"), path, f"{self.memory.skeleton.prefix}{path}"):
            if known in modules:
                return known, modules[known]
        return None

    def places_of(self, name: str) -> list[tuple[str, int | None, tuple[int, int] | None]]:
        """Stored keys that hold a parameter of the class, or an expert of it each, by rows.

        Args:
            name: in memory.

        Returns:
            (key, None, None) for the parameter as it is, or (key, expert, rows) for rows of the second axis of one
            expert. Empty: it is stored in another form.
        """
        skeleton = self.memory.skeleton
        assert skeleton is not None
        short = _canonical(name, skeleton)
        group = self.memory.filling.get(self.memory.ties.get(short, short))
        if group is None or len(group.outputs) > 1:
            return []
        if not group.operations:
            return [(group.keys[0], None, None)]
        if not group.per_expert:
            return []
        import torch

        shape = skeleton.parameters[name]
        numbers = torch.arange(shape[1]).view(1, -1, 1).expand(shape[0], -1, 1)
        found: list[tuple[str, int | None, tuple[int, int] | None]] = []
        for part, keys in enumerate(group.inputs):
            for expert, key in enumerate(keys):
                rows = group.backward([numbers], skeleton.model, (part, expert)).reshape(-1).tolist()
                if rows != list(range(rows[0], rows[0] + self.shapes[key][0])):
                    return []
                found.append((key, expert, (rows[0], rows[-1] + 1)))
        return found

    def _in_memory(self, key: str) -> tuple[str, str | None]:
        """In-memory name for `key`, as the loader finds it, and the converter pattern it matched."""
        skeleton, renamer = self.memory.skeleton, self.memory.renamer
        assert skeleton is not None and renamer is not None
        known = (name for name in (key, skeleton.prefix + key) if name in skeleton.parameters)
        name = next(known, None)
        return renamer.rename(key) if name is None else (name, None)

    def _holder(self, key: str) -> str | None:
        """Stored key that the loader would fill from the same place as `key`."""
        skeleton = self.memory.skeleton
        assert skeleton is not None
        name, source = self._in_memory(key)
        short = _canonical(name, skeleton)
        group = self.memory.filling.get(self.memory.ties.get(short, short))
        if group is None or (source is None) != (not group.operations) or len(group.outputs) > 1:
            return None
        if source is None:
            return group.keys[0]
        keys = group.inputs[group.sources.index(source)]
        numbers = [int(part) for part in key.split(".") if part.isdigit()]
        at = numbers[-1] if "*" in source and numbers else 0  # the expert is the last number of its path
        return keys[at] if at < len(keys) else None

    def _by_prefix(self, key: str) -> str | None:
        """Without a class: the only stored key that differs from `key` by a first name."""
        short = key.partition(".")[2]
        wanted = (key, short) if "." in short else (key,)
        found = [name for name in self.shapes if name in wanted or name.partition(".")[2] in wanted]
        return found[0] if len(found) == 1 else None


def with_modules(layout: Layout, shapes: Mapping[str, Shape]) -> Layout:
    """A layout with tensors of modules that stand outside the class: they count as heads, under their stored keys.

    Args:
        shapes: stored key -> shape. A 2-D `weight` is one matrix.
    """
    if not shapes:
        return layout
    memory = replace(
        layout.memory,
        parameters={**layout.memory.parameters, **shapes},
        groups=(*layout.memory.groups, *(Group(key, (key,), ((key,),)) for key in shapes)),
        heads=layout.memory.heads | {*shapes},
    )
    return replace(
        layout,
        shapes={**layout.shapes, **shapes},
        canonical={**layout.canonical, **{key: key for key in shapes}},
        heads=(*layout.heads, *shapes),
        blocks={**layout.blocks, **{key: guessed_blocks(key, shape) for key, shape in shapes.items()}},
        memory=memory,
    )


def describe_layout(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], *, origin: str, trust_remote_code: bool = False
) -> Layout:
    """What the stored tensors of a checkpoint mean, without reading them.

    The class is the first of config.json's `architectures` if transformers has it, else what AutoModel gives for its
    `model_type`. A model with code of its own (`auto_map`) is built only with `trust_remote_code`; without it, stored
    keys stand for themselves: no heads, ties, vocabulary or missing tensors are known, a 2-D `weight` that is not
    called an embedding counts as one matrix, and `correspondence.match` allows for a different first name ("model.").

    Args:
        config: config.json.
        shapes: stored key -> shape, in stored order, from the safetensors headers.
        origin: what messages call the checkpoint; with `trust_remote_code` also where its code is: a folder,
            "org/name" or "org/name@revision".

    Raises:
        UnsupportedError: quantised, or no class can be built from config.json.
        ShapeError: tensors do not have the shapes that config.json describes.
        CorruptFileError: a parameter is stored twice in different layouts.
    """
    if config.get("auto_map"):  # the answer depends on code of the model's own, so it is not cached
        return _described(config, shapes, origin, trust_remote_code)
    fresh: list[Layout] = []

    def ask() -> Any:
        fresh.append(_described(config, shapes, origin, trust_remote_code))
        return _plain(fresh[0])

    answer = cached_answer("layouts", [relevant(config), [[key, list(shape)] for key, shape in shapes.items()]], ask)
    return fresh[0] if fresh else _layout(answer, origin, partial(_skeleton, config, shapes, origin))


def _described(config: Mapping[str, Any], shapes: Mapping[str, Shape], origin: str, trust_remote_code: bool) -> Layout:
    skeleton = build(config, shapes, origin, trust_remote_code)
    model_type = str(config.get("model_type") or "")
    if skeleton is None:
        architecture = str(next(iter(config.get("architectures") or ()), ""))
        return _unknown(architecture, model_type, dict(shapes), origin)
    groups, strange = trace(skeleton, shapes, origin)
    filled = {name for group in groups if complete(group, skeleton, shapes, origin) for name in group.outputs}
    skeleton = _apart(skeleton, config, filled)
    tied, groups = _ties(skeleton, groups)
    named = _named(skeleton, groups, strange)
    heads = skeleton.heads()
    memory = MemoryLayout(
        origin=origin,
        parameters={
            **{_canonical(name, skeleton): shape for name, shape in skeleton.parameters.items()},
            **{named[key]: tuple(shapes[key]) for key in strange},
        },
        groups=(
            *(_renamed(group, skeleton) for group in groups if group.name in filled or not group.operations),
            *(Group(named[key], (named[key],), ((key,),)) for key in strange),
        ),
        ties={_canonical(copy, skeleton): _canonical(shared, skeleton) for copy, shared in skeleton.ties.items()},
        heads=frozenset(_canonical(name, skeleton) for name in heads),
        strange=frozenset(named[key] for key in strange),
        submodels=_submodels(skeleton),
        build=lambda: skeleton,
    )
    outputs = {key: group.outputs for group in groups for key in group.keys}
    return Layout(
        architecture=skeleton.title,
        model_type=model_type or str(skeleton.model.config.model_type),
        shapes=dict(shapes),
        canonical={key: named[key] for key in shapes},
        tied=tied,
        heads=tuple(key for key in shapes if key in outputs and key not in tied and outputs[key][0] in heads),
        missing=missing(skeleton, filled),
        unexpected=tuple(key for key in shapes if key in strange),
        vocab_axis=_vocabulary(skeleton, groups, shapes),
        blocks=_blocks(skeleton, groups, shapes),
        memory=memory,
    )


def _skeleton(config: Mapping[str, Any], shapes: Mapping[str, Shape], origin: str) -> Skeleton:
    skeleton = _described(config, shapes, origin, False).memory.skeleton
    assert skeleton is not None
    return skeleton


def _plain(layout: Layout) -> dict[str, Any] | None:
    """A layout as JSON values; None if stored tensors have to be converted by transformers' own objects."""
    memory = layout.memory
    if memory.build is None or any(group.operations for group in memory.groups):
        return None
    kinds = list(dict.fromkeys(layout.blocks.values()))  # most tensors have the same few
    numbers = {blocks: i for i, blocks in enumerate(kinds)}
    return {
        "architecture": layout.architecture,
        "model_type": layout.model_type,
        "shapes": list(layout.shapes.items()),
        "canonical": layout.canonical,
        "tied": layout.tied,
        "heads": layout.heads,
        "missing": layout.missing,
        "unexpected": layout.unexpected,
        "vocab_axis": layout.vocab_axis,
        "kinds": [[asdict(block) for block in blocks] for blocks in kinds],
        "blocks": [numbers[layout.blocks[key]] for key in layout.shapes],
        "memory": {
            "parameters": memory.parameters,
            "groups": [
                [group.name, group.outputs, group.inputs, group.sources, group.targets] for group in memory.groups
            ],
            "ties": memory.ties,
            "heads": sorted(memory.heads),
            "strange": sorted(memory.strange),
            "submodels": memory.submodels,
        },
    }


def _layout(plain: Mapping[str, Any], origin: str, build: Callable[[], Skeleton]) -> Layout:
    """The layout that `_plain` wrote down."""
    kinds = [
        tuple(Segment(**{**block, "ranges": _tuples(block["ranges"])}) for block in blocks)
        for blocks in plain["kinds"]
    ]
    said = plain["memory"]
    memory = MemoryLayout(
        origin,
        parameters={name: tuple(shape) for name, shape in said["parameters"].items()},
        groups=tuple(
            Group(name, tuple(outputs), _tuples(inputs), (), tuple(sources), tuple(targets))
            for name, outputs, inputs, sources, targets in said["groups"]
        ),
        ties=said["ties"],
        heads=frozenset(said["heads"]),
        strange=frozenset(said["strange"]),
        submodels=_tuples(said["submodels"]),
        build=build,
    )
    shapes = {key: tuple(shape) for key, shape in plain["shapes"]}
    return Layout(
        architecture=plain["architecture"],
        model_type=plain["model_type"],
        shapes=shapes,
        canonical=plain["canonical"],
        tied=plain["tied"],
        heads=tuple(plain["heads"]),
        missing=tuple(plain["missing"]),
        unexpected=tuple(plain["unexpected"]),
        vocab_axis=plain["vocab_axis"],
        blocks={key: kinds[number] for key, number in zip(shapes, plain["blocks"], strict=True)},
        memory=memory,
    )


def _tuples(lists: list[list[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(entry) for entry in lists)


def _unknown(architecture: str, model_type: str, shapes: dict[str, Shape], origin: str) -> Layout:
    names = {key: key for key in shapes}
    first = dict.fromkeys(key.partition(".")[0] for key in shapes if "." in key)
    memory = MemoryLayout(
        origin,
        parameters=shapes,
        groups=tuple(Group(key, (key,), ((key,),)) for key in shapes),
        submodels=(("", ""), *((name, "") for name in first)),
    )
    blocks = {key: guessed_blocks(key, shape) for key, shape in shapes.items()}
    return Layout(architecture, model_type, shapes, names, {}, (), (), (), {}, blocks, memory)


def _canonical(name: str, skeleton: Skeleton) -> str:
    """Name without the class's prefix, unless a head would then be called the same."""
    short = name.removeprefix(skeleton.prefix)
    return name if short != name and short in skeleton.parameters else short


def _apart(skeleton: Skeleton, config: Mapping[str, Any], filled: set[str]) -> Skeleton:
    """The skeleton without the tie of an output embedding that config.json and file agree to keep apart.

    The T5 family ties in its class whatever config.json says, and remembers in `scale_decoder_outputs` what it said.
    """
    said = (config.get("tie_word_embeddings"), config.get("scale_decoder_outputs"))
    if not skeleton.ties or not any(value is False for value in said):
        return skeleton
    own = skeleton.output_embedding()
    ties = {name: shared for name, shared in skeleton.ties.items() if name not in own & filled or shared not in filled}
    return replace(skeleton, ties=ties)


def _renamed(group: Group, skeleton: Skeleton) -> Group:
    """The group with canonical outputs."""
    return replace(group, outputs=tuple(_canonical(name, skeleton) for name in group.outputs))


def _ties(skeleton: Skeleton, groups: list[Group]) -> tuple[dict[str, str], list[Group]]:
    """Stored copies with their owners, and the groups with the owner renamed to the parameter that is shared.

    A file may hold only the parameter that the class treats as the copy (`lm_head.weight` without the embedding);
    then that one owns the value.
    """
    owner: dict[str, str] = {}
    plain = [group for group in groups if not group.operations]
    for group in sorted(plain, key=lambda group: group.name in skeleton.ties):  # the shared parameter itself first
        owner.setdefault(skeleton.ties.get(group.name, group.name), group.keys[0])
    tied: dict[str, str] = {}
    renamed = []
    for group in groups:
        shared = skeleton.ties.get(group.name)
        if shared is None or group.operations:
            renamed.append(group)
        elif owner[shared] == group.keys[0]:
            renamed.append(Group(shared, (shared,), group.inputs))
        else:
            tied[group.keys[0]] = owner[shared]
            renamed.append(group)
    return tied, renamed


def _named(skeleton: Skeleton, groups: list[Group], strange: Mapping[str, str]) -> dict[str, str]:
    """Stored key -> canonical name, each once."""
    named: dict[str, str] = {}
    for group in groups:
        name = "+".join(_canonical(output, skeleton) for output in group.outputs)
        several = len(group.keys) > 1 or any("*" in source for source in group.sources)
        for part, keys in enumerate(group.inputs):
            for index, key in enumerate(keys):
                named[key] = f"{name}#{index}.{part}" if several else name
    taken = set(named.values())
    for key, name in strange.items():
        short = _canonical(name, skeleton)
        named[key] = f"{key}#unused" if short in taken or short in skeleton.parameters else short
        taken.add(named[key])
    return named


def _submodels(skeleton: Skeleton) -> tuple[tuple[str, str], ...]:
    prefix = skeleton.prefix.removesuffix(".")
    return tuple(
        ("" if path == prefix else path.removeprefix(skeleton.prefix), title)
        for path, title in skeleton.submodels
        if not prefix or not path or path == prefix or path.startswith(skeleton.prefix)
    )


def _blocks(skeleton: Skeleton, groups: list[Group], shapes: Mapping[str, Shape]) -> dict[str, tuple[Segment, ...]]:
    memory = memory_blocks(skeleton.model)
    blocks: dict[str, tuple[Segment, ...]] = {}
    for group in groups:
        shared = [skeleton.ties.get(name, name) for name in group.outputs]
        parts = tuple(memory.get(name, (WHOLE,)) for name in shared)
        sizes = tuple((*skeleton.parameters[name], 0)[0] for name in shared)
        for keys in group.inputs:
            if keys:
                same = stored_blocks(group, shapes[keys[0]], sizes, parts)
                blocks.update(dict.fromkeys(keys, same))
    return {key: blocks.get(key, (WHOLE,)) for key in shapes}


def _vocabulary(skeleton: Skeleton, groups: list[Group], shapes: Mapping[str, Shape]) -> dict[str, int]:
    axes = skeleton.vocabulary()
    found = {group.keys[0]: axes[group.name] for group in groups if not group.operations and group.name in axes}
    return {key: found[key] for key in shapes if key in found}
