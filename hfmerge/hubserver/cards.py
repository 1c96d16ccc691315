"""Model and dataset cards: reading the front matter, checking it, and the tags the Hub derives from it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hfmerge.hubserver.plain import MOST_DEPTH, check_plain


REPO_ID = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))\w[\w.-]*(/\w[\w.-]*)?(?<![.-])", re.ASCII)

RELATIONS = ("adapter", "finetune", "merge", "quantized")

# Limits of a YAML document, checked before anything is built from it: its length, the values it becomes once
# aliases are written out, how deep they lie, and the digits of a number.
_MOST_TEXT = 1 << 20
_MOST_VALUES = 50_000
_MOST_DIGITS = 64


@dataclass(frozen=True)
class Card:
    """The front matter of a card: its data, and what is wrong with it."""

    data: Mapping[str, Any]
    errors: Sequence[str]
    warnings: Sequence[str]


# The loader in C reads ten times as fast; it is missing from some installations.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _CardLoader(_Base):
    """YAML 1.2 as the Hub reads it: only true and false are booleans, dates are texts, a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicated key {key!r}", key_node.start_mark)
            seen.update([] if key is None else [key])
        return dict(super().construct_mapping(node, deep))

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """An integer or a float; more digits than any number has, which take quadratic time to read, stay a text."""
        if len(node.value) > _MOST_DIGITS:
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


_CardLoader.add_constructor("tag:yaml.org,2002:int", _CardLoader.construct_number)
_CardLoader.add_constructor("tag:yaml.org,2002:float", _CardLoader.construct_number)
_CardLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_CardLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_yaml(text: str) -> Any:
    """A YAML document as JSON-like values.

    Raises:
        ValueError: not YAML, beyond a limit, or not representable (recursive, not Unicode).
    """
    if len(text) > _MOST_TEXT:
        raise ValueError(f"bad YAML: longer than {_MOST_TEXT} characters")
    try:
        _measure(text)
        value = _plain(yaml.load(text, _CardLoader))  # a safe loader
        check_plain(value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"bad YAML{where}: {getattr(error, 'problem', None) or error}") from error
    return value


