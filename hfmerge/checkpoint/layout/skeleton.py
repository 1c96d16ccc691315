"""The model class that config.json names, built on the meta device: parameters and ties without any weights."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.other_forms import of_quantisation
from hfmerge.checkpoint.side_files import without_code
from hfmerge.errors import UnsupportedError
from hfmerge.validation.limits import ELEMENTS, PARTS


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shape = tuple[int, ...]
_SMALL = 10_000
"""Modules that any class may have, whatever is stored: they are made in a second."""
SMALL_PARAMETER = 1 << 25
"""Elements that any parameter may have."""


@dataclass(frozen=True)
class Skeleton:
    """A model class on the meta device, and facts on its parameters.

    Attributes:
        parameters: in-memory name -> shape, in the order of the state dict.
        prefix: what in-memory names of the backbone begin with in this class ("bert."), or "".
        ties: in-memory name of a tied parameter -> name of the parameter it shares.
        submodels: (in-memory path, class name) of every model inside this one, itself included.
    """

    model: PreTrainedModel
    parameters: dict[str, Shape]
    prefix: str
    ties: dict[str, str]
    submodels: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        """Name of the class."""
        return type(self.model).__name__

    def heads(self) -> frozenset[str]:
        """In-memory names outside the backbone; a tied parameter counts as the one it shares."""
        if self.prefix:
            outside = {name for name in self.parameters if not name.startswith(self.prefix)}
        else:
            outside = set(self.parameters) - _backbone(self.model)
        return frozenset(name for name in outside if self.ties.get(name, name) in outside)

    def output_embedding(self) -> set[str]:
        """In-memory names of the parameters of the layer that gives one number per token, if the class has one."""
        module = self.model.get_output_embeddings()
        named = self.model.named_modules(remove_duplicate=False)
        return {f"{path}.{name}" for path, found in named if found is module for name, _ in found.named_parameters()}

    def vocabulary(self) -> dict[str, int]:
        """In-memory name -> axis with one entry per token, from the classes' own input and output embeddings."""
        from torch import nn
        from transformers import PreTrainedModel

        modules = dict(self.model.named_modules(remove_duplicate=False))
        embeddings: dict[int, nn.Module] = {}
        for model in modules.values():
            if isinstance(model, PreTrainedModel):
                for ask in (model.get_input_embeddings, model.get_output_embeddings):
                    try:
                        module = ask()
                    except (NotImplementedError, AttributeError):  # a tower without tokens, such as a vision model
                        continue
                    if isinstance(module, (nn.Embedding, nn.Linear)):
                        embeddings[id(module)] = module
        rows = {module.num_embeddings for module in embeddings.values() if isinstance(module, nn.Embedding)}
        axes: dict[str, int] = {}
        for path, module in modules.items():
            more = (
                isinstance(module, nn.Embedding) and module.num_embeddings in rows
            )  # such as one embedding per layer
            if id(module) in embeddings or (more and path.rpartition(".")[2].startswith("embed_tokens")):
                axes.update((f"{path}.{name}", 0) for name, _ in module.named_parameters(recurse=False))
        axes.update((name, 1) for name in self.parameters if name.endswith("final_logits_bias"))
        for copy, shared in self.ties.items():
            for one, other in ((copy, shared), (shared, copy)):
                if one in axes:
                    axes.setdefault(other, axes[one])
        return axes


def build(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], origin: str, trust_remote_code: bool = False
) -> Skeleton | None:
    """The class that config.json names; None if only the model's own code could build it.

    Args:
        shapes: of what is stored, which bounds what is built.

    Raises:
        UnsupportedError: quantised weights, no class for this config, or a class that cannot be built from it.
    """
    found = find_class(config, origin, trust_remote_code)
    if found is None:
        return None
    try:
        with bounded_by(shapes):
            model = _on_meta(*found)
    except Exception as error:  # a class may raise anything at a config it was not written for
        raise UnsupportedError(
            f"{origin}: transformers cannot build {found[0].__name__} from config.json: {one_line(error)}"
        ) from error
    return skeleton_of(model)


def skeleton_of(model: PreTrainedModel) -> Skeleton:
    """What a class built on the meta device says about its parameters."""
    from transformers import PreTrainedModel

    parameters = {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ties = {name: owner for name, owner in tied.items() if name in parameters and owner in parameters}
    submodels = tuple(
        (path, type(module).__name__) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)
    )
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return Skeleton(model, parameters, prefix, {name: _end(ties, name) for name in ties}, submodels)


