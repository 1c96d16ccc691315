"""Options for how a run uses its machines. Of these, only `device` can change the bytes of the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hfmerge.errors import HfMergeError


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Consent:
    """What the caller of this run allows the repositories of models. No file of a repository can give this consent.

    Attributes:
        trust_remote_code: run code from the repositories of models.
        allow_pickle: read pickled checkpoints.
    """

    trust_remote_code: bool = False
    allow_pickle: bool = False


NO_CONSENT = Consent()


@dataclass(frozen=True)
class RunOptions:
    """Options of every verb that computes.

    Attributes:
        storage: whether the machines of a run share the output's disk: "shared", "local", or "auto" to find it out.
        resume: continue a killed run into the same folder. None: continue if that run did the same work. True: fail if
            there is no killed run of the same work. False: start anew.
        max_memory: bytes of memory that each process should stay below. A lower bound means that fewer parameters are
            computed at once. A parameter that needs more by itself is computed alone. None: one parameter per core.
        notify: called with one line of text: what is taken over from a killed run, and which bound cannot be kept.
        rows: folder that keeps replay rows between runs, for experiments that learn from the same rows often. Rows
        are found by model and by how they are made. hfmerge deletes nothing there. None: rows are made anew.
        device: device that runs spectral methods and learns weights: "cpu" or None, "auto", "cuda", "cuda:1" (see
            `device`). The last bits differ between devices. The ledger records the device.
        trust_remote_code, allow_pickle: see `Consent`. Give them again when the merge is changed or replayed: the
            ledger's record of them is not a permission. The keys of these names in a recipe count as well.
    """

    storage: str = "auto"
    resume: bool | None = None
    max_memory: int | None = None
    notify: Callable[[str], object] | None = None
    rows: Path | None = None
    device: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def consent(self) -> Consent:
        """The consent that these options give."""
        return Consent(self.trust_remote_code, self.allow_pickle)


DEFAULT = RunOptions()


def parse_size(text: str) -> int:
    """Bytes of "800MB", "4 GiB", "512000000".

    Raises:
        HfMergeError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS:
        raise HfMergeError(f"{text!r} is not a size; write 800MB, 4GB or 4GiB.")
    return int(float(found[1]) * UNITS[found[2]])
