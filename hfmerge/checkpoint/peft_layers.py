"""PEFT's own layers, made around single modules of a base: what its merge makes of their tensors.

PEFT's code is the definition of every kind of adapter but plain LoRA. So a model is built that has nothing but the
modules in question, under their names; PEFT gives it its layers, loads the adapter's tensors into them, and merges.
PEFT never sees the adapter's regular expressions: which module they mean is worked out before (`peft_config`).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.patterns import Patterns
from hfmerge.checkpoint.peft_kinds import DECOMPOSING, SHARING, adapter_kind, init_of
from hfmerge.errors import CorruptFileError, UnsupportedError
from hfmerge.validation.values import show


if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

NO_FIELDS: Mapping[str, Any] = {}
_ONE_AT_A_TIME = threading.Lock()
"""PEFT draws initial values from the generator that all threads share, and warns; both are put back after it."""

_UNUSED = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "modules_to_save",
    "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication", "target_parameters",
    "trainable_token_indices", "ensure_weight_tying", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config",
)  # fmt: skip
"""Fields of a configuration that say nothing about one module, or that have been followed before."""

FROM_VALUES = ("ADAMSS",)
"""Kinds whose tensors depend on the base's values, so that headers do not tell whether they fit."""
NEEDING_MEMORY = ("ADALORA", "BOFT", "SHIRA", "UNILORA")
"""Kinds for which PEFT works out indices, which it cannot do without memory."""

_NAME = "default"
"""What PEFT calls an adapter that is given no name."""

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class Place:
    """A module of the base that an adapter changes.

    Attributes:
        path: its name, as the adapter has it.
        kind: "Linear", "Conv1D" (GPT-2's), "Embedding", or a convolution of torch.
        shape: of its weight.
        bias: whether it has a bias.
        groups: of a convolution.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False
    groups: int = 1


def layer_place(path: str, module: Any, shape: tuple[int, ...], *, bias: bool) -> Place | None:
    """The place that a module of the base's class is; None for a module that PEFT gives no layer here.

    Args:
        module: of the class; None where there is no class, which makes a matrix a linear map.
        shape: of its stored weight.
        bias: whether it has one.
    """
    if module is None:
        return Place(path, "Linear", shape, bias) if len(shape) == 2 else None
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = ((nn.Linear, "Linear"), (Conv1D, "Conv1D"), (nn.Embedding, "Embedding"))
    for cls, kind in kinds:
        if isinstance(module, cls):
            return Place(path, kind, shape, bias)
    for kind in _CONVOLUTIONS:
        if isinstance(module, getattr(nn, kind)):
            return Place(path, kind, shape, bias, module.groups)
    return None


def peft_config(config: Mapping[str, Any], places: Sequence[Place], patterns: Patterns) -> dict[str, Any]:
    """An adapter's configuration for the modules of some places alone, with no expression left that has to be matched.

    Raises:
        ValueError: an expression that is not matched here.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = adapter_kind(config)
    known = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    found = {name: value for name, value in config.items() if name in known and name not in _UNUSED}
    found["target_modules"] = [place.path for place in places]
    for name, value in config.items():
        if not name.endswith("_pattern") or name not in found or not value:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: must be a mapping")
        found[name] = _resolved(kind, value, places, patterns)
    if "feedforward_modules" in found:
        found["feedforward_modules"] = [
            place.path for place in places if _feeds_forward(found["feedforward_modules"], place.path, patterns)
        ]
    if kind == "LORA" and not init_of(config).startswith(DECOMPOSING):
        found["init_lora_weights"] = True  # all that is drawn is loaded from the file
    return found


def _resolved(kind: str, values: Mapping[str, Any], places: Sequence[Place], patterns: Patterns) -> dict[str, Any]:
    """The values that patterns give to modules, each under its module's whole name."""
    if kind == "ADALORA":  # names of tensors, with the ranks that are left in each
        heads = ("", "model.", "base_model.model.")
        starts = tuple(f"{head}{place.path}.lora_E" for place in places for head in heads)
        return {name: value for name, value in values.items() if name.startswith(starts)}
    found = {}
    for place in places:
        for pattern, value in values.items():
            try:
                fits = _fits(kind, pattern, place.path, patterns)
            except ValueError as error:
                raise ValueError(f"the pattern {show(pattern)} {error}") from error
            if fits:
                found[place.path] = value  # every kind finds a module by its whole name
                break
    return found


