"""One model's task vectors: maps each stored tensor of the base to what changes it, and reads the change.

Full checkpoints give dense differences, LoRA adapters factors. Other adapters give the difference between what PEFT's
layers make of the base and the base. `base+adapter` on another model gives the sum of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hfmerge.checkpoint.headers import TensorEntry
from hfmerge.checkpoint.layout import Convert, Origin
from hfmerge.checkpoint.lora import AdapterMap, LoraOrigin, PeftOrigin
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.peft_layers import PeftLayers, Place, layer_key
from hfmerge.checkpoint.reader import Reader, Rows
from hfmerge.checkpoint.streaming.session import Streaming
from hfmerge.checkpoint.vocabulary import MergedVocabulary, aligned_change, extended_base, extended_factors
from hfmerge.errors import ShapeError
from hfmerge.task_vector import Dense, LowRank, TaskVector


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """The change of one model, in the base's stored layout.

    Attributes:
        source: the model.
        full: base stored key -> where a full checkpoint (or a `modules_to_save` copy) holds the new value.
        lora: base stored key -> factors.
        layers: base stored key -> the module by whose layer PEFT changes it.
        places: all modules that an adapter changes whose modules share tensors, in the model's order.
        beneath: origins in the full model under a `base+adapter` adapter.
        tied: stored keys of the model that are copies -> the keys they copy.
        apart: parameters that the base ties and this model changes at this end alone; what it changes in them is in
            no other field. The planner unties the base unless the recipe leaves them out.
    """

    source: Model
    full: dict[str, Origin] = field(default_factory=dict)
    lora: dict[str, LoraOrigin] = field(default_factory=dict)
    layers: dict[str, PeftOrigin] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    beneath: dict[str, Origin] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()

    def rank(self, key: str) -> int | None:
        """Rank of the change of a stored tensor: 0 for none, None for a dense one."""
        if key in self.full or key in self.beneath or key in self.layers:
            return None
        if key in self.lora and self.lora[key].dense:
            return None
        return self.lora[key].rank if key in self.lora else 0

    def sliceable(self, key: str) -> bool:
        """True when the change can be read some rows at a time."""
        origins = [origins[key] for origins in (self.full, self.beneath) if key in origins]
        return key not in self.lora and key not in self.layers and not any(origin.converted for origin in origins)

    def stored_keys(self, key: str) -> tuple[str, ...]:
        """Stored tensors of this model that are read for one of the base."""
        lora = self.lora.get(key)
        return (
            *(self.full[key].keys if key in self.full else ()),
            *(lora.keys if lora is not None else ()),
            *(self.layers[key].keys if key in self.layers else ()),
        )

    def stored_keys_beneath(self, key: str) -> tuple[str, ...]:
        """Stored tensors of the model under a `base+adapter` adapter that are read for one of the base."""
        return tuple(self.beneath[key].keys) if key in self.beneath else ()

    def stored_bytes(self, key: str, *, streamed: bool = False) -> int:
        """Bytes read from this model for one stored tensor of the base; of what is streamed alone if asked."""
        return sum(
            place.tensors[name].nbytes
            for place, names in (
                (self.source, self.stored_keys(key)),
                (self.source.beneath, self.stored_keys_beneath(key)),
            )
            if place is not None
            for name in names
            if not streamed or place.tensors[name].file in place.streams
        )


class DeltaReader:
    """Reads the task vectors of one model. Safe to call from several threads.

    Args:
        delta: what to read.
        streaming: holds the files that the model streams; may be left out where it streams none.
        converters: base stored key -> what makes its tensor, of all origins that are converted.
        base: the base of the merge; may be left out where PEFT's layers change nothing.
        exact: give the changes that PEFT's layers make in float64, so that base and change add up to PEFT's result.
    """

    def __init__(
        self,
        delta: Delta,
        streaming: Streaming | None = None,
        converters: Mapping[str, Convert] | None = None,
        base: Model | None = None,
        *,
        exact: bool = False,
    ):
        self.delta, self._converters, self._exact = delta, converters or {}, exact
        self._base = Reader(base, streaming) if base is not None and delta.layers else None
        source = delta.source
        self._layers = PeftLayers(source.snapshot.label, source.adapter or {}, delta.places)
        self.reader = Reader(delta.source, streaming)
        under = delta.source.beneath
        self.under = Reader(under, streaming) if under is not None else None

    def close(self) -> None:
        """Close the files."""
        self.reader.close()
        for reader in (self.under, self._base):
            if reader is not None:
                reader.close()

    def expect(self, keys: Sequence[str]) -> None:
        """Announce for which stored tensors of the base changes are read next, in their order."""
        self.reader.expect(name for key in keys for name in self.delta.stored_keys(key))
        if self.under is not None:
            self.under.expect(name for key in keys for name in self.delta.stored_keys_beneath(key))

    def check_finite(self, key: str) -> None:
        """Raise NonFiniteError if what the model holds for a stored tensor of the base has NaN or Inf."""
        if key in self.delta.full:
            for name in self.delta.full[key].keys:
                self.reader.check_finite(name)
        if key in self.delta.beneath and self.under is not None:
            for name in self.delta.beneath[key].keys:
                self.under.check_finite(name)
        if key in self.delta.lora:
            for name in self.delta.lora[key].keys:
                self.reader.check_finite(name)
        if key in self.delta.layers:
            for name in self.delta.layers[key].keys:
                self.reader.check_finite(name)

    def lies_as(self, key: str, entry: TensorEntry) -> str | None:
        """The stored tensor that is this model's value for one of the base, of its shape and unconverted, or None."""
        origin = self.delta.full.get(key)
        if origin is None or origin.converted or key in self.delta.lora or key in self.delta.layers:
            return None
        own = self.delta.source.tensors[origin.keys[0]]
        return origin.keys[0] if own.shape == entry.shape and own.floating else None

    def new_value(self, key: str, rows: Rows | None = None) -> Tensor | None:
        """The model's own float32 value for a stored tensor of the base, or some rows; None if it has no dense one."""
        if key in self.delta.layers:
            return self._layered(self.delta.layers[key])
        if key in self.delta.full:
            return self._assembled(self.reader, key, self.delta.full[key], rows)
        if key in self.delta.beneath and self.under is not None:
            return self._assembled(self.under, key, self.delta.beneath[key], rows)
        return None

    def own_rows(self, key: str) -> Tensor | None:
        """The model's own float32 value for a stored tensor whose rows are matched by token, factors added."""
        value = self.new_value(key)
        if value is not None and key in self.delta.lora:
            value = value + self.delta.lora[key].read(self.reader).to_dense()
        return value

    def _layered(self, origin: PeftOrigin) -> Tensor:
        """What PEFT's merge makes of a parameter of one module."""
        assert self._base is not None
        beside = {name: self._beneath_layer(key) for name, key in origin.base.items()}
        names = self.delta.source.tensors if self.delta.places else origin.keys
        read = partial(_all, self.reader, names)
        value = self._layers.merged(origin.place, beside, read, origin.changed)[origin.parameter]
        return value.contiguous()

    def _beneath_layer(self, key: str) -> Tensor:
        """The float32 value that an adapter's layer is put around: that of the model beneath it, or the base's."""
        if key in self.delta.beneath and self.under is not None:
            return self._assembled(self.under, key, self.delta.beneath[key], None)
        assert self._base is not None
        return self._base.value(key)

    def _assembled(self, reader: Reader, key: str, origin: Origin, rows: Rows | None) -> Tensor:
        if not origin.converted:
            return reader.value(origin.keys[0], rows)
        return self._converters[key]({name: reader.value(name) for name in origin.keys})

    def task_vector(
        self,
        key: str,
        base: Callable[[], Tensor],
        aligned: tuple[MergedVocabulary, int, int] | None = None,
        rows: Rows | None = None,
    ) -> TaskVector | None:
        """The change of one stored tensor, or None when the model does not touch it.

        Args:
            key: stored key of the base.
            base: gives the base's float32 value, in the output's rows; called only for a dense change.
            aligned: (vocabulary, index of this model, axis) for a tensor with one row per token.
            rows: only these rows, of a tensor that `sliceable` allows it for; `base` gives the same rows.
        """
        if aligned is not None and aligned[0].rows[aligned[1]] is not None:
            own = self.own_rows(key)
            return None if own is None else Dense(aligned_change(aligned[0], aligned[1], base(), own, aligned[2]))
        result: TaskVector | None = None
        value = self.new_value(key, rows)
        if value is not None:
            origin = base()
            if aligned is not None:
                vocabulary, model, axis = aligned
                result = Dense(aligned_change(vocabulary, model, origin, value, axis))
            elif value.shape != origin.shape:
                raise ShapeError(
                    f"{key}: base {tuple(origin.shape)} but {self.delta.source.snapshot.label} {tuple(value.shape)}"
                )
            elif self._exact and key in self.delta.layers:
                result = Dense(value.double().sub_(origin))
            else:
                # the value is a fresh tensor of this call, so it may be changed in place
                result = Dense(value.sub_(origin))
        if key in self.delta.lora:
            factors = self.delta.lora[key].read(self.reader)
            if aligned is not None and isinstance(factors, LowRank):
                factors = extended_factors(aligned[0], factors, aligned[2])
            result = factors if result is None else result + factors
        return result


