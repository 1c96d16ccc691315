"""How transformers' loader pairs stored keys with parameters: the only module that runs its renames and converters.

They are the loader's own objects (`transformers.conversion_mapping`), never a copy of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.layout.skeleton import Shape, Skeleton, one_line
from hfmerge.checkpoint.other_forms import of_shape
from hfmerge.errors import CorruptFileError, ShapeError


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps, WeightConverter


@dataclass(frozen=True)
class Group:
    """Stored tensors that fill in-memory tensors together; one to one unless `operations` is not empty.

    Attributes:
        name: in-memory name of the first output, which the operations are told about.
        outputs: names of the in-memory tensors, in the order of `targets`.
        inputs: stored keys, one tuple for each of `sources`, in loading order (experts ascending).
        operations: transformers' operations from `inputs` to `outputs`; empty for a renamed tensor.
        sources, targets: the converter's patterns, which label the operations' inputs and outputs.
    """

    name: str
    outputs: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]
    operations: tuple[ConversionOps, ...] = ()
    sources: tuple[str, ...] = ("",)
    targets: tuple[str, ...] = ("",)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """All stored keys, in loading order."""
        return tuple(key for keys in self.inputs for key in keys)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Class names of the operations."""
        return tuple(type(operation).__name__ for operation in self.operations)

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """Equal for two groups exactly if they store the same in-memory tensors in the same way."""
        operations = tuple((type(op).__name__, repr(sorted(vars(op).items()))) for op in self.operations)
        return operations, len(self.outputs), tuple(len(keys) for keys in self.inputs)

    @cached_property
    def per_expert(self) -> bool:
        """Whether the stored tensors are slices along the first axis of one in-memory stack."""
        first, *more = self.kinds or ("",)
        along = [getattr(operation, "dim", None) for operation in self.operations]
        return first == "MergeModulelist" and set(more) <= {"Concatenate"} and along[0] == 0 and 0 not in along[1:]

    def forward(self, stored: Mapping[str, Tensor], model: PreTrainedModel | None) -> tuple[Tensor, ...]:
        """The in-memory tensors, one for each of `outputs`, from all of `inputs`."""
        if not self.operations:
            return (stored[self.keys[0]],)
        values: dict[str, Any] = {
            source: [stored[key] for key in keys] for source, keys in zip(self.sources, self.inputs, strict=True)
        }
        values = self._run(self.operations, values, self.sources, self.targets, model)
        return tuple(_single(values[target]) for target in self.targets)

    def backward(self, memory: Sequence[Tensor], model: PreTrainedModel | None, at: tuple[int, int]) -> Tensor:
        """The stored tensor `inputs[at[0]][at[1]]`, from the in-memory tensors in the order of `outputs`."""
        if not self.operations:
            return memory[0]
        part, index = at
        if self.per_expert:  # only the one expert that is asked for, not all of them
            memory, index = [tensor[index : index + 1] for tensor in memory], 0
        values: dict[str, Any] = {target: [tensor] for target, tensor in zip(self.targets, memory, strict=True)}
        operations = tuple(operation.reverse_op for operation in reversed(self.operations))
        values = self._run(operations, values, self.targets, self.sources, model)
        return _single(values[self.sources[part].replace("*", str(index))])

    def _run(
        self,
        operations: tuple[ConversionOps, ...],
        values: dict[str, Any],
        sources: tuple[str, ...],
        targets: tuple[str, ...],
        model: PreTrainedModel | None,
    ) -> dict[str, Any]:
        for operation in operations:
            values = operation.convert(
                values,
                source_patterns=list(sources),
                target_patterns=list(targets),
                full_layer_name=self.name,
                model=model,
                config=None if model is None else model.config,
                missing_keys=None,
            )
        return values


