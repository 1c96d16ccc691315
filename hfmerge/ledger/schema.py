"""What a ledger entry may say: the kind of every value of the file, checked before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hfmerge.errors import Problem
from hfmerge.methods import registry
from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.values import model_alias, norm, option_names, pattern, read_options
from hfmerge.validation.limits import FILES, LABELS, MODELS, PATTERNS
from hfmerge.validation.values import (
    Section,
    amount,
    commit,
    factor,
    flag,
    folder_name,
    hub_model,
    items,
    line,
    nullable,
    number,
    one_of,
    plain_text,
    record,
    safe_path,
    sha256,
    show,
    table,
)


SCHEMA = "hfmerge/ledger/1"
ACTIONS = ("merge", "add", "unmerge", "subtract", "replace", "reorder", "rebase", "restore")


def model_name(value: object) -> str:
    """A repository ID, with the subfolder in it, or the name of a folder. Raises ValueError."""
    return hub_model(value) if isinstance(value, str) and "/" in value else folder_name(value)


def identity(value: object) -> str:
    """`org/name@commit`, `org/name/folder@commit` or `folder@sha256:digest`. Raises ValueError."""
    name, folder, digest = line(value).rpartition("@sha256:")
    if folder:
        return f"{folder_name(name)}{folder}{sha256(digest)}"
    name, _, pin = line(value).rpartition("@")
    return f"{hub_model(name)}@{commit(pin)}"


def weight(value: object) -> object:
    """A number, or a list of pairs of pattern and number that ends with the pattern `*`. Raises ValueError."""
    if not isinstance(value, list):
        return factor(value)
    PATTERNS.check(len(value))
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{show(pair)} is not a pair of pattern and number")
        pattern(pair[0])
        factor(pair[1])
    if not value or value[-1][0] != "*":
        raise ValueError("weights by pattern must end with *")
    return value


def square(value: object) -> float:
    """A number that is not below zero. Raises ValueError."""
    if number(value) < 0.0:
        raise ValueError(f"must be at least 0, not {show(value)}")
    return number(value)


def _counted(value: object) -> int:
    if amount(value) == 0:
        raise ValueError("must be at least 1, not 0")
    return amount(value)


def _file(value: object) -> str:
    """A file of a material; a leading `+` marks those of the model beneath an adapter."""
    return safe_path(line(value).removeprefix("+"))


def _head(value: object) -> str:
    if safe_path(value).count("/") != 1 or not str(value).startswith("heads/"):
        raise ValueError(f"must be a folder in heads/, not {show(value)}")
    return str(value)


def _scalar(value: object) -> object:
    if isinstance(value, bool):
        return value
    return plain_text(value) if isinstance(value, str) else number(value)


def _of_environment(value: object) -> object:
    return line(value) if isinstance(value, str) else amount(value)


_METHOD = record({"name": line, "version": _counted, "options": table(line, _scalar), "norm": norm})


def recorded_method(value: Any) -> object:
    """A method with its options, each of its own type where this version of the method is here. Raises ValueError."""
    _METHOD(value)
    problem = _options_problem(value["name"], value["version"], json.dumps(value["options"], sort_keys=True))
    if problem is not None:
        raise ValueError(problem)
    return value


@lru_cache(maxsize=256)
def _options_problem(name: str, version: int, options: str) -> str | None:
    known = registry().get(name)
    if known is None or known.version != version:
        return None  # of another package, or another version of hfmerge: read, but not run
    problems: list[Problem] = []
    section = Section(json.loads(options), "options", problems)
    section.refuse_unknown(option_names(known), f"option of {name}")
    read_options(section, known)
    return f"{problems[0].path}: {problems[0].text}" if problems else None


_MATERIAL = record(
    {
        "name": model_name,
        "commit": nullable(commit),
        "digest": nullable(sha256),
        "kind": one_of(("full", "adapter")),
        "weight": weight,
        "files": table(_file, sha256, FILES),
        "beneath": nullable(identity),
        "squared_norm": nullable(square),
        "head": nullable(_head),
        "labels": items(plain_text, LABELS),
        "license": nullable(plain_text),
    },
    {
        "unverified": items(_file, FILES),
        "ledger": sha256,
        "contains": items(identity, FILES),
        "subtracted": flag,
        "untied": flag,
        "trained_on": model_name,
        "differing": items(plain_text, LABELS),
        "kept": sha256,
        "alias": model_alias,
    },
)


def material(value: Any) -> object:
    """A base or model: one of the Hub has a commit, a folder has a digest. Raises ValueError."""
    _MATERIAL(value)
    if (value["commit"] is None) == (value["digest"] is None):
        raise ValueError("must have either a commit or a digest")
    return identity(f"{value['name']}@{value['commit'] or 'sha256:' + value['digest']}")


_LOOK = (amount, nullable(number), nullable(number), items(number))


def _look(value: object) -> object:
    """A point of the curve of learning: step, loss, loss on rows held out, mean weight of each model."""
    if not isinstance(value, list) or len(value) != len(_LOOK):
        raise ValueError(f"must be a list of {len(_LOOK)} values, not {show(value)}")
    return [kind(item) for kind, item in zip(_LOOK, value, strict=True)]


_ROWS = record(
    {
        "source": plain_text,
        "kind": line,
        "generator": line,
        "seed": amount,
        "rows": amount,
        "held_out": amount,
        "passes": amount,
        "bytes": amount,
        "sha256": sha256,
    },
    {"classes": record({"covered": amount, "of": amount, "confidence": number})},
)
LEARNED = record(
    {
        "how": plain_text,
        "groups": items(plain_text, FILES),
        "steps": amount,
        "curve": items(_look),
        "replay": items(nullable(_ROWS), MODELS),
        "fisher": nullable(sha256),
    },
    {"device": line},
)
_SETTINGS = record(
    {
        **{key.name: key.stored for key in keys_of(Recipe) if key.declared.get("recorded") == "always"},
        "card": table(line, nullable(plain_text)),
    },
    {key.name: key.stored for key in keys_of(Recipe) if key.declared.get("recorded") == "set"},
)
SCALARS = record(
    {"scale": number, "merged_norm": square},
    {"deviation": number, "grid": number, "gap": number, "gap_bound": number},
)
ENTRY = record(
    {
        "schema": one_of((SCHEMA,)),
        "step": _counted,
        "parent": nullable(sha256),
        "action": record(
            {"type": one_of(ACTIONS), "models": items(model_name, MODELS), "how": plain_text}, {"restored": _counted}
        ),
        "materials": record({"base": material, "models": items(material, MODELS)}),
        "method": recorded_method,
        "settings": _SETTINGS,
        "byproducts": record(
            {
                "scalars": SCALARS,
                "states": items(record({"count": amount, "sha256": sha256, "nbytes": amount}), MODELS),
            },
            {"learned": LEARNED},
        ),
        "products": table(safe_path, sha256, FILES),
        "environment": table(line, nullable(_of_environment)),
    }
)
"""A whole file, but for what its parts have to do with each other."""


def check_entry(value: Any) -> Mapping[str, Any]:
    """The entry as it is. Raises ValueError that names the place of its first problem."""
    ENTRY(value)
    found: Mapping[str, Any] = value
    if not found["materials"]["models"]:
        raise ValueError("materials: models: must not be empty")
    if "learned" in found["byproducts"] and "learn" not in found["settings"]:
        raise ValueError("byproducts: learned: the settings do not say what was asked (learn)")
    rows = found["byproducts"].get("learned", {}).get("replay", ())
    if rows and len(rows) != len(found["materials"]["models"]):
        raise ValueError("byproducts: learned: replay: must have one item for each model")
    return found
