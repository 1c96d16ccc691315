"""The `learn` section of a recipe, every value checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hfmerge.errors import Problem, RecipeError
from hfmerge.recipe.keys import keys_of, read_key
from hfmerge.recipe.replay import ReplaySettings, read_replay
from hfmerge.validation.values import Section, show


Loss = Literal["distill", "labels", "mixed"]
Groups = Literal["parameter", "layer", "model"]

HELD_BYTES = 1 << 30
"""Bytes of changes that stay in memory between steps; more are read again for every step."""


@dataclass(frozen=True)
class Learning:
    """How the models' weights are learned before the merge is made; checked when it is built.

    Attributes:
        loss: what is minimised, as a mean over models: "distill", the Kullback-Leibler divergence of each model's own
            outputs from the merge's on replay rows that the model made; "labels", the cross-entropy of a few labelled
            rows; "mixed", the sum of both.
        suite: suite whose tasks give the labelled rows. A model learns from the task whose `head` is that model.
        rows: number of labelled rows of each task.
        split: split of the data sets that the labelled rows are taken from.
        replay: how replay rows are made.
        groups: "parameter", one weight for each model and parameter; "layer", for each model and layer; "model", for
            each model.
        start: where all weights start; None: at 1/sqrt(number of models), which keeps the norm that of one model, or
            for gram at 1, the weights that it has without learning.
        low, high: bounds of the weights.
        steps: largest number of steps of AdamW.
        rate: learning rate of AdamW.
        batch: rows of each model in a step.
        every: steps between two evaluations of the loss on the rows that are held out.
        patience: learning stops after this many evaluations without a better loss.
        ewc: weight `mu` of the penalty `mu / 2 * sum F (theta - theta_prev)^2` on leaving the merge that models are
            added to, with F its diagonal Fisher information on replay rows; 0: none.
        gamma: factor on the Fisher information of earlier steps when it is carried on.
        relearn: after a model is taken out, learn the weights of the others anew; otherwise they stay.
        precision: precision of the models while learning, "float32" or "bfloat16"; weights and gradients are float32.
        checkpointing: compute activations twice instead of keeping them, and ask one model after another instead of
            all together.
        seed: seed of all random numbers.

    Raises:
        RecipeError: all values that are not allowed.
    """

    loss: Loss = "distill"
    suite: str | None = None
    rows: int = field(default=16, metadata={"minimum": 1})
    split: str = "train"
    replay: ReplaySettings = ReplaySettings()
    groups: Groups = "layer"
    start: float | None = None
    low: float = 0.0
    high: float = 2.0
    steps: int = field(default=60, metadata={"minimum": 1})
    rate: float = field(default=0.02, metadata={"minimum": 1e-8})
    batch: int = field(default=16, metadata={"minimum": 1})
    every: int = field(default=5, metadata={"minimum": 1})
    patience: int = field(default=4, metadata={"minimum": 1})
    ewc: float = field(default=0.0, metadata={"minimum": 0.0})
    gamma: float = field(default=1.0, metadata={"minimum": 0.0, "maximum": 1.0})
    relearn: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    seed: int = field(default=0, metadata={"minimum": 0, "maximum": 2**63 - 1})

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        _read(Section(self.to_dict(), "learn", problems))
        if problems:
            raise RecipeError(problems, "learn")

    @property
    def replays(self) -> bool:
        """Whether replay rows are needed."""
        return self.loss != "labels"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "replay": self.replay.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Learning:
        """Inverse of `to_dict`."""
        return cls(**{**data, "replay": ReplaySettings(**data["replay"])})


def read_learning(value: Any, section: Section, method: str, learnable: Sequence[str]) -> Learning | None:
    """The `learn` key of a recipe; None if it is absent or faulty. Faults are added to the section's problems.

    Args:
        method: the recipe's.
        learnable: the methods whose weights can be learned.
    """
    if value is None:
        return None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        section.report("learn", f"must be a mapping, not {show(value)}; write `learn: {{}}` for its defaults")
        return None
    before = len(section.problems)
    if method not in learnable:
        section.report("learn", f"is for {', '.join(learnable)}, not {show(method)}")
    inner = Section(value, section.at("learn"), section.problems)
    inner.refuse_unknown([key.name for key in keys_of(Learning)], "key")
    found = _read(inner)
    return Learning(**found) if len(section.problems) == before else None


def restored_learning(value: Any) -> Learning:
    """The `learn` of a ledger. Raises ValueError."""
    try:
        return Learning.from_dict(value)
    except (RecipeError, TypeError, KeyError, AttributeError) as error:
        text = error.problems[0].text if isinstance(error, RecipeError) else str(error)
        raise ValueError(f"cannot be read: {text}") from error


def _read(section: Section) -> dict[str, Any]:
    """All values, those missing at their default; what is wrong goes to the section's problems."""
    found: dict[str, Any] = {
        key.name: _replay(section) if key.name == "replay" else read_key(section, key) for key in keys_of(Learning)
    }
    if found["low"] >= found["high"]:
        section.report("low", "must be below high")
    if found["start"] is not None and not found["low"] <= found["start"] <= found["high"]:
        section.report("start", "must lie between low and high")
    if found["loss"] != "distill" and not found["suite"]:
        section.report("suite", f"is missing; loss {found['loss']} needs the suite whose tasks have labelled rows")
    if found["loss"] == "distill" and found["suite"]:
        section.report("suite", "has no effect on loss distill; remove it, or write `loss: mixed`")
    return found


def _replay(section: Section) -> ReplaySettings:
    value = section.data.get("replay", {})
    if not isinstance(value, Mapping):
        section.report("replay", f"must be a mapping, not {show(value)}")
        return ReplaySettings()
    inner = Section(value, section.at("replay"), section.problems)
    before = len(section.problems)
    try:
        return read_replay(inner)
    except RecipeError:
        # the same problems as the section got
        assert len(section.problems) > before
        return ReplaySettings()
