"""Pictures of learned weights: the loss and the weights over the steps of learning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfmerge.evaluation.plots.style import lines, save, short_names


def draw_learning(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """What a ledger entry records of learning, under `models` and `learned`; returns the files.

    A merge whose weights were not learned anew has no curve, and no picture.
    """
    curve = data["learned"]["curve"]
    if not curve:
        return []
    steps = [point[0] for point in curve]
    series = {"rows of the step": [point[1] for point in curve], "rows held out": [point[2] for point in curve]}
    known = {name: values for name, values in series.items() if any(value is not None for value in values)}
    figure, _ = lines(steps, known, title="Loss while learning", across="step", up="mean loss in nats")
    written = save(figure, folder, "learning_loss")
    names = short_names(data["models"])
    weights = {name: [point[3][i] for point in curve] for i, name in enumerate(names)}
    layers = len(data["learned"]["groups"])
    up = "weight" if layers < 2 else f"mean weight of {layers} layers"
    figure, _ = lines(steps, weights, title="Weights while learning", across="step", up=up)
    return written + save(figure, folder, "learning_weights")
