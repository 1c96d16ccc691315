"""A plan as a JSON text, and back: equal to the plan that was written, and checked like any file of strangers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hfmerge.checkpoint.behaviour import CHOICES
from hfmerge.engine.plan import Plan
from hfmerge.errors import HfMergeError, Problem
from hfmerge.hub.reference import is_path, is_segment
from hfmerge.methods import MergeMethod, registry
from hfmerge.recipe.values import option_names, read_options
from hfmerge.validation.dataclass_json import Special, from_json_value, to_json_value
from hfmerge.validation.limits import PLAN_BYTES, PLAN_VALUES
from hfmerge.validation.strict_json import read_json
from hfmerge.validation.values import Section, record, show, text, whole


FORMAT = "hfmerge plan"
SCHEMA_VERSION = 3
"""Version of the JSON form. It is raised whenever a field of a plan is added, removed or changed."""


def plan_to_json(plan: Plan) -> str:
    """The plan as one JSON text.

    Numbers that are not finite are written as Python writes them (`Infinity`): configurations of models hold some.
    """
    data = {"format": FORMAT, "version": SCHEMA_VERSION, "plan": to_json_value(plan, _SPECIAL)}
    return json.dumps(data, separators=(",", ":"))


def plan_from_json(data: bytes, origin: str = "plan") -> Plan:
    """The plan that `plan_to_json` wrote, in UTF-8.

    No file is opened and nothing is downloaded. What a plan says about files and models is a claim; a run of the plan
    checks it. A plan also holds the consents of the person who made it (`Recipe.allow_pickle`,
    `Recipe.trust_remote_code`).

    Args:
        data: UTF-8 text of `plan_to_json`.
        origin: names it in errors.

    Raises:
        HfMergeError: the text is not a plan, is of another version, or has a field with a wrong value.
    """
    try:
        found = read_json(data, PLAN_BYTES, values=PLAN_VALUES, finite=False)
        record({"format": text, "version": whole, "plan": lambda value: value})(found)
        if (found["format"], found["version"]) != (FORMAT, SCHEMA_VERSION):
            raise ValueError(f"is {show(found['format'])} {found['version']}, not {FORMAT} {SCHEMA_VERSION}")
        plan: Plan = from_json_value(found["plan"], Plan, _SPECIAL)
        _check_consistent(plan)
    except ValueError as error:
        raise HfMergeError(f"{origin}: {error}; plan again.") from error
    return plan


def _write_method(method: MergeMethod) -> dict[str, Any]:
    return {"name": method.name, "version": method.version, "options": dataclasses.asdict(method)}


def _read_method(value: Any) -> MergeMethod:
    """Raises ValueError."""
    record({"name": text, "version": whole, "options": lambda value: value})(value)
    kind = registry().get(value["name"])
    if kind is None or kind.version != value["version"]:
        raise ValueError(f"{show(value['name'])} of version {value['version']} is not here")
    if not isinstance(value["options"], dict):
        raise ValueError(f"options: must be a mapping, not {show(value['options'])}")
    problems: list[Problem] = []
    section = Section(value["options"], "options", problems)
    section.refuse_unknown(option_names(kind), f"option of {kind.name}")
    options = read_options(section, kind)
    if problems:
        raise ValueError(f"{problems[0].path}: {problems[0].text}")
    return kind(**options)


_SPECIAL: Special = {MergeMethod: (_write_method, _read_method)}


def _check_consistent(plan: Plan) -> None:
    """What a run writes stays in its folder, and what refers to models refers to those there. Raises ValueError."""
    for name in (*(param.file for param in plan.params), *plan.side_files):
        if not is_path(name):
            raise ValueError(f"{show(name)} is not the path of a file in a folder")
    count, gone = len(plan.deltas), len(plan.leaving)
    if len(plan.recipe.models) != count or len(plan.leaving_weights) != gone or plan.start > count:
        raise ValueError("the models and their weights are not equally many")
    for model, head in plan.heads:
        if not is_segment(head.slug) or not 0 <= model < count:
            raise ValueError(f"a head has the name {show(head.slug)} and the model {model}")
    if not all(0 <= model < count for model in plan.untied):
        raise ValueError(f"{show(list(plan.untied))} are not all models that untie the base")
    if any(name not in CHOICES or not -1 <= model < count for name, model in plan.chosen.items()):
        raise ValueError(f"{show(dict(plan.chosen))} are not choices of models")
    for source in plan.sources:
        if strange := [key for key in source.renamed if key not in source.tensors]:
            raise ValueError(f"{show(strange[0])} is not a tensor of {show(source.name)}")
    for delta in (*plan.deltas, *plan.leaving):
        for origin in delta.layers.values():
            strange = [key for key in origin.base.values() if key not in plan.base.tensors]
            strange += [key for key in origin.keys if key not in delta.source.tensors]
            if strange:
                raise ValueError(f"{show(strange[0])} is not a tensor that {show(delta.source.name)} changes")
    for param in plan.params:
        if param.mode == "merge" and (len(param.ranks), len(param.leaving)) != (count, gone):
            raise ValueError(f"{show(param.key)} has {len(param.ranks)} and {len(param.leaving)} ranks")
