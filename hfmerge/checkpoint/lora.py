"""LoRA adapters as task vectors: which factors change which stored tensor of the base, and by what scale.

The only place that knows PEFT's file format: key suffixes, alpha / r, rank-stabilised scaling, rank and alpha
patterns, `fan_in_fan_out`, `modules_to_save`. Formula: `delta W = scale * B @ A`, `scale = alpha / r`, or `alpha /
sqrt(r)` with `use_rslora`. Source: "LoRA", arXiv 2106.09685, section 4.1; "rsLoRA", arXiv 2312.03732; scaling as PEFT
applies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.lora_targets import Targets
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.other_forms import of_shape
from hfmerge.checkpoint.patterns import Patterns
from hfmerge.checkpoint.peft_kinds import (
    BIASED,
    PREFIXES,
    SHARING,
    adapter_kind,
    check_mergeable,
    is_plain,
    unknown_fields,
)
from hfmerge.checkpoint.peft_layers import PeftLayers, Place, layer_key, layer_place
from hfmerge.errors import CorruptFileError, ShapeError, UnsupportedError
from hfmerge.task_vector import Dense, LowRank, TaskVector
from hfmerge.validation.values import show


if TYPE_CHECKING:
    from torch import Tensor

    from hfmerge.checkpoint.layout import Layout
    from hfmerge.checkpoint.reader import Reader

PEFT_PREFIX = "base_model.model."
UNILORA_VALUES = "base_model.unilora_theta_d"
COPIED = ("weight", "bias")
BENEATH = ".base_layer"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
Ends = Mapping[str, tuple[str, ...]]
"""Stored key of an untied base -> all its stored keys that were tied with it, the owner of the value first."""
NO_ENDS: Ends = {}


@dataclass(frozen=True)
class LoraOrigin:
    """The factors that change one stored tensor of the base.

    Attributes:
        down_key, up_key: stored keys of A (r, in) and B (out, r).
        scale: factor of `B @ A`.
        rank: r.
        swapped: the stored tensor is (in, out): the change is `(B @ A)^T`.
        stack: for experts in one parameter: how many; else 0.
        expert: the one expert that the stored tensor holds; None where it holds all of them, one after the other.
        rows: half-open range of that expert's rows that the stored tensor holds.
        diagonal_key: stored key of one factor for each row of A (r, 1), if there are any.
    """

    down_key: str
    up_key: str
    scale: float
    rank: int
    swapped: bool
    stack: int = 0
    expert: int | None = None
    rows: tuple[int, int] | None = None
    diagonal_key: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All stored keys of the adapter that are read."""
        diagonal = () if self.diagonal_key is None else (self.diagonal_key,)
        return (self.down_key, self.up_key, *diagonal)

    @property
    def dense(self) -> bool:
        """The change is no product of two factors: the stored tensor holds all experts."""
        return self.stack > 0 and self.expert is None

    def read(self, reader: Reader) -> TaskVector:
        """The change as float32 factors shaped like the stored tensor; of all experts, multiplied out."""
        down, up = reader.value(self.down_key), reader.value(self.up_key)
        if self.stack:
            # as PEFT lays them out: (experts, r, in) and (out, r, experts)
            down, up = down.view(self.stack, self.rank, -1), up.view(-1, self.rank, self.stack)
            if self.expert is None:
                return Dense(_products(up, down, self.scale, swapped=self.swapped))
            down, up = down[self.expert], up[:, :, self.expert]
            up = up if self.rows is None else up[self.rows[0] : self.rows[1]]
        if self.diagonal_key is not None:
            down = down * reader.value(self.diagonal_key)
        up = up * self.scale
        if self.swapped:
            return LowRank(down.T.contiguous(), up.T.contiguous())
        return LowRank(up, down.clone())


