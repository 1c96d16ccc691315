"""What the ledger keeps on learned weights: how they were found, and the digests of the rows they were found from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hfmerge.engine.plan import state_file


@dataclass(frozen=True)
class LearnedWeights:
    """The part `learned` of an entry's byproducts (`schema.LEARNED`).

    Attributes:
        how: one line on how the weights were found.
        groups: names of the groups of parameters that have a weight of their own.
        steps: optimiser steps taken.
        curve: for each look at the loss: step, loss, loss on rows held out, mean weight of each model.
        replay: for each model in order the generator of its replay rows and their SHA-256; None where it has none.
        fisher: SHA-256 of carried Fisher information, or None.
        device: name of the device that learned; None in entries of older versions, and means the CPU.
    """

    how: str
    groups: tuple[str, ...]
    steps: int
    curve: tuple[tuple[int, float | None, float | None, list[float]], ...]
    replay: tuple[Mapping[str, Any] | None, ...]
    fisher: str | None
    device: str | None = None

    @property
    def files(self) -> dict[str, str]:
        """Path in the repository -> SHA-256 of the files that learning left."""
        digests = [*(row["sha256"] for row in self.replay if row is not None), self.fisher]
        return {state_file(digest): digest for digest in digests if digest is not None}

    def without_files(self) -> LearnedWeights:
        """The same, after the files that learning left were deleted."""
        return replace(self, replay=(None,) * len(self.replay), fisher=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "how": self.how,
            "groups": list(self.groups),
            "steps": self.steps,
            "curve": [list(look) for look in self.curve],
            "replay": [None if row is None else dict(row) for row in self.replay],
            "fisher": self.fisher,
            **({} if self.device is None else {"device": self.device}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LearnedWeights:
        """Read the JSON form, checked by the schema before."""
        lists = {key: tuple(data[key]) for key in ("groups", "replay")}
        return cls(**{**data, **lists, "curve": tuple(tuple(look) for look in data["curve"])})
