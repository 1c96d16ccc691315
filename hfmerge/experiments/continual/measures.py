"""Measures of a step of a continual experiment beside scores: identity, distance of weights, peak memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.digests import digests, folder_digest
from hfmerge.checkpoint.model import Model
from hfmerge.evaluation.results import Score
from hfmerge.experiments.continual import metrics


def model_identity(source: Model) -> str:
    """What a model is, wherever it lies: commit on the Hub, or digest of its files; an adapter with its base."""
    own = source.snapshot.commit or folder_digest(digests(source))
    beneath = "" if source.beneath is None else f"{model_identity(source.beneath)}+"
    return f"{beneath}{source.kind}:{own}"


class PeakMemory:
    """The most memory that this process holds at a time from now on, in bytes."""

    def __init__(self) -> None:
        try:
            # Linux forgets the peak so far
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._known = True
        except OSError:
            self._known = False

    def read(self) -> int | None:
        """Bytes, None where nobody tells; what the libraries take is in it."""
        if not self._known:
            return None
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def values(scores: Mapping[int, Score]) -> dict[int, float]:
    """Scores as numbers."""
    return {i: score.value for i, score in scores.items()}


def summed_up(
    order: Sequence[int], steps: Sequence[Mapping[str, Any]], base: Mapping[int, float], alone: Mapping[int, float]
) -> dict[str, Any]:
    """One order's steps with their running numbers, and the numbers of the whole.

    Args:
        order: places of the models in the recipe, in order of arrival.
        steps: what each arrival was measured to be.
        base, alone: scores on every task, by the model's place in the recipe.
    """
    places = {model: t for t, model in enumerate(order)}
    rows = [{places[int(i)]: float(score["value"]) for i, score in step["scores"].items()} for step in steps]
    bases, alones = ({places[i]: value for i, value in given.items()} for given in (base, alone))
    peaks = [step["peak_bytes"] for step in steps if step["peak_bytes"] is not None]
    running = [
        {
            "model": order[t],
            "accuracy": metrics.accuracy(rows, t),
            **step,
            "drift": step["norm"] / step["mean_norm"] if step["mean_norm"] else None,
        }
        for t, step in enumerate(steps)
    ]
    last = running[-1]
    return {
        "steps": running,
        "metrics": {
            "accuracy": last["accuracy"],
            "normalised_accuracy": metrics.normalised_accuracy(rows, alones),
            "backward_transfer": metrics.backward_transfer(rows),
            "backward_transfer_over_all": metrics.backward_transfer(rows, over_all=True),
            "forgetting": metrics.forgetting(rows),
            "forward_transfer": metrics.forward_transfer(rows, bases),
            "learning_gap": metrics.learning_gap(rows, alones),
            "norm": last["norm"],
            "drift": last["drift"],
            "seconds": math.fsum(step["seconds"] for step in steps),
            "peak_bytes": max(peaks) if peaks else None,
        },
    }