@dataclass(frozen=True)
class PeftOrigin:
    """The module by whose layer PEFT changes one stored tensor of the base.

    Attributes:
        place: the module.
        parameter: which of its parameters the stored tensor is.
        keys: stored keys of the adapter's tensors for it.
        base: parameter of the module -> stored key of the base.
        changed: fields that stand in the place of the configuration's.
    """

    place: Place
    parameter: str
    keys: tuple[str, ...]
    base: dict[str, str]
    changed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterMap:
    """What an adapter holds, in terms of the base.

    Attributes:
        lora: base stored key -> factors.
        layers: base stored key -> the module by whose layer PEFT changes it.
        places: all modules that are changed, in the model's order, where they share tensors.
        replaced: base stored key -> adapter key of a whole copy (`modules_to_save`, or an embedding beneath a LoRA).
        heads: adapter key -> name in the model, for trained modules the base does not have.
        tied: adapter key of a second copy of a tied weight -> adapter key of the first copy; the two must be equal.
        apart: parameters, in the adapter's names, that the base ties and the adapter changes at this end alone. They
            are in no other field: the base has to be untied before their change has a place.
        notes: what of the adapter is left out, and why; one sentence each.
        rows: of its copies of parameters with one row per token, where they are not as many as the base's.
    """

    lora: dict[str, LoraOrigin] = field(default_factory=dict)
    layers: dict[str, PeftOrigin] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    replaced: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: int | None = None


def map_adapter(source: Model, base: Layout, ends: Ends = NO_ENDS) -> AdapterMap:
    """Match every tensor of an adapter with the base, from headers alone.

    Args:
        base: layout of the base.
        ends: of a base that was untied: stored key -> all stored keys that were tied with it, itself included.

    Raises:
        UnsupportedError: PEFT cannot merge it. ShapeError: factors do not fit the base. CorruptFileError: a factor is
            missing.
    """
    check_mergeable(source.snapshot.label, source.adapter or {})
    return _Mapping(source, base, ends).map()


