"""Reads the parts of a mergekit file that all methods share: models or one slice, parameters, dtypes, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfmerge.errors import Problem
from hfmerge.validation.values import Section, show, text


@dataclass(frozen=True)
class Input:
    """One model and its own parameters."""

    model: str
    parameters: Section


@dataclass(frozen=True)
class ModelInputs:
    """The models of a merge.

    Attributes:
        inputs: in the file's order; empty if one of them is faulty.
        shared: parameters that hold for all models, the strongest first.
        sliced: given as a slice, to which mergekit does not add a missing base.
    """

    inputs: tuple[Input, ...]
    shared: tuple[Section, ...]
    sliced: bool


def read_model_inputs(top: Section, notes: list[str]) -> ModelInputs:
    """The models, from `models` or from a single slice that takes the same layers of each."""
    models, slices = top.data.get("models"), top.data.get("slices")
    parameters = _parameters(top)
    if models is not None and slices is not None:
        top.report("slices", "stands beside models; keep one of the two")
    elif models is not None:
        return ModelInputs(_inputs(top, "models", ("model", "parameters")), (parameters,), sliced=False)
    elif slices is None and top.data.get("modules") is None:
        top.report("models", "is missing")
    elif slices is not None and (not isinstance(slices, list | tuple) or len(slices) != 1):
        top.report("slices", "only one slice with all layers of every model can be expressed; layers cannot be moved")
    elif slices is not None and not isinstance(slices[0], Mapping):
        top.report("slices[0]", f"must be a mapping with sources, not {show(slices[0])}")
    elif slices is not None:
        part = Section(slices[0], "slices[0]", top.problems)
        part.refuse_unknown(("sources", "base_model", "residual_weight", "parameters"), "key")
        for key in ("base_model", "residual_weight"):
            if part.data.get(key) is not None:
                part.report(key, "a setting of one slice cannot be expressed; use base_model of the whole file")
        inputs = _inputs(part, "sources", ("model", "layer_range", "parameters"))
        _check_ranges(part, notes)
        return ModelInputs(inputs, (_parameters(part), parameters), sliced=True)
    return ModelInputs((), (parameters,), sliced=False)


def _inputs(parent: Section, key: str, known: tuple[str, ...]) -> tuple[Input, ...]:
    given = parent.data.get(key)
    if not isinstance(given, list | tuple) or not given:
        empty = isinstance(given, list | tuple)
        parent.report(key, "must not be empty" if empty else f"must be a list of models, not {show(given)}")
        return ()
    result = []
    for i, item in enumerate(given):
        path = f"{parent.at(key)}[{i}]"
        if not isinstance(item, Mapping):
            parent.problems.append(Problem(path, f"must be a mapping with `model`, not {show(item)}"))
            continue
        section = Section(item, path, parent.problems)
        section.refuse_unknown(known, "key")
        result.append(Input(section.read("model", model_text, "", required=True), _parameters(section)))
    return tuple(result) if len(result) == len(given) and all(entry.model for entry in result) else ()


def _parameters(parent: Section) -> Section:
    """The `parameters` of a model, a slice or the file; empty if there are none."""
    given = parent.data.get("parameters")
    if given is not None and not isinstance(given, Mapping):
        parent.report("parameters", f"must be a mapping, not {show(given)}")
    return Section(given if isinstance(given, Mapping) else {}, parent.at("parameters"), parent.problems)


def _check_ranges(part: Section, notes: list[str]) -> None:
    """All sources must give the same layers, counted from 0; whether those are all is left to the user to see."""
    sources = part.data.get("sources")
    ranges = [s.get("layer_range") for s in sources if isinstance(s, Mapping)] if isinstance(sources, list) else []
    if not ranges:
        return
    first = ranges[0]
    pair = first if isinstance(first, list | tuple) and len(first) == 2 else (None, None)
    start, end = pair
    whole = type(start) is int and type(end) is int and start == 0 and end > 0
    if not whole or any(other != first for other in ranges):
        part.report("sources", "every layer_range must be the same [0, number of layers]; layers cannot be moved")
        return
    notes.append(
        f"slices[0]: taken as all layers, which is right only if every model has exactly {end} of them; "
        "hfmerge merges every layer of the base"
    )


def read_dtype(top: Section, notes: list[str]) -> str | None:
    """The output's dtype: `out_dtype`, else `dtype`, in which mergekit also computes."""
    computed = top.read("dtype", _dtype_name, None, nullable=True)
    written = top.read("out_dtype", _dtype_name, None, nullable=True) or computed
    if computed in ("float16", "bfloat16"):
        notes.append(f"dtype: mergekit also computes in {computed}; hfmerge computes in float32 or better")
    if written is None:
        notes.append("no dtype: the output has the base's, where mergekit takes the widest of all models")
    return written


