"""Every error hfmerge raises on purpose, as one tree.

HfMergeError                  the CLI prints it as one line and exits with 1
|- RecipeError                what was asked is wrong; carries *all* problems of a job at once
|- SourceError                a model cannot be named, found, reached or read
|  |- NotFoundError           no such repository, revision, file or folder (or no right to see it)
|  |- AccessError             private, gated, or a wrong token
|  |- OfflineError            not in the cache, and the Hub may not or cannot be reached
|  |- CorruptFileError        truncated, a Git-LFS pointer, not what its digest says
|  `- UnsupportedError        quantised, pickled, or of a kind hfmerge does not merge
|- HeadError                  a model has no head for a task, or none whose labels are the task's
|- ShapeError                 tensors that should match do not
|- NonFiniteError             NaN or Inf where numbers are needed
|- GridOverflowError          a sum too large to be exact
|- LedgerError                a merge history that is broken, missing or from another merge
|  |- NoLedgerError           there is no merge history: never a merge, or its history was deleted
|  `- VerificationError       the ledger does not describe the files beside it
|- CertificateError           a certificate or a key that cannot be used, or a removal that did not take place
|- OutputError                the result cannot be written: folder in use, disk full
|- PushError                  the Hub refused the result, or somebody else pushed first
`- LostProcessError           another process of the run is gone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class HfMergeError(Exception):
    """Base of all errors raised on purpose; its text says what, where and what to do, in one line."""

    @property
    def lines(self) -> list[str]:
        """The text, line by line, so that no name in it can pass for a line of its own."""
        return [str(self)]


@dataclass(frozen=True)
class Problem:
    """One fault of a recipe: the path to the key (`models[2].weight`) and what is wrong, with a remedy."""

    path: str
    text: str


class RecipeError(HfMergeError):
    """All faults of a job: of its recipe, its sources (seen from their headers) and its place, before any download.

    Attributes:
        draft: the recipe as far as it could be read, for checks that are made all the same; None: it cannot be read.
    """

    def __init__(self, problems: Sequence[Problem], origin: str = "recipe", draft: Any = None):
        self.problems = tuple(problems)
        self.origin = origin
        self.draft = draft
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[Problem, ...], str]]:
        return type(self), (self.problems, self.origin)

    @property
    def lines(self) -> list[str]:
        """All faults, one a line; a single one in one line."""
        count = len(self.problems)
        head = f"{self.origin}: {count} problem{'s' if count != 1 else ''}, nothing downloaded"
        if count == 1:
            return [f"{head}: {self.problems[0].path}: {self.problems[0].text}"]
        width = min(28, max(len(p.path) for p in self.problems))
        return [head, *(f"  {p.path:<{width}}  {p.text}" for p in self.problems)]


class SourceError(HfMergeError):
    """A model that cannot be named, found, reached or read."""


class NotFoundError(SourceError):
    """No such repository, revision, file or folder; or no right to know of it."""


class AccessError(SourceError):
    """A private or gated repository, or a token the Hub does not accept."""


class OfflineError(SourceError):
    """Not in the local cache while the Hub may not, or cannot, be reached."""


class CorruptFileError(SourceError):
    """A file that is truncated, a Git-LFS pointer, or differs from its recorded digest."""


class UnsupportedError(SourceError):
    """A checkpoint of a kind hfmerge refuses: quantised, pickled, without weights."""


class HeadError(HfMergeError):
    """A model without a head for a task, or without one that has the task's labels."""


class ShapeError(HfMergeError):
    """Tensors that must have equal shapes do not."""


class NonFiniteError(HfMergeError):
    """NaN or Inf in a source tensor or in a result."""


class GridOverflowError(HfMergeError):
    """A sum of an additive fold leaves the range in which it is exact."""


class LedgerError(HfMergeError):
    """A merge history that is missing, broken, or belongs to another merge."""


class NoLedgerError(LedgerError):
    """There is no merge history at all: no merge of hfmerge, or one whose history was deleted."""


class VerificationError(LedgerError):
    """The ledger and the files beside it disagree."""


class CertificateError(HfMergeError):
    """A certificate or key that cannot be used, or a removal that cannot be certified."""


class OutputError(HfMergeError):
    """The result cannot be written: folder in use or not empty, disk full."""


class PushError(HfMergeError):
    """The Hub refused the result, or the branch moved since it was read."""


class LostProcessError(HfMergeError):
    """Another process of the run is gone.

    Attributes:
        reported: the first process to know has told the user, so that the others need not repeat it.
    """

    def __init__(self, text: str, *, reported: bool = False):
        self.reported = reported
        super().__init__(text)
