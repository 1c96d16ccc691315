"""Marked parts of a card beside the one that the ledger gives: found, replaced, taken out; all other text stays.

Scores have a part of their own, and entries of `model-index` that name hfmerge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfmerge.errors import HfMergeError
from hfmerge.hub.reference import is_path
from hfmerge.ledger.card import END, read_front, split_front
from hfmerge.validation.strict_yaml import dump_yaml


def part(text: str, name: str) -> str | None:
    """What stands between a part's markers, or None."""
    place = _place(text, name)
    return text[place[0] + len(_begin(name)) : place[1] - len(_end(name))].strip() if place else None


def with_part(text: str, name: str, body: str | None) -> str:
    """The card with a part replaced, added behind the ledger's block, or taken out where `body` is None."""
    whole = "" if body is None else f"\n{_begin(name)}\n{body.strip()}\n{_end(name)}\n"
    if place := _place(text, name):
        return text[: place[0]].removesuffix("\n") + whole + text[place[1] :].removeprefix("\n")
    if not whole:
        return text
    before, marker, after = text.partition(f"{END}\n")
    return f"{before}{marker}{whole}{after}" if marker else f"{text.rstrip()}\n{whole}"


def linked_files(body: str | None, folder: str) -> list[str]:
    """Files of a folder of the repository that a part links to."""
    return [name for name in re.findall(rf"\(({re.escape(folder)}/[\w.-]+)\)", body or "") if is_path(name)]


def _begin(name: str) -> str:
    return f"<!-- hfmerge:{name}:begin -->"


def _end(name: str) -> str:
    return f"<!-- hfmerge:{name}:end -->"


def _place(text: str, name: str) -> tuple[int, int] | None:
    """Where a part's first marker begins and its last one ends; a card may hold many that have no end."""
    start = text.find(_begin(name))
    stop = text.find(_end(name), start + len(_begin(name))) if start >= 0 else -1
    return (start, stop + len(_end(name))) if stop >= 0 else None


RESULTS = "results"
"""Name of the card's part."""
TOOL = "hfmerge"
"""What `metrics[].args.tool` of our entries begins with."""
RESULTS_PREFIX = ".eval_results/hfmerge-"
"""The Hub reads results on registered benchmarks there; files of ours begin so."""
_INDEX = re.compile(r"^model-index:.*\n(?:[ \t-].*\n|\n(?=[ \t-]))*", re.MULTILINE)


def with_scores(text: str, body: str | None, entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """A card with other scores, every other character as it was.

    Args:
        text: the card so far; "" for none.
        body: Markdown of the marked part; None takes the part out.
        entries: results for `model-index`.
        name: what a `model-index` that is not there yet calls the model.

    Raises:
        HfMergeError: front matter that is not YAML, or a `model-index` that is no list.
    """
    head, rest = split_front(text)
    front = read_front(head)
    index = _merged(front.get("model-index"), name, entries)
    wanted = {key: value for key, value in front.items() if key != "model-index"}
    wanted |= {"model-index": index} if index else {}
    if wanted != front:
        entry = dump_yaml({"model-index": index}) if index else ""
        edited = _INDEX.sub(lambda _: entry, head, count=1) if _INDEX.search(head) else head + entry
        # a key written in an unusual way is parsed and written anew: its content stays, its layout does not
        head = edited if read_front(edited) == wanted else dump_yaml(wanted)
    return (f"---\n{head}---\n" if head.strip() else "") + with_part(rest, RESULTS, body)


def without_scores(text: str) -> str:
    """A card without our scores, which are about other weights."""
    return text if part(text, RESULTS) is None else with_scores(text, None, (), "")


def carried_scores(source: str, text: str) -> str:
    """A card with our scores of another card of the same weights, or without any."""
    body = part(source, RESULTS)
    if body is None:
        return without_scores(text)
    entries, name = [], ""
    for model in _models(read_front(split_front(source)[0]).get("model-index")):
        ours = [result for result in model["results"] if _ours(result)]
        entries += ours
        name = str(model.get("name", "")) if ours else name
    return with_scores(text, body, entries, name)


def _merged(index: Any, name: str, entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A `model-index` with our entries renewed and all others kept."""
    if index is not None and not isinstance(index, list):
        raise HfMergeError("the card's model-index is not a list; correct it by hand.")
    kept: list[Any] = []
    place = None
    for model in index or ():
        if model not in _models([model]):
            kept.append(model)
            continue
        foreign = [result for result in model["results"] if not _ours(result)]
        if foreign:
            place = len(kept) if place is None else place
            kept.append({**model, "results": foreign})
    if not entries:
        return kept
    if place is None:
        return [*kept, {"name": name, "results": list(entries)}]
    kept[place] = {**kept[place], "results": [*kept[place]["results"], *entries]}
    return kept


def _models(index: Any) -> list[Any]:
    """Those members of a `model-index` that hold results."""
    listed = index if isinstance(index, list) else []
    return [model for model in listed if isinstance(model, Mapping) and isinstance(model.get("results"), list)]


def _ours(result: Any) -> bool:
    metrics = result.get("metrics") if isinstance(result, Mapping) else None
    args = [metric.get("args") for metric in metrics or () if isinstance(metric, Mapping)]
    return any(isinstance(a, Mapping) and str(a.get("tool", "")).startswith(TOOL) for a in args)
