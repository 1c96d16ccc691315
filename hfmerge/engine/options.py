"""How a run uses the machines it runs on: nothing here but `device` changes a byte of its result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hfmerge.errors import HfMergeError


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Consent:
    """What this run's caller allows strangers' repositories; nothing that is read from a repository ever says it.

    Attributes:
        trust_remote_code: run code from the repositories of models.
        allow_pickle: read pickled checkpoints.
    """

    trust_remote_code: bool = False
    allow_pickle: bool = False


NO_CONSENT = Consent()


@dataclass(frozen=True)
class RunOptions:
    """Of every verb that computes.

    Attributes:
        storage: whether the machines of a run share the output's disk: "shared", "local", or "auto" to find it out.
        resume: go on from where a killed run into the same folder ended. None: if it did the same work; True: it has
            to be there and to have done so; False: start anew.
        max_memory: bytes of memory that each process should stay below; fewer parameters are then computed at once.
            A parameter that needs more by itself is computed alone. None: as many as there are cores.
        notify: told in one line what is taken over from a killed run, and which bound cannot be kept.
        rows: folder where replay rows are kept and found again by model and by how they are made, for experiments that
            learn from the same rows many times; nothing deletes them there. None: they are made anew.
        device: where spectral methods compute and weights are learned: "cpu" or None, "auto", "cuda", "cuda:1" (see
            `device`). The last bits differ between devices, and the ledger says which it was.
        trust_remote_code, allow_pickle: see `Consent`. A merge needs them again when it is changed or replayed: what
            its ledger says of them is a record, not a permission. A recipe's own keys of these names count as well.
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
        """What the caller allows."""
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
