"""Continual and reversible model merging for the Hugging Face Hub.

The public names are imported when first used, so that `import hfmerge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfmerge.version import __version__


if TYPE_CHECKING:
    from hfmerge.api import MergeResult, add, merge, plan, push, unmerge, verify
    from hfmerge.checkpoint.heads import load_with_head
    from hfmerge.errors import HfMergeError, RecipeError
    from hfmerge.hub import Pushed
    from hfmerge.planned import Plan
    from hfmerge.recipe import MethodChoice, ModelEntry, Recipe, load_recipe
    from hfmerge.verifying import Report

_HOMES = {
    "hfmerge.api": ("MergeResult", "add", "merge", "plan", "push", "unmerge", "verify"),
    "hfmerge.checkpoint.heads": ("load_with_head",),
    "hfmerge.errors": ("HfMergeError", "RecipeError"),
    "hfmerge.hub": ("Pushed",),
    "hfmerge.planning": ("Plan",),
    "hfmerge.recipe": ("MethodChoice", "ModelEntry", "Recipe", "load_recipe"),
    "hfmerge.verifying": ("Report",),
}

__all__ = [
    "HfMergeError",
    "MergeResult",
    "MethodChoice",
    "ModelEntry",
    "Plan",
    "Pushed",
    "Recipe",
    "RecipeError",
    "Report",
    "__version__",
    "add",
    "load_recipe",
    "load_with_head",
    "merge",
    "plan",
    "push",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    # no module of the package may be called like a public name: importing it would hide the name
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'hfmerge' has no attribute {name!r}")