def _measure(text: str) -> None:
    """How deep a document is and how many values it has, from its events, without following an alias.

    Raises:
        ValueError: too much of either, or an alias to what holds it.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, _CardLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                raise ValueError("recursive or too large")
            total += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if total > _MOST_VALUES:
            raise ValueError("recursive or too large")
        if len(open_nodes) > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH} levels")


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _plain(item) for key, item in node.items()}
    if isinstance(node, list | tuple | set | frozenset):
        return [_plain(item) for item in node]
    if isinstance(node, float) and not math.isfinite(node):
        return str(node)
    return node if isinstance(node, str | int | float | bool | None) else str(node)


def front_matter(text: str) -> str | None:
    """The YAML between the two `---` lines at the top of a card, None if there is none."""
    lines = text.removeprefix("\ufeff").lstrip().splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    for number, line in enumerate(lines[1:], start=1):
        if line.rstrip() == "---":
            return "\n".join(lines[1:number])
    return None


def read_card(text: str, kind: str) -> Card:
    """Parse and check a card of a `model` or `dataset`. Identifiers of licences and tasks are not checked."""
    block = front_matter(text)
    if block is None or not block.strip():
        return Card({}, [], ["empty or missing yaml metadata in repo card"])
    try:
        data = load_yaml(block)
    except ValueError as error:
        return Card({}, [str(error)], [])
    if not isinstance(data, dict):
        return Card({}, ["the metadata must be a mapping of keys to values"], [])
    errors: list[str] = []
    for key in ("license", "language"):
        _check_texts(data, key, errors)
    _check_texts(data, "tags", errors, one=False)
    for key in ("datasets", "metrics", "base_model"):
        _check_texts(data, key, errors)
    for key in ("new_version", "license_name", "license_link", "library_name", "pipeline_tag", "pretty_name"):
        _check_texts(data, key, errors, many=False)
    for key in ("base_model", "new_version"):
        for value in _texts(data.get(key)):
            if not REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use a model id, such as org/name.')
    if kind == "model" and data.get("base_model_relation") is not None:
        if data["base_model_relation"] not in RELATIONS:
            errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    if data.get("model-index") is not None:
        _check_model_index(data["model-index"], errors)
    if kind == "dataset" and data.get("configs") is not None:
        configs = data["configs"]
        if not isinstance(configs, list) or not all(isinstance(c, dict) and "config_name" in c for c in configs):
            errors.append('"configs" must be a list of mappings with a "config_name"')
    return Card(data, errors, [])


def card_tags(data: Mapping[str, Any], kind: str, relation: str | None) -> list[str]:
    """The tags that follow from a card, without repetitions."""
    tags = [str(data["library_name"])] if isinstance(data.get("library_name"), str) else []
    tags += _texts(data.get("tags"))
    tags += _texts(data.get("language"))
    if kind == "model":
        tags += [f"dataset:{name}" for name in _texts(data.get("datasets"))]
        bases = _texts(data.get("base_model"))
        tags += [f"base_model:{name}" for name in bases]
        tags += [f"base_model:{relation}:{name}" for name in bases if relation]
        tags += _texts(data.get("pipeline_tag"))
    else:
        for key in ("task_categories", "size_categories", "annotations_creators", "multilinguality"):
            tags += [f"{key}:{name}" for name in _texts(data.get(key))]
    tags += [f"license:{name}" for name in _texts(data.get("license"))]
    return list(dict.fromkeys(tags))


def relation_of(data: Mapping[str, Any], *, adapter: bool, quantized: bool) -> str | None:
    """How a model comes from its base models: what the card says, else what the Hub would infer."""
    if not _texts(data.get("base_model")):
        return None
    if data.get("base_model_relation") in RELATIONS:
        return str(data["base_model_relation"])
    if adapter:
        return "adapter"
    if quantized:
        return "quantized"
    return "merge" if len(_texts(data.get("base_model"))) > 1 else "finetune"


def base_models(data: Mapping[str, Any]) -> list[str]:
    """The base models a card names."""
    return _texts(data.get("base_model"))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _check_texts(data: Mapping[str, Any], key: str, errors: list[str], *, one: bool = True, many: bool = True) -> None:
    value = data.get(key)
    if value is None or (one and isinstance(value, str)):
        return
    if many and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return
    wanted = " or ".join(["a string"] * one + ["an array of strings"] * many)
    errors.append(f'"{key}" must be {wanted}')


def _check_model_index(value: Any, errors: list[str]) -> None:
    def need(node: Any, where: str, key: str, kind: type) -> Any:
        found = node.get(key) if isinstance(node, dict) else None
        if found is None:
            errors.append(f'"{where}.{key}" is required')
        elif not isinstance(found, kind):
            errors.append(f'"{where}.{key}" must be {"an array" if kind is list else "a string or mapping"}')
            return None
        return found

    if not isinstance(value, list):
        errors.append('"model-index" must be an array')
        return
    for m, model in enumerate(value):
        here = f"model-index[{m}]"
        need(model, here, "name", str)
        for r, result in enumerate(need(model, here, "results", list) or []):
            there = f"{here}.results[{r}]"
            if (task := need(result, there, "task", dict)) is not None:
                need(task, f"{there}.task", "type", str)
            if isinstance(result, dict) and (dataset := result.get("dataset")) is not None:
                need(dataset, f"{there}.dataset", "name", str)
                need(dataset, f"{there}.dataset", "type", str)
            for i, metric in enumerate(need(result, there, "metrics", list) or []):
                need(metric, f"{there}.metrics[{i}]", "type", str)
                if isinstance(metric, dict) and "value" not in metric:
                    errors.append(f'"{there}.metrics[{i}].value" is required')
