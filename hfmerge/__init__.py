"""Continual and reversible model merging for the Hugging Face Hub.

The public names are imported when first used, so that `import hfmerge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfmerge.version import __version__


if TYPE_CHECKING:
    from hfmerge.api import (
        MergeResult,
        add,
        certify,
        diff,
        dry_run,
        evaluate,
        history,
        inspect,
        merge,
        plan,
        purge_history,
        push,
        rebase,
        reorder,
        replace,
        restore,
        unmerge,
        unmerge_checked,
        verify,
    )
    from hfmerge.checkpoint.heads import load_with_head
    from hfmerge.engine.plan import Plan
    from hfmerge.errors import HfMergeError, RecipeError
    from hfmerge.evaluation.evaluator import Settings
    from hfmerge.evaluation.inspection.inspection import Inspection
    from hfmerge.evaluation.results import Matrix, Score
    from hfmerge.evaluation.suite import Suite, load_suite
    from hfmerge.ledger.diff import Difference
    from hfmerge.ledger.log import Step
    from hfmerge.lifecycle.certify import Certificate
    from hfmerge.lifecycle.check_removal import Behaviour
    from hfmerge.lifecycle.forecast import Forecast
    from hfmerge.lifecycle.publish import Pushed
    from hfmerge.lifecycle.purge import Purged, PurgePlan
    from hfmerge.lifecycle.verify import Report
    from hfmerge.recipe.learning import Learning
    from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe, load_recipe
    from hfmerge.recipe.weights import PatternWeights

_HOMES = {
    "hfmerge.api": (
        "add",
        "certify",
        "diff",
        "dry_run",
        "evaluate",
        "history",
        "inspect",
        "merge",
        "MergeResult",
        "plan",
        "purge_history",
        "push",
        "rebase",
        "reorder",
        "replace",
        "restore",
        "unmerge",
        "unmerge_checked",
        "verify",
    ),
    "hfmerge.lifecycle.certify": ("Certificate",),
    "hfmerge.checkpoint.heads": ("load_with_head",),
    "hfmerge.ledger.diff": ("Difference",),
    "hfmerge.errors": (
        "HfMergeError",
        "RecipeError",
    ),
    "hfmerge.lifecycle.check_removal": ("Behaviour",),
    "hfmerge.evaluation.results": (
        "Matrix",
        "Score",
    ),
    "hfmerge.evaluation.evaluator": ("Settings",),
    "hfmerge.evaluation.suite": (
        "load_suite",
        "Suite",
    ),
    "hfmerge.lifecycle.publish": ("Pushed",),
    "hfmerge.evaluation.inspection.inspection": ("Inspection",),
    "hfmerge.recipe.learning": ("Learning",),
    "hfmerge.engine.planner": ("Plan",),
    "hfmerge.lifecycle.forecast": ("Forecast",),
    "hfmerge.lifecycle.purge": (
        "Purged",
        "PurgePlan",
    ),
    "hfmerge.recipe.recipe": (
        "load_recipe",
        "MethodChoice",
        "ModelEntry",
        "Recipe",
    ),
    "hfmerge.ledger.log": ("Step",),
    "hfmerge.lifecycle.verify": ("Report",),
    "hfmerge.recipe.weights": ("PatternWeights",),
}

__all__ = [
    "Behaviour",
    "Certificate",
    "Difference",
    "Forecast",
    "HfMergeError",
    "Inspection",
    "Learning",
    "Matrix",
    "MergeResult",
    "MethodChoice",
    "ModelEntry",
    "PatternWeights",
    "Plan",
    "PurgePlan",
    "Purged",
    "Pushed",
    "Recipe",
    "RecipeError",
    "Report",
    "Score",
    "Settings",
    "Step",
    "Suite",
    "__version__",
    "add",
    "certify",
    "diff",
    "dry_run",
    "evaluate",
    "history",
    "inspect",
    "load_recipe",
    "load_suite",
    "load_with_head",
    "merge",
    "plan",
    "purge_history",
    "push",
    "rebase",
    "reorder",
    "replace",
    "restore",
    "unmerge",
    "unmerge_checked",
    "verify",
]


def __dir__() -> list[str]:
    """The public names, also those that were not used yet."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    # no module of the package may be called like a public name: importing it would hide the name
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'hfmerge' has no attribute {name!r}")