def read_tokenizer_source(top: Section, base: str | None) -> str | None:
    """`base`, `union`, or None, from `tokenizer_source` or `tokenizer`."""
    key, given, settings = "tokenizer_source", top.data.get("tokenizer_source"), top.data.get("tokenizer")
    if settings is not None and given is not None:
        top.report("tokenizer", "stands beside tokenizer_source; keep one of the two")
    elif settings is not None and not isinstance(settings, Mapping):
        top.report("tokenizer", f"must be a mapping, not {show(settings)}")
    elif settings is not None:
        section = Section(settings, "tokenizer", top.problems)
        section.refuse_unknown(("source", "tokens", "pad_to_multiple_of"), "key")
        for name in ("tokens", "pad_to_multiple_of"):
            if settings.get(name):
                section.report(name, "cannot be expressed; remove it")
        key, given = "tokenizer.source", settings.get("source", "union")
    if given is None:
        return None
    if given in ("base", "union"):
        return str(given)
    try:
        source = model_text(given)
    except ValueError as error:
        top.report(key, str(error))
        return None
    if source == base:
        return "base"
    top.report(key, f"the tokenizer of {show(source)} cannot be expressed; only base and union can")
    return None


def constant(setting: Any) -> Any:
    """The one value a setting has for all tensors and layers.

    Raises:
        ValueError: it has several (a gradient, filters), or none for some tensors; the text names which.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return setting
    if not setting:
        raise ValueError("is an empty list")
    if not any(isinstance(item, Mapping) for item in setting):
        if any(item != setting[0] for item in setting):
            raise ValueError("a gradient over the layers cannot be expressed; give one value")
        return setting[0]
    values, filters = [], []
    for item in setting:
        if not isinstance(item, Mapping) or "value" not in item or not set(item) <= {"value", "filter"}:
            raise ValueError("must be a value or a list of {filter, value}")
        values.append(constant(item["value"]))
        if item.get("filter") in (None, "*"):
            break
        filters.append(show(item["filter"]))
    else:
        raise ValueError(f"has no value but for the filter {', '.join(filters)}; filters cannot be expressed")
    if any(value != values[0] for value in values):
        raise ValueError(f"different values by filter {', '.join(filters)} cannot be expressed; give one value")
    return values[0]


def model_text(value: Any) -> str:
    """A model as text, `path[@revision][+adapter[@revision]]`, from mergekit's text or mapping. Raises ValueError."""
    if not isinstance(value, Mapping):
        return text(value)
    unknown = [str(key) for key in value if key not in ("model", "lora", "path", "revision")]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} of a model cannot be expressed")
    if value.get("path") is not None:
        revision = value.get("revision")
        return text(value["path"]) + (f"@{text(revision)}" if revision is not None else "")
    if value.get("model") is None:
        raise ValueError("must be text, or a mapping with `model` or `path`")
    adapter = value.get("lora")
    return model_text(value["model"]) + (f"+{model_text(adapter)}" if adapter is not None else "")


def _dtype_name(value: Any) -> str:
    return text(value).removeprefix("torch.")
