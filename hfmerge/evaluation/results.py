"""Results as data: a score with its interval, and the matrix of models x tasks, with JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError
from hfmerge.validation.quoting import Markdown, markdown
from hfmerge.validation.strict_json import read_json_file


_SCHEMA = 1
"""Version of the JSON form; raised when a reader of the old form would misunderstand the new one."""
LOWER_IS_BETTER = ("perplexity",)


@dataclass(frozen=True)
class Score:
    """One number of one model on one task.

    Attributes:
        value: value of the metric. Accuracy and similar metrics are in 0..1, not in per cent.
        n: number of rows (for perplexity: pieces of text) that were scored.
        low, high: 95 % confidence interval; nan if there is none.
        metric: name of the metric.
        interval: how the interval was made: "wilson", "bootstrap", "reported" (by a harness) or "none".
        seconds: time of the computation in seconds; ignored by `==`.
        cached: the score was taken from an earlier run; ignored by `==`.
    """

    value: float
    n: int
    low: float
    high: float
    metric: str
    interval: str
    seconds: float = field(default=0.0, compare=False)
    cached: bool = field(default=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; nan becomes null."""
        return {key: _null(value) for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """Back from `to_dict`."""
        numbers = {key: math.nan if data[key] is None else float(data[key]) for key in ("value", "low", "high")}
        return cls(**{**data, **numbers})


@dataclass(frozen=True)
class ModelInfo:
    """The model of a row.

    Attributes:
        label: name of the model in tables: `org/name`, or a folder's name.
        kind: "full", "adapter" or "merge".
        commit: 40 hex digits on the Hub, None for a folder.
        digest: SHA-256 over the digests of its files.
    """

    label: str
    kind: str
    commit: str | None
    digest: str


@dataclass(frozen=True)
class TaskInfo:
    """The task of a column, and its data.

    Attributes:
        name, kind, metric, config, split: as in the suite.
        dataset: repository ID, name of a file or folder, or of a harness's task.
        commit: of the data set on the Hub; None for a file.
        digest: identifies the rows: the commit, or SHA-256 of the files.
        head: model whose head was used; None: each model's own head.
        sampled: a limit was set, so the score may be that of a part of the split.
        head_commit: commit of `head` on the Hub, if the head is that of another model than the scored one.
    """

    name: str
    kind: str
    metric: str
    dataset: str
    config: str | None
    split: str
    commit: str | None
    digest: str
    head: str | None = None
    sampled: bool = False
    head_commit: str | None = None


@dataclass(frozen=True)
class Matrix:
    """Models x tasks.

    Attributes:
        suite: name of the suite.
        suite_digest: SHA-256 of the suite's tasks, see `Suite.digest`.
        models: rows.
        tasks: columns.
        scores: one row per model, one entry per task; None if the model has no head for the task.
        settings: limit, seed, batch size and the other settings of the run.
        notes: reasons for empty entries, and other remarks.
    """

    suite: str
    suite_digest: str
    models: tuple[ModelInfo, ...]
    tasks: tuple[TaskInfo, ...]
    scores: tuple[tuple[Score | None, ...], ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def score(self, model: str, task: str) -> Score | None:
        """The score of a model, by label, on a task, by name.

        Raises:
            HfMergeError: not in the matrix.
        """
        rows, columns = [m.label for m in self.models], [t.name for t in self.tasks]
        if model not in rows or task not in columns:
            raise HfMergeError(f"{model} on {task}: not in these results of {self.suite}.")
        return self.scores[rows.index(model)][columns.index(task)]

    def mean(self, model: str) -> float | None:
        """Mean of a model's scores; None where one is missing, or where lower is better for some task."""
        row = [self.score(model, task.name) for task in self.tasks]
        if any(task.metric in LOWER_IS_BETTER for task in self.tasks):
            return None
        return sum(s.value for s in row if s is not None) / len(row) if row and None not in row else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the schema's version."""
        return {
            "schema": _SCHEMA,
            "suite": {"name": self.suite, "digest": self.suite_digest},
            "settings": dict(self.settings),
            "models": [vars(model) for model in self.models],
            "tasks": [vars(task) for task in self.tasks],
            "scores": [[None if s is None else s.to_dict() for s in row] for row in self.scores],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Matrix:
        """Back from `to_dict`.

        Raises:
            HfMergeError: another version of the schema.
        """
        if data.get("schema") != _SCHEMA:
            raise HfMergeError(f"results of schema {data.get('schema')}; this hfmerge reads schema {_SCHEMA}.")
        return cls(
            data["suite"]["name"],
            data["suite"]["digest"],
            tuple(ModelInfo(**model) for model in data["models"]),
            tuple(TaskInfo(**task) for task in data["tasks"]),
            tuple(tuple(None if s is None else Score.from_dict(s) for s in row) for row in data["scores"]),
            data["settings"],
            tuple(data["notes"]),
        )

    def to_json(self) -> str:
        """Text of a results file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One line a score, for other programs."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("model", "commit", "task", "dataset", "config", "split", "data_commit", *_SCORE_COLUMNS))
        for model, row in zip(self.models, self.scores, strict=True):
            for task, found in zip(self.tasks, row, strict=True):
                place = (task.name, task.dataset, task.config or "", task.split, task.commit or "")
                values = ["" if found is None else _null(getattr(found, name)) for name in _SCORE_COLUMNS]
                writer.writerow((model.label, model.commit or "", *place, *values))
        return out.getvalue()

    def to_markdown(self, *, by_task: bool = False, intervals: bool = True) -> str:
        """A table: one row a model, or one row a task.

        Args:
            by_task: tasks as rows, for many tasks and few models.
            intervals: show 95 % confidence intervals.
        """
        cells: list[list[str]] = [[cell(s, intervals=intervals) for s in row] for row in self.scores]
        if len(self.tasks) > 1:
            means = [self.mean(model.label) for model in self.models]
            cells = [[*row, "-" if mean is None else f"{mean:.3f}"] for row, mean in zip(cells, means, strict=True)]
        columns = [f"{task.name} ({task.metric})" if self.mixed else task.name for task in self.tasks]
        if len(self.tasks) > 1:
            columns.append(Markdown("**mean**"))
        rows = [model.label for model in self.models]
        if by_task:
            return markdown_table("task", rows, columns, [list(column) for column in zip(*cells, strict=True)])
        return markdown_table("model", columns, rows, cells)

    @property
    def mixed(self) -> bool:
        """Whether the tasks have different metrics."""
        return len({task.metric for task in self.tasks}) > 1


_SCORE_COLUMNS = ("metric", "value", "low", "high", "n", "interval")


def save_results(matrix: Matrix, stem: Path) -> list[Path]:
    """Write `stem`.json, .md and .csv; returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    texts = {"json": matrix.to_json(), "md": matrix.to_markdown(), "csv": matrix.to_csv()}
    paths = []
    for suffix, text in texts.items():
        path = stem.with_name(f"{stem.name}.{suffix}")
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def load_results(path: Path) -> Matrix:
    """Read a results file that `Matrix.to_json` wrote.

    Raises:
        HfMergeError: unreadable, or of another schema.
    """
    try:
        return Matrix.from_dict(read_json_file(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HfMergeError(f"{path}: not a results file of hfmerge ({type(error).__name__}: {error}).") from error


def cell(score: Score | None, *, intervals: bool) -> Markdown:
    """A score as tables show it: three digits, with its interval."""
    if score is None:
        return Markdown("-")
    digits = 2 if score.metric in LOWER_IS_BETTER else 3
    shown = f"{score.value:.{digits}f}"
    if not intervals or math.isnan(score.low):
        return Markdown(shown)
    return Markdown(f"{shown} [{score.low:.{digits}f}, {score.high:.{digits}f}]")


def markdown_table(corner: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; everything but `Markdown` is quoted."""
    lines = [f"| {corner} | {' | '.join(map(markdown, columns))} |", f"|---|{'---|' * len(columns)}"]
    lines += [
        f"| {markdown(name)} | {' | '.join(map(markdown, row))} |" for name, row in zip(rows, cells, strict=True)
    ]
    return "\n".join(lines) + "\n"


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Matrix", "ModelInfo", "Score", "TaskInfo", "cell", "load_results", "markdown_table", "save_results"]