def _single(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class Renamer:
    """A fresh copy of the loader's renames and converters: some of them remember the keys they have seen."""

    def __init__(self, skeleton: Skeleton):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(skeleton.model)
        self._skeleton = skeleton
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {source: entry for entry in self._converters for source in entry.source_patterns}

    def rename(self, key: str) -> tuple[str, str | None]:
        """In-memory name for `key`, as the loader finds it, and the converter pattern it matched."""
        from transformers.core_model_loading import rename_source_key

        prefix, known = self._skeleton.model.base_model_prefix, self._skeleton.parameters
        name, source = rename_source_key(key, self._renamings, self._converters, prefix, known)
        if name not in known and key in known:
            name, source = rename_source_key(key, [], [], prefix, known)
        return name, source

    def names(self, keys: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """What `rename` gives for all keys of a checkpoint, asked in the loader's order."""
        from transformers.core_model_loading import dot_natural_key

        return {key: self.rename(key) for key in sorted(keys, key=dot_natural_key)}


def trace(skeleton: Skeleton, shapes: Mapping[str, Shape], origin: str) -> tuple[list[Group], dict[str, str]]:
    """Which stored keys fill which in-memory tensors, as the loader pairs them.

    Returns:
        The groups in loading order, and each key the class has no place for with the in-memory name it was given.

    Raises:
        CorruptFileError: one parameter is stored in two layouts at once.
    """
    renamer = Renamer(skeleton)
    filled: dict[str, dict[str | None, list[str]]] = {}
    unexpected: dict[str, str] = {}
    for key, (name, source) in renamer.names(shapes).items():
        parts = filled.setdefault(name, {}) if name in skeleton.parameters else None
        if parts is None or (source is None and None in parts):  # of two keys for one parameter the first is loaded
            unexpected[key] = name
        elif parts and (None in parts) != (source is None):
            other = next(iter(parts.values()))[0]
            raise CorruptFileError(f"{origin}: {other} and {key} both fill {name}, in two layouts; keep one of them")
        else:
            parts.setdefault(source, []).append(key)
    groups = []
    for name, parts in filled.items():
        source = next(iter(parts))
        if source is None:
            groups.append(Group(name, (name,), (tuple(parts[None]),)))
        else:
            groups.append(_decided(_converted(name, renamer.converters[source], parts), shapes, skeleton))
    return groups, unexpected


def _converted(name: str, converter: WeightConverter, parts: Mapping[str | None, list[str]]) -> Group:
    targets = tuple(converter.target_patterns)
    head, found, tail = name.partition(targets[0])
    outputs = tuple(head + target + tail for target in targets) if found else (name,)
    inputs = tuple(tuple(parts.get(source, ())) for source in converter.source_patterns)
    return Group(name, outputs, inputs, tuple(converter.operations), tuple(converter.source_patterns), targets)


def _decided(group: Group, shapes: Mapping[str, Shape], skeleton: Skeleton) -> Group:
    """The group with a `Transpose` that looks at shapes decided: as it is, it cannot be run backward."""
    from transformers.core_model_loading import Transpose

    operation = group.operations[0]
    if not isinstance(operation, Transpose) or not operation.check_dims or len(group.operations) > 1:
        return group
    if shapes[group.keys[0]] == skeleton.parameters[group.name]:
        return Group(group.name, group.outputs, group.inputs)
    return replace(group, operations=(Transpose(operation.dim0, operation.dim1),))


def complete(group: Group, skeleton: Skeleton, shapes: Mapping[str, Shape], origin: str) -> bool:
    """Whether the stored tensors of a group fill its in-memory tensors; False if some are not there.

    Raises:
        ShapeError: they do not fit the class that config.json describes.
    """
    import torch

    if any(name not in skeleton.parameters for name in group.outputs):
        raise ShapeError(f"{origin}: {group.keys[0]} fills {', '.join(group.outputs)}, not all in {skeleton.title}")
    expected = [skeleton.parameters[name] for name in group.outputs]
    if not all(group.inputs) or (group.per_expert and len({len(keys) for keys in group.inputs}) > 1):
        return False
    stored = {key: torch.empty(shapes[key], device="meta") for key in group.keys}
    torn = of_shape(shapes[group.keys[0]], expected[0])
    try:
        found = [tuple(value.shape) for value in group.forward(stored, skeleton.model)]
    except (RuntimeError, ValueError, IndexError) as error:
        why = torn or one_line(error)
        raise ShapeError(f"{origin}: {group.keys[0]} does not fit {group.name}: {why}") from error
    if found == expected:
        return True
    if group.per_expert and found[0][0] < expected[0][0] and found[0][1:] == expected[0][1:]:
        return False
    why = torn or "does it belong to these weights?"
    raise ShapeError(
        f"{origin}: {group.keys[0]} gives {group.name} the shape {found[0]}, config.json describes {expected[0]}; "
        f"{why}"
    )


def missing(skeleton: Skeleton, filled: set[str]) -> tuple[str, ...]:
    """In-memory names that nothing fills and that transformers would report; tied copies excluded."""
    ignored = [re.compile(pattern) for pattern in (skeleton.model._keys_to_ignore_on_load_missing or ())]
    reached = {skeleton.ties.get(name, name) for name in filled}
    return tuple(
        name
        for name in skeleton.parameters
        if name not in skeleton.ties and name not in reached and not any(p.search(name) for p in ignored)
    )