def longer_base(
    vocabulary: MergedVocabulary, base: Tensor, models: Sequence[DeltaReader], key: str, axis: int
) -> Tensor:
    """The base's tensor in the output's rows; see `extended_base`."""
    if not vocabulary.added:
        return base
    matched = zip(models, vocabulary.rows, strict=True)
    values = [model.own_rows(key) if rows is not None else None for model, rows in matched]
    return extended_base(vocabulary, base, values, axis)


def full_delta(source: Model, origins: dict[str, Origin], tied: dict[str, str], apart: tuple[str, ...]) -> Delta:
    """Delta of a full checkpoint."""
    return Delta(source, full=origins, tied=tied, apart=apart)


def adapter_delta(source: Model, mapped: AdapterMap, under: Delta | None) -> Delta:
    """Delta of an adapter, on the base itself or on another full model, whose delta `under` is."""
    full = {key: Origin((name,)) for key, name in mapped.replaced.items()}
    beneath, apart = (dict(under.full), under.apart) if under is not None else ({}, ())
    apart = (*apart, *mapped.apart)
    return Delta(source, full, mapped.lora, mapped.layers, mapped.places, beneath, mapped.tied, apart)


def _all(reader: Reader, names: Iterable[str]) -> dict[str, Tensor]:
    """Stored tensors by their names; what is floating in float32, as PEFT loads it."""
    found = {layer_key(name): reader.stored(name) for name in names}
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
