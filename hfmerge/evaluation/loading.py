"""Loads models for evaluation: digests, stored tensors, and adapters merged into their bases by peft."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.heads import adapter_head
from hfmerge.checkpoint.layout.load_check import quiet
from hfmerge.checkpoint.layout.skeleton import find_class
from hfmerge.checkpoint.lora import PEFT_PREFIX, matching
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.patterns import Patterns
from hfmerge.checkpoint.peft_kinds import PREFIXES, adapter_kind, check_mergeable
from hfmerge.errors import SourceError, UnsupportedError
from hfmerge.hashing import canonical_json, sha256_bytes, sha256_file
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import is_hub_id


if TYPE_CHECKING:
    from torch import Tensor


def digest_of(source: Model) -> str:
    """One digest of all files in a repository that a score can depend on."""
    kept = (".safetensors", ".json", ".txt", ".model", ".jinja")
    outside = ("merge_history/", "merge_state/", ".eval_results/", "figures/", ".git/", ".cache/")
    files = {}
    for name, info in sorted(source.snapshot.files.items()):
        if name.endswith(kept) and not name.startswith(outside):
            files[name] = info.sha256 or info.blob_id or sha256_file(fetch(source.snapshot, name))
    return sha256_bytes(canonical_json(files))


def stored_tensors(source: Model) -> dict[str, Tensor]:
    """Every tensor of a full model, mapped from its files."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted({entry.file for entry in source.tensors.values()}):
        state |= load_file(fetch(source.snapshot, file))
    return state


def picked(source: Model, names: Iterable[str]) -> dict[str, Tensor] | None:
    """Some tensors of a model by their names in it, without the others; None where a file does not have them so."""
    from safetensors import safe_open

    prefix = PEFT_PREFIX if source.kind == "adapter" else ""
    found: dict[str, Tensor] = {}
    for name in names:
        entry = source.tensors.get(f"{prefix}{name}")
        if entry is None:
            return None
        with safe_open(fetch(source.snapshot, entry.file), framework="pt") as file:
            found[name] = file.get_tensor(f"{prefix}{name}")
    return found


def with_base(source: Model) -> Model:
    """An adapter with the model that its own configuration names."""
    adapter = source.adapter or {}
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise SourceError(f"{source.snapshot.label}: names no base model; write `base+adapter`.")
    if source.snapshot.commit is not None and not is_hub_id(base):
        raise SourceError(
            f"{source.snapshot.label}: names the base {base!r}, which is not a repository; write `base+adapter`."
        )
    revision = adapter.get("revision")
    return dataclasses.replace(
        source, beneath=describe(f"{base}@{revision}" if revision else str(base), modules=False)
    )


def adapter_config(source: Model) -> dict[str, Any]:
    """config.json of an adapter's model: its own class and labels if it has a head, else its base's."""
    assert source.beneath is not None
    stored = [key for key in source.tensors if ".lora_" not in key and ".base_layer." not in key]
    known = set(source.beneath.tensors)
    heads = {key: key.removeprefix(PEFT_PREFIX) for key in stored if key.removeprefix(PEFT_PREFIX) not in known}
    if not heads:
        return dict(source.beneath.config)
    return dict(adapter_head(source, source.beneath, heads).config)


def _settings(source: Model, folder: Path) -> Any:
    """An adapter's configuration for peft, which would match its expressions by `re`: they are worked out here.

    Raises:
        UnsupportedError: an expression that is not matched here.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(folder))
    check_mergeable(source.snapshot.label, source.adapter or {})
    inside = f".{PREFIXES[adapter_kind(source.adapter or {})]}"
    paths = [key.removeprefix(PEFT_PREFIX) for key in source.tensors]
    modules = sorted({path.partition(inside)[0] for path in paths if inside in path})
    named = [getattr(config, name, None) for name in ("target_modules", "exclude_modules")]
    if any(isinstance(one, str) for one in named) or getattr(config, "layers_to_transform", None):
        config.target_modules, config.exclude_modules = set(modules), None
        config.layers_to_transform = config.layers_pattern = None
    known = Patterns()
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None)
        if patterns:
            try:
                found = {f"^{re.escape(module)}": matching(known, patterns, module, None) for module in modules}
            except ValueError as error:
                raise UnsupportedError(f"{source.snapshot.label}: adapter_config.json: {error}.") from error
            setattr(config, name, {path: value for path, value in found.items() if value is not None})
    return config


def adapter_weights(source: Model, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of an adapter's model, as peft merges it.

    Args:
        config: see `adapter_config`.
    """
    from peft import PeftModel

    assert source.beneath is not None
    found = find_class(dict(config), source.snapshot.label, False)
    if found is None:
        raise SourceError(f"{source.snapshot.label}: its base has code of its own, which is not run.")
    cls, settings = found
    folder = Path(fetch(source.snapshot, "adapter_config.json")).parent
    for file in {entry.file for entry in source.tensors.values()}:
        fetch(source.snapshot, file)
    with quiet(), warnings.catch_warnings():
        # peft asks transformers for attributes that this version has renamed
        warnings.simplefilter("ignore", FutureWarning)
        model = cls.from_pretrained(None, config=settings, state_dict=stored_tensors(source.beneath))
        merged = PeftModel.from_pretrained(model, str(folder), config=_settings(source, folder)).merge_and_unload(
            safe_merge=True
        )
    state: dict[str, Tensor] = merged.state_dict()
    return state