@contextmanager
def bounded_by(shapes: Mapping[str, Shape]) -> Iterator[None]:
    """Let this thread make no class that is out of all proportion to the stored tensors, whatever config.json says.

    Raises:
        ValueError: out of the class that is being made; names the limit.
    """
    from torch.nn.modules import module as torch_modules

    me, made, elements = threading.get_ident(), 0, sum(map(math.prod, shapes.values()))

    def count(*_: Any) -> None:
        nonlocal made
        if threading.get_ident() == me:
            made += 1
            if made > _SMALL:
                PARTS.check(made // max(1, len(shapes)))

    def measure(_module: Any, _name: str, parameter: Any) -> None:
        if threading.get_ident() == me and parameter is not None and parameter.numel() > SMALL_PARAMETER:
            ELEMENTS.check(parameter.numel() // max(1, elements))

    hooks = (
        torch_modules.register_module_module_registration_hook(count),
        torch_modules.register_module_parameter_registration_hook(measure),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _end(ties: Mapping[str, str], name: str) -> str:
    seen = [name]
    while name in ties and ties[name] not in seen:
        name = ties[name]
        seen.append(name)
    return name


def _on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import initialization

    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return model_class(config)


def _backbone(model: PreTrainedModel) -> set[str]:
    """In-memory names of the model that AutoModel gives for this config; all names if that says nothing."""
    from transformers import MODEL_MAPPING

    own = set(model.state_dict())
    known = MODEL_MAPPING.get(type(model.config), None)
    classes = tuple(known) if isinstance(known, (tuple, list)) else (known,)
    if known is None or type(model) in classes:
        return own
    backbone = set(_on_meta(classes[0], model.config).state_dict())
    return backbone if 2 * len(own & backbone) > len(own) else own


def find_class(
    config: Mapping[str, Any], origin: str, trust_remote_code: bool
) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The class and config object for config.json; None if only the model's own code has them.

    Raises:
        UnsupportedError: quantised weights, or transformers has no class for this config.
    """
    _refuse_quantised(config, origin)
    name = next(iter(config.get("architectures") or ()), None)
    remote = bool(config.get("auto_map")) and trust_remote_code
    try:
        found = _remote_class(config, origin, name) if remote else _native_class(config, name)
    except UnsupportedError:
        raise
    except Exception as error:  # so may the reading of a config
        raise UnsupportedError(
            f"{origin}: transformers cannot use config.json of {name or config.get('model_type')}: {one_line(error)}"
        ) from error
    if found is None and not config.get("auto_map"):
        raise UnsupportedError(
            f"{origin}: transformers has no class for architecture {name}, model_type {config.get('model_type')}; "
            "a newer version may"
        )
    return found


def _refuse_quantised(config: Mapping[str, Any], origin: str) -> None:
    for section in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        quantised = section.get("quantization_config") or section.get("compression_config")
        if quantised:
            raise UnsupportedError(f"{origin}: {of_quantisation(quantised)}.")


def _native_class(
    config: Mapping[str, Any], name: str | None
) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

    named = getattr(transformers, name, None) if name else None
    own: Any = getattr(named, "config_class", None)
    if inspect.isclass(named) and issubclass(named, PreTrainedModel):
        return named, _config_for(own, without_code(config))
    if config.get("auto_map") or config.get("model_type") not in CONFIG_MAPPING:
        return None  # code of its own may call itself a known model type and still be another model
    model_config = _config_for(CONFIG_MAPPING[config["model_type"]], without_code(config))
    known = MODEL_MAPPING.get(type(model_config), None)
    model_class = known[0] if isinstance(known, (tuple, list)) else known
    return None if model_class is None else (model_class, model_config)


def _remote_class(
    config: Mapping[str, Any], origin: str, name: str | None
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    from transformers import CONFIG_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = Path(origin).expanduser()
    repository, _, revision = (str(folder), "", "") if folder.is_dir() else origin.partition("@")
    references = {key: value for key, value in config["auto_map"].items() if isinstance(value, str)}
    wanted = [value for value in references.values() if value.rpartition(".")[2] == name]
    reference = wanted[0] if wanted else references.get("AutoModel")
    if reference is None:
        raise UnsupportedError(f"{origin}: auto_map in config.json names no code for {name or 'AutoModel'}")

    def load(reference: str) -> Any:
        return get_class_from_dynamic_module(reference, repository, revision=revision or None)

    named = references.get("AutoConfig")
    config_class = load(named) if named else CONFIG_MAPPING[config["model_type"]]
    return load(reference), _config_for(config_class, config)


def _config_for(config_class: type[PreTrainedConfig], config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config object, from the tower's section where the class is one tower of a composite model."""
    section: Mapping[str, Any] = config
    if config_class.base_config_key and config_class.base_config_key in config:
        section = config[config_class.base_config_key]
    elif config.get("model_type") not in (None, config_class.model_type):
        towers = [value for value in config.values() if isinstance(value, Mapping)]
        section = next((value for value in towers if value.get("model_type") == config_class.model_type), config)
    # Which attention kernel a user last ran says nothing about the weights and may not be installed here.
    kernels = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    return config_class.from_dict({key: _numbers(value) for key, value in section.items() if key not in kernels})


_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _numbers(value: Any) -> Any:
    """A value of config.json with the numbers that transformers writes as `{"__float__": "Infinity"}`.

    transformers reads them so in `from_pretrained` alone, and not in `from_dict`.
    """
    if isinstance(value, Mapping):
        said = value.get("__float__")
        if len(value) == 1 and isinstance(said, str) and said in _FLOATS:
            return _FLOATS[said]
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 200 characters; its class if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
