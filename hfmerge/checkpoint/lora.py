"""LoRA adapters as task vectors: which factors change which stored tensor of the base, and by what scale.

The only place that knows PEFT's file format: key suffixes, alpha / r, rank-stabilised scaling, rank and alpha
patterns, `fan_in_fan_out`, `modules_to_save`. Formula: `delta W = scale * B @ A`, `scale = alpha / r`, or `alpha /
sqrt(r)` with `use_rslora`. Source: "LoRA", arXiv 2106.09685, section 4.1; "rsLoRA", arXiv 2312.03732; scaling as PEFT
applies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.lora_targets import Targets
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.other_forms import of_shape
from hfmerge.checkpoint.patterns import Patterns
from hfmerge.errors import CorruptFileError, ShapeError, UnsupportedError
from hfmerge.task_vector import LowRank
from hfmerge.validation.values import show


if TYPE_CHECKING:
    from hfmerge.checkpoint.layout import Layout
    from hfmerge.checkpoint.reader import Reader

PEFT_PREFIX = "base_model.model."
Ends = Mapping[str, tuple[str, ...]]
"""Stored key of an untied base -> all its stored keys that were tied with it, the owner of the value first."""
NO_ENDS: Ends = {}

PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
    "lora_bias": (False, None),
    "bias": ("none", None),
}
"""Fields that change what the weights mean, with the values at which an adapter is plain LoRA."""

CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that alter the base weights at load, so that B @ A alone is not the change."""


@dataclass(frozen=True)
class LoraOrigin:
    """The factors that change one stored tensor of the base.

    Attributes:
        down_key, up_key: stored keys of A (r, in) and B (out, r).
        scale: factor of `B @ A`.
        rank: r.
        swapped: the stored tensor is (in, out): the change is `(B @ A)^T`.
    """

    down_key: str
    up_key: str
    scale: float
    rank: int
    swapped: bool

    def read(self, reader: Reader) -> LowRank:
        """The change as float32 factors shaped like the stored tensor."""
        down, up = reader.value(self.down_key), reader.value(self.up_key) * self.scale
        if self.swapped:
            return LowRank(down.T.contiguous(), up.T.contiguous())
        return LowRank(up, down.clone())


@dataclass(frozen=True)
class AdapterMap:
    """What an adapter holds, in terms of the base.

    Attributes:
        lora: base stored key -> factors.
        replaced: base stored key -> adapter key of a whole copy (`modules_to_save`, or an embedding beneath a LoRA).
        heads: adapter key -> name in the model, for trained modules the base does not have.
        tied: adapter key of a second copy of a tied weight -> adapter key of the first copy; the two must be equal.
        apart: parameters, in the adapter's names, that the base ties and the adapter changes at this end alone. They
            are in no other field: the base has to be untied before their change has a place.
        notes: what of the adapter is left out, and why; one sentence each.
        rows: of its copies of parameters with one row per token, where they are not as many as the base's.
    """

    lora: dict[str, LoraOrigin] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: int | None = None


