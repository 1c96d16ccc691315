"""Runs suites: data sets are loaded and tokenised once, each model is opened once, each score is computed once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.layout.cache import cached_answer
from hfmerge.engine.device import enough_memory, place_for
from hfmerge.engine.ranks import Ranks
from hfmerge.errors import HeadError, HfMergeError
from hfmerge.evaluation.batches import Runner
from hfmerge.evaluation.data import DataPin, limited, pin_data
from hfmerge.evaluation.models import Subject, open_subject
from hfmerge.evaluation.results import Matrix, Score, TaskInfo
from hfmerge.evaluation.suite import Suite, Task, load_suite
from hfmerge.evaluation.tasks import Tasks
from hfmerge.hub.progress_bar import progress_bar
from hfmerge.validation.wording import parameter


VERSION = 1
"""Version of the computation of scores. It is raised when a score would change for the same input."""
_DTYPES = ("float32", "bfloat16", "float16", "float64")
EXTRA = {"datasets": "datasets", "sklearn": "scikit-learn"}
"""Modules that evaluation needs and merging does not, and the packages they are in."""
_KEPT = 4096
"""Scores kept on this machine."""


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Attributes:
        limit: largest number of rows per task, a seeded sample; None: all rows.
        seed: seed of samples and of bootstrap intervals.
        batch_size: rows in a batch.
        device: see `place_for`; None: "auto".
        dtype: dtype of the weights; None: float32 on the CPU, the stored dtype on other devices.
        cache: use scores that were computed before, and remember new ones.
        skip_missing: leave a score out where a model has no head for a task, instead of raising.
    """

    limit: int | None = None
    seed: int = 0
    batch_size: int = 32
    device: str | None = None
    dtype: str | None = None
    cache: bool = True
    skip_missing: bool = False


