"""The `replay` section of `learn` (how many rows, which generator, which seed), every value checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hfmerge.errors import HfMergeError, Problem, RecipeError
from hfmerge.recipe.keys import keys_of, read_keys
from hfmerge.validation.values import Section


GENERATORS: Mapping[str, Mapping[str, int]] = {
    "text-classification": {"contrast": 24, "unigram": 0, "masked": 24},
    "image-classification": {"contrast": 80, "statistics": 80, "noise": 0},
    "causal": {"sampled": 0, "unigram": 0},
    "masked": {"masked": 24, "unigram": 0},
}
"""Kind of model -> its generators -> default number of passes over the rows.

"auto" takes the first generator whose needs the model meets.
"""
_ALL = ("auto", *dict.fromkeys(name for names in GENERATORS.values() for name in names))


@dataclass(frozen=True)
class ReplaySettings:
    """How replay rows are made; checked when it is built.

    Attributes:
        rows: number of rows, held-out rows included.
        generator: one of `GENERATORS`, or "auto" for the first one whose needs the model meets.
        length: largest number of tokens in a row, special tokens included. Images have the model's own size.
        seed: seed of all random numbers.
        steps: number of passes over the rows, for generators that search or iterate; None: see `GENERATORS`.
        confidence: `contrast` stops changing a row when the probability of its class reaches this value.
        temperature: temperature of sampled tokens.
        top: number of tokens whose log-probability is kept at each place of a language model's rows.
        held_out: share of the rows that is kept for early stopping; at least one row.
        batch_size: rows in a batch.

    Raises:
        RecipeError: all values that are not allowed.
    """

    rows: int = field(default=256, metadata={"minimum": 2})
    generator: str = field(default="auto", metadata={"choices": _ALL})
    length: int = field(default=32, metadata={"minimum": 2})
    seed: int = field(default=0, metadata={"minimum": 0, "maximum": 2**63 - 1})
    steps: int | None = field(default=None, metadata={"minimum": 0})
    confidence: float = field(default=0.9, metadata={"minimum": 0.0, "maximum": 1.0})
    temperature: float = field(default=1.0, metadata={"minimum": 0.01})
    top: int = field(default=64, metadata={"minimum": 1})
    held_out: float = field(default=0.125, metadata={"minimum": 0.0, "maximum": 0.5})
    batch_size: int = field(default=32, metadata={"minimum": 1})

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        read_keys(Section(self.to_dict(), "replay", problems), keys_of(ReplaySettings))
        if problems:
            raise RecipeError(problems, "replay")

    @property
    def kept_back(self) -> int:
        """Rows that are held out."""
        return max(1, round(self.rows * self.held_out))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)

    def chosen(self, kind: str) -> tuple[str, int]:
        """Generator and passes for a kind of model; "auto" is not resolved here where the model has a say.

        Raises:
            HfMergeError: this kind of model has no such generator, or there is no such kind.
        """
        known = GENERATORS.get(kind)
        if known is None:
            raise HfMergeError(f"replay: no kind {kind}; one of {', '.join(GENERATORS)}.")
        if self.generator != "auto" and self.generator not in known:
            raise HfMergeError(f"replay: {kind} has no generator {self.generator}; one of auto, {', '.join(known)}.")
        name = next(iter(known)) if self.generator == "auto" else self.generator
        return name, known[name] if self.steps is None else self.steps


def read_replay(section: Section) -> ReplaySettings:
    """The replay section of a recipe; what is wrong goes to the section's problems, and its default is taken."""
    keys = keys_of(ReplaySettings)
    section.refuse_unknown([key.name for key in keys], "key")
    return ReplaySettings(**read_keys(section, keys))