def check_plain(source: Model) -> None:
    """Raise UnsupportedError unless the adapter's configuration is plain LoRA."""
    config = source.adapter or {}
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{source.snapshot.label}: a {kind} adapter; only LoRA is merged (export it as a full model)."
        )
    for name, allowed in PLAIN.items():
        if name in config and config[name] not in allowed:
            raise UnsupportedError(
                f"{source.snapshot.label}: `{name}: {config[name]}` is not plain LoRA; merge it into its base with "
                "peft (merge_and_unload) and give the full model."
            )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGING_INITS) or config.get("loftq_config"):
        raise UnsupportedError(
            f"{source.snapshot.label}: initialised with {init}, which changes the base weights; convert it to plain "
            "LoRA "
            "(peft: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )


def map_adapter(source: Model, base: Layout, ends: Ends = NO_ENDS) -> AdapterMap:
    """Match every tensor of a LoRA adapter with the base, from headers alone.

    Args:
        base: layout of the base.
        ends: of a base that was untied: stored key -> all stored keys that were tied with it, itself included.

    Raises:
        UnsupportedError: not plain LoRA. ShapeError: factors do not fit the base. CorruptFileError: a factor is
            missing.
    """
    check_plain(source)
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
        self.unread: str | None = None
        self.rows: dict[str, int] = {}

    def map(self) -> AdapterMap:
        """Sort all tensors."""
        for key in self.source.tensors:
            path = key.removeprefix(PEFT_PREFIX)
            if path.endswith((".lora_B.weight", ".lora_embedding_B")):
                continue
            if path.endswith(".lora_A.weight"):
                module = path.removesuffix(".lora_A.weight")
                self._add_lora(module, key, key.replace(".lora_A.weight", ".lora_B.weight"))
            elif path.endswith(".lora_embedding_A"):
                module = path.removesuffix(".lora_embedding_A")
                self._add_lora(module, key, key.replace(".lora_embedding_A", ".lora_embedding_B"))
            elif "lora_" in path or (".base_layer." in path and not path.endswith(".base_layer.weight")):
                raise UnsupportedError(f"{self.label}: {key} is not part of plain LoRA.")
            else:
                # the embedding that PEFT saves beneath a LoRA of it is loaded in place of the base's
                self._add_copy(key, path.replace(".base_layer.weight", ".weight"))
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
        ups = {up for down, up in _pairs(self.source)}
        for key in self.source.tensors:
            if key.endswith((".lora_B.weight", ".lora_embedding_B")) and key not in ups:
                raise CorruptFileError(f"{self.label}: {key} has no lora_A beside it; the adapter is incomplete.")
        replaced = dict(self.own)
        for target, key in self.shared.items():
            replaced.setdefault(target, key)
        for target, key in self.shared.items():
            for end in self.ends.get(target, ()):
                replaced.setdefault(end, key)
                if end in self.shared and key < self.shared[end]:
                    # both were loaded into one tensor, so it is not known which of them counts
                    self.tied.setdefault(self.shared[end], key)
        if not self.lora and not replaced and not self.apart:
            raise UnsupportedError(f"{self.label}: changes no parameter of the base {self.base.architecture}.")
        return AdapterMap(
            self.lora,
            replaced,
            self.heads,
            self.tied,
            tuple(self.apart),
            tuple(self.notes),
            self._other_rows(replaced),
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
        if up_key not in self.source.tensors:
            raise CorruptFileError(f"{self.label}: {down_key} has no lora_B beside it; the adapter is incomplete.")
        if target is None:
            raise ShapeError(f"{self.label}: changes {module}, which the base {self.base.architecture} does not have.")
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
        label, config, base = self.label, self.config, self.base
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
        try:
            alpha = matching(self.patterns, config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            configured = matching(self.patterns, config.get("rank_pattern"), module, config.get("r", 8))
        except ValueError as error:
            raise UnsupportedError(f"{label}: adapter_config.json: {error}.") from error
        if configured != rank:
            raise CorruptFileError(
                f"{label}: {module}: the configuration says r = {configured}, the file holds {rank}."
            )
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        full = (up[0], down[1])
        swapped = down_key.endswith(".lora_embedding_A") or any(block.transposed for block in base.blocks[target])
        if not self._fits(target, full[::-1] if swapped else full):
            raise ShapeError(
                f"{label}: {module}: the adapter changes {full}, the base has {wanted}; it was trained on another "
                "base."
            )
        return LoraOrigin(down_key, up_key, scale, rank, swapped)


def _pairs(source: Model) -> list[tuple[str, str]]:
    """Stored keys of the factors A, each with the key that its B has."""
    return [
        (key, key.replace(".lora_A.weight", ".lora_B.weight").replace(".lora_embedding_A", ".lora_embedding_B"))
        for key in source.tensors
        if key.endswith((".lora_A.weight", ".lora_embedding_A"))
    ]


def matching(known: Patterns, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module path, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        try:
            if known.fits(pattern, module):
                return value
        except ValueError as error:
            raise ValueError(f"the pattern {show(pattern)} {error}") from error
    return default