class Evaluator:
    """The tasks of a suite, ready to be run on one model after another.

    Data (rows, tokens, features of class names) are kept between models. Weights of a model are not kept. Every
    process of a run must make the same calls.

    Args:
        suite: the suite; its data sets are loaded when first needed.
        settings: settings of all runs.
        heads: task -> model whose head is used, instead of the one that the suite names; "*" stands for all tasks.
        ranks: the processes that share the batches.
        progress: show a bar with the time left, on the first process.
    """

    def __init__(
        self,
        suite: Suite,
        settings: Settings | None = None,
        *,
        heads: Mapping[str, str] | None = None,
        ranks: Ranks | None = None,
        progress: bool = False,
    ):
        self.settings = settings or Settings()
        self.suite = replace(suite, tasks=tuple(limited(task, self.settings.limit) for task in suite.tasks))
        self.ranks = ranks or Ranks()
        self._progress = progress and self.ranks.main
        self._bar: Any = None
        _check_installed()
        self.device = place_for(self.settings.device or "auto")
        self.dtype = self.settings.dtype or ("float32" if self.device == "cpu" else None)
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise HfMergeError(f"dtype {self.dtype}: one of {', '.join(_DTYPES)} is needed.")
        self._heads = dict(heads or {})
        self._pins: dict[str, DataPin] = {}
        self._others: dict[str, Subject] = {}
        runner = Runner(self.settings.batch_size, self.device, self.ranks, self._tick)
        self._tasks = Tasks(self.suite, self.settings.seed, runner, self.pin, self.other, self._grow)
        unknown = [name for name in self._heads if name != "*" and name not in [t.name for t in suite.tasks]]
        if unknown:
            raise HfMergeError(f"heads: {suite.name} has no task {unknown[0]}.")

    def open(self, model: str | Path) -> Subject:
        """A model by reference; its weights are read when they are needed."""
        return open_subject(str(model), device=self.device, dtype=self.dtype)

    def score(
        self,
        model: str | Path | Subject,
        *,
        tasks: Sequence[str] | None = None,
        heads: Mapping[str, str] | None = None,
    ) -> dict[str, Score | None]:
        """Scores of one model.

        Args:
            model: a reference, or an opened or loaded one (see `models.open_subject`, `models.subject_in_memory`).
            tasks: names; None: all of the suite.
            heads: as for the evaluator; they replace the evaluator's.

        Returns:
            Task -> score, in the suite's order; None where the model has no head for it and `skip_missing` is set.

        Raises:
            HeadError: the model has no head for a task. HfMergeError: something else cannot be loaded or does not fit.
        """
        subject = model if isinstance(model, Subject) else self.open(model)
        chosen = self.suite.tasks if tasks is None else self.suite.select(tasks).tasks
        try:
            return {task.name: self._score(subject, task, self._head_of(task, heads), []) for task in chosen}
        finally:
            subject.forget()

    def matrix(self, models: Sequence[str | Path | Subject]) -> Matrix:
        """Scores of several models, as one matrix.

        Raises:
            HfMergeError: as `score`; or a model that has no score at all.
        """
        subjects = _distinct([m if isinstance(m, Subject) else self.open(m) for m in models])
        sizes = [
            self._tasks.size(task) for subject in subjects for task in self.suite.tasks if self._due(subject, task)
        ]
        notes: list[str] = []
        with self._counting(sum(sizes)):
            rows = [self._row(subject, notes) for subject in subjects]
        settings = {
            "limit": self.settings.limit, "seed": self.settings.seed, "batch_size": self.settings.batch_size,
            "dtype": self.dtype or "as stored", "device": self.device.partition(":")[0], "interval": 0.95,
        }  # fmt: skip
        infos = tuple(self._info(task) for task in self.suite.tasks)
        return Matrix(
            self.suite.name, self.suite.digest, tuple(s.info for s in subjects), infos, tuple(rows), settings,
            tuple(notes),
        )  # fmt: skip

    def _row(self, subject: Subject, notes: list[str]) -> tuple[Score | None, ...]:
        """All scores of one model."""
        if self._bar is not None:
            self._bar.set_description(subject.info.label)
        row = tuple(self._score(subject, t, self._head_of(t, None), notes) for t in self.suite.tasks)
        subject.forget()
        if not any(score is not None for score in row):
            raise HeadError(f"{subject.info.label}: has a head for no task of {self.suite.name}; {notes[-1]}")
        return row

    def pin(self, task: Task) -> DataPin:
        """The data set of a task, fixed once."""
        if task.name not in self._pins:
            if not task.dataset:
                self._pins[task.name] = DataPin(str(task.benchmark), None, "", None)
            else:
                self._pins[task.name] = self.ranks.on_main(lambda: pin_data(task, self.suite.folder))
        return self._pins[task.name]

    def other(self, ref: str) -> Subject:
        """A model whose head or text tower is used, opened once."""
        if ref not in self._others:
            self._others[ref] = self.open(ref)
        return self._others[ref]

    def _score(self, subject: Subject, task: Task, head: str | None, notes: list[str]) -> Score | None:
        """One score: remembered, or computed and remembered."""
        found = self._known(subject, task, head)
        if found is not None:
            return replace(found, cached=True)
        start = time.monotonic()
        try:
            with enough_memory(subject.info.label, self._advice()):
                score = self._tasks.score(subject, task, head)
        except HeadError as error:
            if not self.settings.skip_missing:
                raise
            notes.append(str(error))
            return None
        score = replace(score, seconds=round(time.monotonic() - start, 3))
        question = self._question(subject, task, head)
        if question is not None:
            self.ranks.on_main(lambda: cached_answer("evaluation", question, score.to_dict, most=_KEPT))
        return score

    def _advice(self) -> str:
        """What would need less memory."""
        smaller = "" if self.dtype in ("bfloat16", "float16") else f", or say {parameter('dtype', 'bfloat16')}"
        rows = f"{parameter('batch_size')} (now {self.settings.batch_size})"
        return f"lower {rows}{smaller}, or another {parameter('device')}"

    def _known(self, subject: Subject, task: Task, head: str | None) -> Score | None:
        question = self._question(subject, task, head)
        if question is None:
            return None
        found = self.ranks.on_main(lambda: cached_answer("evaluation", question, lambda: None))
        return None if found is None else Score.from_dict(found)

    def _question(self, subject: Subject, task: Task, head: str | None) -> list[Any] | None:
        """Everything a score depends on; None for what is not remembered."""
        if not self.settings.cache or not subject.info.digest or not task.dataset:
            return None
        digest = self.other(head).info.digest if head is not None and not subject.holds(head) else head
        kind = self.device.partition(":")[0]
        return [
            VERSION, subject.info.digest, digest, self.pin(task).digest, task.to_dict(), self.settings.seed,
            self.dtype, kind,
        ]  # fmt: skip

    def _head_of(self, task: Task, heads: Mapping[str, str] | None) -> str | None:
        """Whose head is asked for, if any: for this call, for this evaluator, in the suite."""
        for given in (heads or {}, self._heads):
            if (found := given.get(task.name, given.get("*"))) is not None:
                return found
        return task.head

    def _info(self, task: Task) -> TaskInfo:
        pin, head = self.pin(task), self._head_of(task, None)
        lent = self._others.get(head) if head is not None else None
        return TaskInfo(
            task.name, task.kind, task.metric, pin.name, task.config, task.split, pin.commit, pin.digest, head,
            task.limit is not None, None if lent is None else lent.info.commit,
        )  # fmt: skip

    def _due(self, subject: Subject, task: Task) -> bool:
        """Whether a score has to be computed; the same on all processes."""
        return self._known(subject, task, self._head_of(task, None)) is None

    @contextmanager
    def _counting(self, total: int) -> Iterator[None]:
        """A bar with the time left, where one is wanted and there is something to do."""
        if not self._progress or not total:
            yield
            return
        with progress_bar(total, "Evaluating", "row") as self._bar:
            yield
        self._bar = None

    def _tick(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def _grow(self, count: int) -> None:
        """A task has other pieces of work than rows."""
        if self._bar is not None:
            self._bar.total += count
            self._bar.refresh()


def evaluate_suite(
    models: Sequence[str | Path],
    suite: Suite | str | Path,
    *,
    tasks: Sequence[str] | None = None,
    heads: Mapping[str, str] | None = None,
    settings: Settings | None = None,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> Matrix:
    """`Evaluator.matrix` with a progress bar on the first process.

    Raises:
        HfMergeError: see `Evaluator`.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    if not models:
        raise HfMergeError("no model to evaluate; name at least one.")
    suite = suite.select(tasks) if tasks else suite
    return Evaluator(suite, settings, heads=heads, ranks=ranks, progress=progress).matrix(models)


def _check_installed() -> None:
    """Raise HfMergeError where the extra is not installed."""
    if missing := [package for module, package in EXTRA.items() if find_spec(module) is None]:
        raise HfMergeError(f"evaluation needs `pip install hfmerge[evaluate]` ({', '.join(missing)} is missing).")


def _distinct(subjects: Sequence[Subject]) -> list[Subject]:
    """Models with a label of their own each: where two share one, their commits or digests are added."""
    labels = [subject.info.label for subject in subjects]
    for subject in subjects:
        if labels.count(subject.info.label) > 1:
            info = subject.info
            subject.info = replace(info, label=f"{info.label}@{(info.commit or info.digest)[:8]}")
    found = [subject.info.label for subject in subjects]
    if again := [label for label in found if found.count(label) > 1]:
        raise HfMergeError(f"{again[0]}: given twice; name each model once.")
    return list(subjects)