class _Mapping:
    """The matching of one adapter with a base; see `map_adapter`."""

    def __init__(self, source: Model, base: Layout, ends: Ends):
        self.source, self.base, self.ends = source, base, ends
        self.label, self.config = source.snapshot.label, source.adapter or {}
        self.patterns = Patterns()
        self.lora: dict[str, LoraOrigin] = {}
        self.own: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        self.heads: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self.apart: list[str] = []
        self.notes: list[str] = []
        self.targets = Targets(self.config, self.patterns)
        self.skipped: list[str] = []
        self.kind = adapter_kind(self.config)
        self.layers: dict[str, PeftOrigin] = {}
        self.places: list[Place] = []
        self.peft = PeftLayers(self.label, self.config)
        self.checked: set[Any] = set()
        self.unread: str | None = None
        self.rows: dict[str, int] = {}

    def map(self) -> AdapterMap:
        """Sort all tensors."""
        plain, held = is_plain(self.config), self._held()
        for module, keys in held.items():
            factors = _factors(module, keys) if plain else None
            path = _without(module)
            parameters = self._parameters_of(path)
            if parameters:
                self._add_parameter(path, module.count(BENEATH), parameters, factors)
            elif factors is not None and len(self._shape_of(module)) == 2:
                self._add_lora(module, *factors)
            elif self.kind == "ADALORA" and len(keys) == 3 and len(self._shape_of(module)) == 2:
                self._add_adalora(module, keys)
            else:
                self._add_layer(module, keys)
        if self.kind in SHARING:
            self._share(held)
        self._note_left_out()
        replaced = dict(self.own)
        for target, key in self.shared.items():
            replaced.setdefault(target, key)
        for target, key in self.shared.items():
            for end in self.ends.get(target, ()):
                replaced.setdefault(end, key)
                if end in self.shared and key < self.shared[end]:
                    # both were loaded into one tensor, so it is not known which of them counts
                    self.tied.setdefault(self.shared[end], key)
        if not self.lora and not self.layers and not replaced and not self.apart:
            raise UnsupportedError(f"{self.label}: changes no parameter of the base {self.base.architecture}.")
        return AdapterMap(
            self.lora, self.layers, tuple(self.places), replaced, self.heads, self.tied, tuple(self.apart),
            tuple(self.notes), self._other_rows(replaced),
        )  # fmt: skip

    def _held(self) -> dict[str, list[str]]:
        """Module -> the adapter's tensors for its layer; tensors that are copies of parameters are sorted here."""
        held: dict[str, list[str]] = {}
        copies, prefix = [], PREFIXES[self.kind]
        for key in self.source.tensors:
            path = key.removeprefix(PEFT_PREFIX)
            if self.kind in SHARING and path == key and key.startswith("base_model."):
                continue  # of all modules together
            if self.kind == "LN_TUNING":
                path = path.replace(f".{prefix}", ".")
            module, found, _ = path.partition(f".{prefix}")
            if not found and path.endswith(TOKEN_ROWS):
                module, found = path.removesuffix(TOKEN_ROWS), TOKEN_ROWS
            if found:
                held.setdefault(module, []).append(key)
            else:
                copies.append((key, path))
        for key, path in copies:
            module, inside, name = path.partition(".base_layer.")
            if inside and module in held and not (is_plain(self.config) and name in COPIED):
                held[module].append(key)
            elif any(f".{other}" in path for other in PREFIXES.values()) or (inside and name not in COPIED):
                raise UnsupportedError(
                    f"{self.label}: {key} is no part of a {self.kind} adapter; `peft_type` in adapter_config.json is "
                    "another kind's, or the file is."
                )
            else:
                # what PEFT saves beneath a layer is loaded in place of the base's
                self._add_copy(key, path.replace(".base_layer.", "."))
        return held

    def _note_left_out(self) -> None:
        """Say what of the adapter is left out."""
        if strange := unknown_fields(self.config):
            self.notes.append(
                f"{self.label}: adapter_config.json has {', '.join(strange[:3])}, which no {self.kind} adapter of the "
                "PEFT that is installed has; left out, as PEFT does."
            )
        if self.skipped:
            names = self.skipped
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.notes.append(
                f"{self.label}: adapter_config.json does not name {', '.join(names[:3])}{more}, for which the file "
                "has factors; they are left out, as PEFT does."
            )
        if self.unread is not None:
            self.notes.append(
                f"{self.label}: which modules adapter_config.json names cannot be told here ({self.unread}); all "
                "factors in the file are merged."
            )

    def _other_rows(self, replaced: Mapping[str, str]) -> int | None:
        """How many tokens the adapter's copies have rows for, where the base has other ones."""
        axes = self.base.vocab_axis
        grown = [key for key, rows in self.rows.items() if rows != self.base.shapes[key][axes[key]]]
        if not grown:
            return None
        if len({*self.rows.values()}) > 1:
            both = " and ".join(f"{rows} of {key}" for key, rows in sorted(self.rows.items()))
            raise ShapeError(f"{self.label}: holds rows of differing numbers of tokens: {both}; save it again.")
        for key in grown:
            if key not in replaced and key in self.lora:
                raise ShapeError(
                    f"{self.label}: its factors change {self.rows[key]} rows of {key}, of which the base has "
                    f"{self.base.shapes[key][axes[key]]}, and it holds no copy of the others; save it with "
                    "`save_embedding_layers=True`."
                )
        return self.rows[grown[0]]

    def _fits(self, target: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has the shape of the base's, but for how many tokens it has rows for."""
        wanted, axis = self.base.shapes[target], self.base.vocab_axis.get(target)
        if axis is None or len(shape) != len(wanted):
            return shape == wanted
        if self.rows.setdefault(target, shape[axis]) != shape[axis]:
            raise ShapeError(
                f"{self.label}: its copy of {target} and its factors have {self.rows[target]} and {shape[axis]} rows; "
                "save it again."
            )
        return (*shape[:axis], *shape[axis + 1 :]) == (*wanted[:axis], *wanted[axis + 1 :])

    def _shape_of(self, module: str) -> tuple[int, ...]:
        """Shape of the stored weight of a module. Raises ShapeError: the base has none."""
        target = self.base.parameter_of_module(module)
        if target is None:
            raise ShapeError(f"{self.label}: changes {module}, which the base {self.base.architecture} does not have.")
        return self.base.shapes[target]

    def _parameters_of(self, module: str) -> list[str]:
        """Names of those parameters of a module that `target_parameters` names, in the module's order."""
        named = self.config.get("target_parameters") or ()
        found = self.base.module(module) if named else None
        if found is None:
            return []
        own = [name for name, _ in found[1].named_parameters(recurse=False)]
        return [name for name in own if any(f".{module}.{name}".endswith(f".{target}") for target in named)]

    def _add_parameter(
        self, path: str, depth: int, parameters: Sequence[str], factors: tuple[str, str] | None
    ) -> None:
        """Match the factors of a parameter that is named itself; the first of several in one module lies innermost."""
        at = len(parameters) - 1 - depth
        if factors is None or at < 0 or any(key not in self.source.tensors for key in factors):
            raise CorruptFileError(
                f"{self.label}: {path} has no two factors for each of {', '.join(parameters)}; the adapter is "
                "incomplete."
            )
        found = self.base.module(path)
        assert found is not None
        name = f"{path}.{parameters[at]}"
        swapped = bool(getattr(found[1], "is_transposed", False))
        wanted = tuple(getattr(found[1], parameters[at]).shape)
        down, up = (self.source.tensors[key].shape for key in factors)
        stack = wanted[0] if len(wanted) == 3 else 0
        many = stack or 1
        shape = (up[0], down[1]) if len(down) == len(up) == 2 else ()
        full = wanted[1:] if stack else wanted
        fits = down[0] == up[-1] and down[0] % many == 0 and shape == (full[::-1] if stack and swapped else full)
        if not fits or stack == 1:
            raise ShapeError(f"{self.label}: {name}: factors {down} and {up} do not fit {wanted}.")
        scale, rank = self._scale(name, down[0] // many)
        origin = LoraOrigin(*factors, scale, rank, swapped and stack > 0, stack)
        places = self.base.places_of(f"{found[0]}.{parameters[at]}")
        if not places or (stack and swapped and places[0][1] is not None):
            raise UnsupportedError(
                f"{self.label}: the base {self.base.architecture} stores {name} in a form that factors cannot be "
                "brought into; merge the adapter into it with peft (merge_and_unload) and give the full model."
            )
        for key, expert, rows in places:
            self.lora[key] = replace(origin, expert=expert, rows=rows)

    def _add_adalora(self, module: str, keys: Sequence[str]) -> None:
        """Match the factors of an AdaLoRA: the change is `B diag(E) A` times its scale."""
        if not self._is_targeted(module):
            self.skipped.append(module)
            return
        place, target = self._place(module), self.base.parameter_of_module(module)
        assert target is not None
        self._check_layer(place, keys, {})
        if self._is_tied(target):
            self.apart.append(f"{module}.weight")
            return
        down, up, diagonal = (f"{PEFT_PREFIX}{module}.lora_{part}" for part in "ABE")
        rank, alpha = self.source.tensors[down].shape[0], self.config.get("lora_alpha", 8)
        # the number of ranks at first, with what PEFT adds so as not to divide by zero
        scale = (alpha if alpha > 0 else rank) / (self.config.get("init_r", 12) + 1e-5)
        self.lora[target] = LoraOrigin(down, up, scale, rank, place.kind == "Conv1D", diagonal_key=diagonal)

    def _add_layer(self, module: str, keys: Sequence[str]) -> None:
        """Match the tensors of one module's layer with the stored tensors that PEFT changes by them."""
        place = self._place(module)
        rows = [key for key in keys if key.endswith(TOKEN_ROWS)] if self.kind != "TRAINABLE_TOKENS" else []
        if rows and len(rows) < len(keys):
            raise UnsupportedError(
                f"{self.label}: {module} has rows of its own for some tokens and another layer; merge the adapter "
                "into its base with peft (merge_and_unload) and give the full model."
            )
        if not rows and self.kind != "TRAINABLE_TOKENS" and not self._is_targeted(module):
            self.skipped.append(module)
            return
        changed = self._row_settings(module) if rows else {}
        if self.kind not in SHARING:
            self._check_layer(place, keys, changed)
        self._put_layer(place, tuple(keys), changed)

    def _put_layer(self, place: Place, keys: tuple[str, ...], changed: dict[str, Any]) -> None:
        """Say which stored tensors a layer changes."""
        weight = self.base.parameter_of_module(place.path)
        assert weight is not None
        base = {"weight": weight}
        if place.bias:
            bias = self.base.parameter_of_module(f"{place.path}.bias")
            assert bias is not None
            base["bias"] = bias
        if self.kind == "BEFT":
            del base["weight"]
        for name, target in base.items():
            if name == "bias" and not self._changes_bias(keys):
                continue
            whole = self.kind == "TRAINABLE_TOKENS" or changed or self._keeps_ties()
            if self._is_tied(target) and not whole:
                self.apart.append(f"{place.path}.{name}")
                continue
            origin = PeftOrigin(place, name, keys, {**base, "weight": weight}, changed)
            for end in self.ends.get(target, (target,)) if whole else (target,):
                if end in self.layers and not whole:
                    raise UnsupportedError(
                        f"{self.label}: {place.path} is the same parameter as another module that the adapter changes "
                        f"too; leave it out with `exclude: [{target}]`."
                    )
                self.layers.setdefault(end, origin)

    def _changes_bias(self, keys: Sequence[str]) -> bool:
        return self.kind in BIASED or any(key.endswith((".lora_B.bias", ".base_layer.bias")) for key in keys)

    def _place(self, module: str) -> Place:
        """The module of the base. Raises ShapeError, UnsupportedError."""
        shape = self._shape_of(module)
        found = self.base.module(module)
        bias = self.base.parameter_of_module(f"{module}.bias")
        place = layer_place(module, None if found is None else found[1], shape, bias=bias is not None)
        if place is None:
            what = f"a {type(found[1]).__name__}" if found is not None else f"a {len(shape)}-D tensor"
            raise UnsupportedError(
                f"{self.label}: {module} is {what}, into which no {self.kind} adapter can be merged; leave the "
                "adapter out."
            )
        return place

    def _row_settings(self, module: str) -> dict[str, Any]:
        """Fields of the layer that replaces the rows of some tokens. Raises UnsupportedError."""
        tokens = self.config.get("trainable_token_indices")
        if isinstance(tokens, Mapping):
            tokens = next((rows for name, rows in tokens.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UnsupportedError(
                f"{self.label}: adapter_config.json has no `trainable_token_indices` for {module}, whose rows the "
                "file has."
            )
        return {"peft_type": "TRAINABLE_TOKENS", "token_indices": tokens}

    def _check_layer(self, place: Place, keys: Sequence[str], changed: Mapping[str, Any]) -> None:
        """Compare with what PEFT expects; once for modules that are alike."""
        shapes = {layer_key(key): self.source.tensors[key].shape for key in keys}
        start = f"{PEFT_PREFIX}{place.path}."
        alike = (
            place.kind,
            place.shape,
            place.bias,
            place.groups,
            tuple((k.removeprefix(start), shapes[k]) for k in shapes),
        )
        patterns = any(value for name, value in self.config.items() if name.endswith("_pattern"))
        if not patterns and not changed and alike in self.checked:
            return
        self.peft.check([place], shapes, changed)
        self.checked.add(alike)

    def _share(self, held: Mapping[str, Sequence[str]]) -> None:
        """The modules of a kind that shares tensors, in the model's order."""
        skeleton = self.base.memory.skeleton
        if skeleton is None:
            raise UnsupportedError(
                f"{self.label}: the modules of a {self.kind} adapter share tensors in the order of the model, which "
                "is not known for code of the model's own; merge it into its base with peft (merge_and_unload)."
            )
        order = {name: i for i, (name, _) in enumerate(skeleton.model.named_modules())}
        paths = [path for path in held if path not in self.skipped]
        if self.kind == "UNILORA":  # its file has one tensor for all modules
            # PEFT numbers as many values as the configuration says, so it is compared with the file first
            values, said = self.source.tensors.get(UNILORA_VALUES), self.config.get("theta_d_length", 256)
            if values is None or values.shape != (said,):
                raise CorruptFileError(
                    f"{self.label}: {UNILORA_VALUES} is {'missing' if values is None else values.shape}, and "
                    f"adapter_config.json says `theta_d_length: {show(said)}`."
                )
            paths = [name for name in order if self.base.parameter_of_module(name) and self._is_targeted(name)]
        places = sorted((self._place(path) for path in paths), key=lambda place: order[self._name_of(place.path)])
        self.places = list(places)
        if self.kind == "UNILORA":
            for place in self.places:
                self._put_layer(place, tuple(self.source.tensors), {})
        if self.places:
            shapes = {key: entry.shape for key, entry in self.source.tensors.items()}
            self.peft.check(self.places, shapes)

    def _name_of(self, path: str) -> str:
        found = self.base.module(path)
        assert found is not None
        return found[0]

    def _is_tied(self, target: str) -> bool:
        return self.base.canonical[target] in self.base.memory.ties.values()

    def _keeps_ties(self) -> bool:
        """Whether the adapter was trained so that what the base ties stays tied."""
        return bool(self.config.get("ensure_weight_tying"))

    def _add_copy(self, key: str, path: str) -> None:
        """Sort a whole parameter into those of the base and those of the adapter's own head."""
        base, shape = self.base, self.source.tensors[key].shape
        target = base.parameter_of_module(path)
        own_head = target in base.heads and target not in base.vocab_axis
        if target is None and self.source.is_of_module(key):
            self.notes.append(f"{self.label}: {key} belongs to a module that the base does not have; it is left out.")
            return
        if target is None or (own_head and shape != base.shapes[target]):
            self.heads[key] = path
            return
        if not self._fits(target, shape):
            raise ShapeError(
                f"{self.label}: its copy of {target} is {shape}, the base has {base.shapes[target]}; it was trained "
                "on another base."
            )
        # PEFT trains a copy of what `modules_to_save` names; any other copy it loads into the base's own tensor
        trained = self._saves(path) and not self._keeps_ties()
        if trained and self._is_tied(target):
            self.apart.append(path)
        elif trained:
            self.own[target] = key
        elif target in self.shared:
            self.tied[key] = self.shared[target]
        else:
            self.shared[target] = key

    def _saves(self, path: str) -> bool:
        """Whether `modules_to_save` names the module of a parameter, as PEFT compares names: by their end."""
        module = f".{path.rpartition('.')[0]}."
        saved = self.config.get("modules_to_save")
        names = [saved] if isinstance(saved, str) else saved or ()
        return any(f".{name}." in module for name in names)

    def _add_lora(self, module: str, down_key: str, up_key: str) -> None:
        """Match the factors of one module with the stored tensor that they change."""
        target = self.base.parameter_of_module(module)
        assert target is not None
        for key, other, name in ((up_key, down_key, "lora_B"), (down_key, up_key, "lora_A")):
            if key not in self.source.tensors:
                raise CorruptFileError(f"{self.label}: {other} has no {name} beside it; the adapter is incomplete.")
        tied = self._keeps_ties() and (self._is_tied(target) or target in self.ends)
        if not tied and not self._is_targeted(module):
            self.skipped.append(module)
            return
        origin = self._origin(module, target, down_key, up_key)
        if self._is_tied(target) and not self._keeps_ties():
            self.apart.append(f"{module}.weight")
            return
        if tied:
            # PEFT makes the factors of all ends out of the same two tensors, and saves them once for each end
            for end in self.ends.get(target, (target,)):
                self.lora.setdefault(end, origin)
            return
        if target in self.lora:
            raise UnsupportedError(
                f"{self.label}: {module} is the same parameter as another module that the adapter changes too; leave "
                f"it out with `exclude: [{target}]`."
            )
        self.lora[target] = origin

    def _is_targeted(self, module: str) -> bool:
        """Whether PEFT gives factors to a module; it ignores those that the file has for any other one."""
        try:
            return self.targets.has(module)
        except ValueError as error:
            self.unread = f"{error}"
            return True

    def _origin(self, module: str, target: str, down_key: str, up_key: str) -> LoraOrigin:
        """The factors of one module, if they fit its stored tensor."""
        label, base = self.label, self.base
        down, up = self.source.tensors[down_key].shape, self.source.tensors[up_key].shape
        wanted = base.shapes[target]
        if torn := of_shape(down, (1, 1)) or of_shape(up, (1, 1)):
            raise UnsupportedError(f"{label}: {down_key} is {down}: {torn}.")
        if len(down) != 2 or len(up) != 2 or len(wanted) != 2:
            raise UnsupportedError(
                f"{label}: {down_key} {down} changes a {len(wanted)}-D tensor; only matrices are merged."
            )
        rank = down[0]
        if up[1] != rank:
            raise ShapeError(f"{label}: {module}: A has rank {rank}, B has rank {up[1]}.")
        scale, rank = self._scale(module, rank)
        full = (up[0], down[1])
        swapped = down_key.endswith(".lora_embedding_A") or any(block.transposed for block in base.blocks[target])
        if not self._fits(target, full[::-1] if swapped else full):
            raise ShapeError(
                f"{label}: {module}: the adapter changes {full}, the base has {wanted}; it was trained on another "
                "base."
            )
        return LoraOrigin(down_key, up_key, scale, rank, swapped)

    def _scale(self, module: str, rank: int) -> tuple[float, int]:
        """Factor of the product of a module's factors, and their rank. Raises UnsupportedError, CorruptFileError."""
        label, config = self.label, self.config
        try:
            alpha = matching(self.patterns, config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            configured = matching(self.patterns, config.get("rank_pattern"), module, config.get("r", 8))
        except ValueError as error:
            raise UnsupportedError(f"{label}: adapter_config.json: {error}.") from error
        if configured != rank:
            raise CorruptFileError(
                f"{label}: {module}: the configuration says r = {configured}, the file holds {rank}."
            )
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank, rank


def _without(module: str) -> str:
    """A module's name without the layers that lie around each other there."""
    while module.endswith(BENEATH):
        module = module.removesuffix(BENEATH)
    return module


def _products(up: Tensor, down: Tensor, scale: float, *, swapped: bool) -> Tensor:
    """The change of all experts, by the same steps as PEFT's, so that it is the same to the last place."""
    import torch

    return torch.einsum("ore,eri->eio" if swapped else "ore,eri->eoi", up, down) * scale


def _factors(module: str, keys: Sequence[str]) -> tuple[str, str] | None:
    """The keys of A and B, if a module has nothing else; one of them may be missing from the file."""
    for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
        pair = (f"{PEFT_PREFIX}{module}{down}", f"{PEFT_PREFIX}{module}{up}")
        bare = (pair[0].removeprefix(PEFT_PREFIX), pair[1].removeprefix(PEFT_PREFIX))
        for names in (pair, bare):
            if {*keys} <= {*names}:
                return names
    return None


def matching(known: Patterns, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module path, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        try:
            if known.fits(pattern, module):
                return value
        except ValueError as error:
            raise ValueError(f"the pattern {show(pattern)} {error}") from error
    return default
