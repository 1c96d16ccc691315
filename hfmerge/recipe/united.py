"""`vocabulary: union` and `tokenizer: union` are one wish: rows for the tokens of all models, and their tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hfmerge.validation.values import Section


UNION = "union"
"""The value of both keys."""
_KEYS = ("vocabulary", "tokenizer")


def both_united(values: dict[str, Any], top: Section) -> None:
    """Either key gives the other; a contradiction goes to the problems of the recipe.

    Args:
        values: of all keys of a recipe.
    """
    if values["tokenizer"] == UNION and values["vocabulary"] == "base":
        top.report("tokenizer", "is united only with the rows of its tokens; remove it, or write `vocabulary: union`")
    if UNION in (values["tokenizer"], values["vocabulary"]):
        values["vocabulary"], values["tokenizer"] = UNION, values["tokenizer"] or UNION


def without_united(data: dict[str, Any], replaced: Collection[str]) -> None:
    """Where one of the keys is replaced, the other does not stay if it came with it."""
    for key, other in (_KEYS, _KEYS[::-1]):
        if key in replaced and data.get(other) == UNION:
            del data[other]
