"""Checks the small files of a model as far as hfmerge reads them: configurations, adapters, indexes, modules.

Other tools write these files, so keys that hfmerge does not read may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hfmerge.errors import CorruptFileError
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot
from hfmerge.validation.limits import (
    HEADER_VALUES,
    INDEX_BYTES,
    JSON_BYTES,
    JSON_VALUES,
    LABELS,
    LAYERS,
    PATTERN,
    PATTERNS,
    TENSOR_NAME,
    TENSORS,
)
from hfmerge.validation.strict_json import read_json_file
from hfmerge.validation.values import (
    Kind,
    amount,
    flag,
    items,
    line,
    nullable,
    number,
    plain_text,
    record,
    safe_path,
    show,
    table,
)


def label(value: object) -> object:
    """A label's name, which some write as a number. Raises ValueError."""
    return plain_text(value) if isinstance(value, str) else number(value)


def index(value: object) -> int:
    """A whole number written as text, as a key has to be. Raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch("-?[0-9]{1,18}", value, re.ASCII):
        raise ValueError(f"must be a whole number in quotes, not {show(value)}")
    return int(value)


def tensor_name(value: object) -> str:
    """The name of a stored tensor. Raises ValueError."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be the name of a tensor, not {show(value)}")
    TENSOR_NAME.check(len(value))
    return value


def _rank(value: object) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"must be a positive whole number, not {show(value)}")
    return value


def _pattern(value: object) -> str:
    PATTERN.check(len(plain_text(value)))
    return plain_text(value)


def _modules(value: object) -> object:
    return _pattern(value) if isinstance(value, str) else items(_pattern, PATTERNS)(value)


def _layers(value: object) -> object:
    return amount(value) if isinstance(value, int) else items(amount, LAYERS)(value)


def _anything(value: object) -> object:
    return value


_CONFIG = record(
    {},
    {
        "architectures": nullable(items(line)),
        "model_type": nullable(line),
        "auto_map": nullable(table(line, _anything)),
        "id2label": nullable(table(index, label, LABELS)),
        "label2id": nullable(table(plain_text, _anything, LABELS)),
        "tie_word_embeddings": nullable(flag),
    },
    strict=False,
)


def config(value: Any) -> Mapping[str, Any]:
    """A config.json with no more layers, experts or heads than a class can be built with, and with no other weights
    than those that are read here. Raises ValueError.
    """
    _CONFIG(value)
    _check_values(value)
    found: Mapping[str, Any] = value
    return found


COUNTED = re.compile(r"(layers?|blocks|depths?|stages|experts|heads?|types|repeats?|levels?)(_list)?$")
"""How keys of config.json end under which whole numbers, listed too, say how many modules a class makes."""


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Where weights are looked for; `transformers_weights` in config.json makes transformers read another file."""


def _check_values(value: Any) -> None:
    rest: list[tuple[str, bool, Any]] = [("", False, value)]
    while rest:
        name, counted, one = rest.pop()
        if isinstance(one, Mapping):
            rest += [(str(key), bool(COUNTED.search(str(key).lower())), item) for key, item in one.items()]
        elif isinstance(one, list):
            rest += [(name, counted, item) for item in one]
        elif name == "transformers_weights" and one is not None and one not in _WEIGHTS:
            raise ValueError(f"{name}: names {show(one)}; rename the file to {_WEIGHTS[0]} and remove this key")
        elif isinstance(one, int) and counted | name.endswith("labels"):
            try:
                (LAYERS if counted else LABELS).check(abs(one))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


_EVERY_ADAPTER = record(
    {"peft_type": nullable(line)},
    {
        "task_type": nullable(line),
        "auto_mapping": nullable(record({}, {"base_model_class": nullable(line)}, strict=False)),
        "base_model_name_or_path": nullable(plain_text),
        "revision": nullable(plain_text),
        "lora_alpha": nullable(number),
        "alpha": nullable(number),
        "fan_in_fan_out": nullable(flag),
        "alpha_pattern": nullable(table(_pattern, number, PATTERNS)),
        "target_modules": nullable(_modules),
        "exclude_modules": nullable(_modules),
        "feedforward_modules": nullable(_modules),
        "target_parameters": nullable(items(_pattern, PATTERNS)),
        "layers_pattern": nullable(_modules),
        "layers_to_transform": nullable(_layers),
        "modules_to_save": nullable(items(_pattern, PATTERNS)),
    },
    strict=False,
)
_LORA = record(
    {},
    {
        "r": _rank,
        "use_rslora": nullable(flag),
        "use_dora": nullable(flag),
        "lora_bias": nullable(flag),
        "ensure_weight_tying": nullable(flag),
        "rank_pattern": nullable(table(_pattern, _rank, PATTERNS)),
    },
    strict=False,
)
_MOST = {
    ("ADALORA", "init_r"): 1 << 14,
    ("ADALORA", "target_r"): 1 << 14,
    ("UNILORA", "r"): 1 << 8,
    ("UNILORA", "theta_d_length"): 1 << 24,
}
"""Numbers by which PEFT takes memory before it looks at the adapter's file."""
_COUNTS = ("depth", "gralora_k", "num_subspaces", "boft_n_butterfly_factor", "num_cayley_neumann_terms")
"""Fields of other kinds of adapters that say how often PEFT does something."""


def ADAPTER(value: Any) -> Any:
    """An adapter_config.json: the fields that are read here; PEFT reads the others. Raises ValueError."""
    _EVERY_ADAPTER(value)
    if value["peft_type"] == "LORA":
        return _LORA(value)
    for name, one in value.items():
        if isinstance(one, int) and not isinstance(one, bool) and not -(2**53) < one < 2**53:
            raise ValueError(f"{name}: is too large")
        most = _MOST.get((str(value["peft_type"]), name))
        if most is not None and one is not None and _rank(one) > most:
            raise ValueError(f"{name}: is {one}; the limit is {most}")
        if name in _COUNTS and isinstance(one, int):
            try:
                LAYERS.check(abs(one))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return value


_INDEX = record({"weight_map": table(tensor_name, safe_path, TENSORS)}, strict=False)
MODULES = items(record({}, {"path": nullable(plain_text), "type": nullable(plain_text)}, strict=False))
_KINDS: Mapping[str, Kind] = {"config.json": config, "adapter_config.json": ADAPTER, "modules.json": MODULES}
"""Name of a file -> what it may say; an index is known by its ending."""


def kind_of_file(file: str) -> Kind:
    """The kind (see `validation.values`) of a model's JSON file, by its name."""
    return _INDEX if file.endswith(".index.json") else _KINDS.get(file.rpartition("/")[2], record({}, strict=False))


def read_snapshot_json(snapshot: Snapshot, file: str) -> Any:
    """A small JSON file of a snapshot, checked against what such a file may say (see `kind_of_file`).

    Raises:
        CorruptFileError: beyond a limit, not JSON, or with values of other kinds. SourceError: see `fetch`.
    """
    path = fetch(snapshot, file)
    limit = INDEX_BYTES if file.endswith(".index.json") else JSON_BYTES
    values = HEADER_VALUES if file.endswith(".index.json") else JSON_VALUES
    try:
        # transformers writes infinities into the configurations of some classes
        value = read_json_file(path, limit, values=values, finite=not file.endswith("config.json"))
        kind_of_file(file)(value)
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"{snapshot.label}: {file} cannot be used: {error}.") from error
    return value