def _fits(kind: str, pattern: str, path: str, patterns: Patterns) -> bool:
    """Whether a pattern means a module, as the kind compares them. Raises ValueError."""
    if kind == "OSF":  # anywhere in the name
        return patterns.is_all_of(f".*({pattern}).*", path)
    if kind in ("C3A", "FOURIERFT"):  # the end of the name, never the whole
        return pattern == path or patterns.is_all_of(rf".*\.({pattern})", path)
    return patterns.fits(pattern, path)


def _feeds_forward(named: Any, path: str, patterns: Patterns) -> bool:
    if isinstance(named, str):
        return patterns.is_all_of(named, path)
    return any(path.endswith(name) for name in named or ())


class PeftLayers:
    """PEFT's layers of one adapter. Safe to call from several threads.

    Args:
        label: names the adapter in messages.
        config: adapter_config.json.
        places: all places that the adapter changes, in the model's order; needed where they share tensors.
    """

    def __init__(self, label: str, config: Mapping[str, Any], places: Sequence[Place] = ()):
        self.label, self._config, self._places = label, config, places
        self._patterns = Patterns()
        self._whole: Any = None
        self._own: dict[str, Tensor] = {}

    def merged(
        self,
        place: Place,
        base: Mapping[str, Tensor],
        tensors: Callable[[], Mapping[str, Tensor]],
        changed: Mapping[str, Any] = NO_FIELDS,
    ) -> dict[str, Tensor]:
        """What the module's parameters are after PEFT's merge, in float32.

        Args:
            place: the module.
            base: its parameters, float32: "weight", and "bias" if it has one. They are used up.
            tensors: gives the adapter's tensors for it, by their names in the file; of kinds that share tensors, all
                of the adapter's.
            changed: fields that stand in the place of the configuration's.

        Raises:
            CorruptFileError, UnsupportedError: PEFT cannot do it, with its reason.
        """
        config = {**self._config, **changed}
        with _quietly(), _explained(self.label, adapter_kind(config), place.path):
            if adapter_kind(config) in SHARING:
                return self._of_whole(config, place, base, tensors)
            module = _module(place, base)
            model = _with_layers(peft_config(config, [place], self._patterns), [place], [module])
            missing = _load(model, tensors(), self.label)
            if missing:
                raise CorruptFileError(f"{self.label}: {missing[0]} is missing; the adapter is incomplete.")
            done = model.merge_and_unload(safe_merge=True).get_submodule(place.path)
            return {name: value.detach().float() for name, value in done.named_parameters(recurse=False)}

    def _of_whole(
        self,
        config: Mapping[str, Any],
        place: Place,
        base: Mapping[str, Tensor],
        tensors: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        import torch

        if self._whole is None:
            # one number stands for a weight, since none of these kinds looks at the weights when it is loaded
            nothing = [_module(one, None) for one in self._places]
            whole = _with_layers(peft_config(config, self._places, self._patterns), self._places, nothing)
            every = tensors()
            self._own = {name: value for name, value in every.items() if ".base_layer." in name}
            _load(whole, {name: value for name, value in every.items() if name not in self._own}, self.label)
            self._whole = whole.base_model.model
        layer = self._whole.get_submodule(place.path)
        inner = layer.get_base_layer()
        held = {name: value.data for name, value in inner.named_parameters(recurse=False)}
        try:
            for name, value in base.items():
                getattr(inner, name).data = self._own.get(f"base_model.model.{place.path}.base_layer.{name}", value)
            with torch.no_grad():
                layer.merge(safe_merge=True)
            return {name: value.data for name, value in inner.named_parameters(recurse=False)}
        finally:
            layer.merged_adapters.clear()
            for name, value in held.items():
                getattr(inner, name).data = value

    def check(
        self,
        places: Sequence[Place],
        shapes: Mapping[str, tuple[int, ...]],
        changed: Mapping[str, Any] = NO_FIELDS,
    ) -> None:
        """Compare names and shapes in an adapter's file with those that PEFT expects for some places.

        Args:
            places: one, or all of an adapter whose modules share tensors.
            shapes: of the adapter's tensors for them.
            changed: as of `merged`.

        Raises:
            CorruptFileError: a tensor is missing or of another shape. UnsupportedError: PEFT makes no such layer.
        """
        import torch

        config = {**self._config, **changed}
        at = places[0].path
        if adapter_kind(config) in FROM_VALUES:
            return
        with _quietly(), _explained(self.label, adapter_kind(config), at):
            from peft import get_peft_model_state_dict

            with torch.device("cpu" if adapter_kind(config) in NEEDING_MEMORY else "meta"):
                modules = [_module(place, None) for place in places]
                model = _with_layers(peft_config(config, places, self._patterns), places, modules)
                held = get_peft_model_state_dict(model, save_embedding_layers=False)
            wanted = {name: tuple(value.shape) for name, value in held.items()}
        for name, shape in wanted.items():
            if name not in shapes and not name.endswith(".bias"):
                raise CorruptFileError(f"{self.label}: {name} is missing; the adapter is incomplete.")
            if name in shapes and shapes[name] != shape:
                raise CorruptFileError(
                    f"{self.label}: {name} is {shapes[name]}, and adapter_config.json and the base make it {shape}; "
                    "it was trained on another base, or with another configuration."
                )
        for name in shapes:
            if name not in wanted and ".base_layer." not in name:
                raise UnsupportedError(f"{self.label}: {name} is no part of a {adapter_kind(config)} adapter of {at}.")


def layer_key(key: str) -> str:
    """The name that a tensor of an adapter's file has in the layer that is made for it alone."""
    return key.replace(".token_adapter.", ".")


@contextlib.contextmanager
def _explained(label: str, kind: str, path: str) -> Iterator[None]:
    """PEFT's own errors, of whatever class, as one line that names adapter, kind and module."""
    try:
        yield
    except (CorruptFileError, UnsupportedError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedError(
            f"{label}: PEFT cannot merge this {kind} adapter into {path}: {text}; mend adapter_config.json or leave "
            "the adapter out."
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """One call of PEFT at a time, without warnings; it draws from a generator that always begins alike."""
    import torch

    with _ONE_AT_A_TIME, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _with_layers(config: Mapping[str, Any], places: Sequence[Place], modules: Sequence[Module]) -> Any:
    """A model of these modules alone, with PEFT's layers."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from torch import nn

    root = nn.Module()
    for place, module in zip(places, modules, strict=True):
        *parents, name = place.path.split(".")
        at = root
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(name, module)
    return PeftModel(root, PEFT_TYPE_TO_CONFIG_MAPPING[adapter_kind(config)](**config))


def _load(model: Any, tensors: Mapping[str, Tensor], label: str) -> list[str]:
    """Load an adapter's tensors; gives the names of those that are missing.

    What modules share has a name in each of them, under which the file does not have it.
    """
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, dict(tensors))
    if result.unexpected_keys:
        raise UnsupportedError(f"{label}: {result.unexpected_keys[0]} has no place in PEFT's layer.")
    return [
        name.replace(f".{_NAME}", "")
        for name in result.missing_keys
        if f".{_NAME}" in name and ".ranknum." not in name
    ]


def _module(place: Place, base: Mapping[str, Tensor] | None) -> Module:
    """A module of torch with these parameters; without them each is one number, seen in the parameter's shape."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    out, *rest = place.shape
    with torch.device("meta"):
        module: nn.Module
        if place.kind == "Linear":
            module = nn.Linear(rest[0], out, bias=place.bias)
        elif place.kind == "Conv1D":
            module = Conv1D(rest[0], out)
        elif place.kind == "Embedding":
            module = nn.Embedding(out, rest[0])
        elif place.kind in _CONVOLUTIONS:
            make = getattr(nn, place.kind)
            module = make(rest[0] * place.groups, out, tuple(rest[1:]), groups=place.groups, bias=place.bias)
        else:
            raise UnsupportedError(f"{place.path} is a {place.kind}, which PEFT gives no layer.")
    for name, value in list(module.named_parameters(recurse=False)):
        held = torch.zeros(1).expand(value.shape) if base is None else base[name]
        setattr(module, name, nn.Parameter(held, requires_grad=False))
    return module
