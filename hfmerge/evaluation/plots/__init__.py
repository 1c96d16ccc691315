"""Pictures of results, from their JSON alone; each is saved as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError
from hfmerge.evaluation.plots.inspection import draw_inspection
from hfmerge.evaluation.plots.learning import draw_learning
from hfmerge.evaluation.plots.results import draw_continual, draw_evaluation
from hfmerge.evaluation.plots.style import styled


Drawing = Callable[[Mapping[str, Any], Path], list[Path]]

DRAWN: Mapping[tuple[str, int], Drawing] = {
    ("inspection", 1): draw_inspection,
    ("evaluation", 1): draw_evaluation,
    ("continual", 1): draw_continual,
    ("learning", 1): draw_learning,
}
"""Kind and schema of a result -> what draws it."""


def draw_all(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw every result into a folder, which is made; returns the files written.

    Raises:
        HfMergeError: not a result that can be drawn, no matplotlib, or no room.
    """
    written: list[Path] = []
    with styled():
        for data in results:
            written += _drawing(data)(data, folder)
    return written


def _drawing(data: Any) -> Drawing:
    if isinstance(data, Mapping):
        # results of `evaluate` say no kind
        kind = data.get("kind", "evaluation")
        found = DRAWN.get((kind, data["schema"])) if isinstance(data.get("schema"), int) else None
        if found is not None:
            return found
    known = ", ".join(f"{name} (schema {schema})" for name, schema in DRAWN)
    raise HfMergeError(f"this is not a result that can be drawn; these are {known}.")
