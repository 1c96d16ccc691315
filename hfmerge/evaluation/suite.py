"""Suites of tasks for evaluation, read strictly from YAML. All problems of a suite are raised together.

A suite is a list of tasks. A task names a data set pinned to a commit, the columns to use, a metric, and the head to
use. Checks that need the data or the models (do columns exist, do labels agree) are made when the task is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError, Problem, RecipeError
from hfmerge.evaluation.metrics import METRICS
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.validation.strict_yaml import read_yaml
from hfmerge.validation.values import Section, flag, one_of, show, suggestion, text, texts, whole


@dataclass(frozen=True)
class TaskKind:
    """A kind of task: what the Hub calls it, its default metric, those it may have, and its keys."""

    hub: str
    metric: str
    metrics: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_CLASSES = ("accuracy", "f1", "macro_f1", "matthews")
_DATA = ("config", "split", "limit", "stream")
KINDS: Mapping[str, TaskKind] = {
    "text-classification": TaskKind(
        "text-classification", "accuracy", (*_CLASSES, "pearson", "spearman"), ("dataset", "text", "label"),
        (*_DATA, "labels", "by_index", "head", "max_length"),
    ),
    "image-classification": TaskKind(
        "image-classification", "accuracy", _CLASSES, ("dataset", "image", "label"),
        (*_DATA, "labels", "by_index", "head"),
    ),
    "zero-shot-image-classification": TaskKind(
        "zero-shot-image-classification", "accuracy", _CLASSES, ("dataset", "image", "label"),
        (*_DATA, "classes", "templates", "head"),
    ),
    "perplexity": TaskKind(
        "text-generation", "perplexity", ("perplexity",), ("dataset", "text"), (*_DATA, "max_length", "join")
    ),
    "multiple-choice": TaskKind(
        "multiple-choice", "accuracy", ("accuracy", "accuracy_norm"), ("dataset", "prompt", "choices", "label"),
        (*_DATA, "max_length"),
    ),
    "lm-eval": TaskKind("text-generation", "", (), ("benchmark", "metric"), ("shots", "limit")),
    "mteb": TaskKind("sentence-similarity", "main_score", ("main_score",), ("benchmark",), ("split",)),
}  # fmt: skip
"""By the name that a suite writes under `kind`."""


@dataclass(frozen=True)
class Task:
    """One task of a suite; which fields count depends on its kind (see `KINDS`).

    Attributes:
        name: name of the task, unique in its suite.
        kind: one of `KINDS`.
        metric: one of `metrics.METRICS`, or the harness's own name for kind `lm-eval`.
        dataset: `org/name[@commit]`, or a file or folder, relative to the suite's file, that begins with `.` or `/`.
        config, split: configuration and split of the data set.
        text: one column, or two for a pair.
        image: column of images.
        label: column of the answers.
        labels: value in the data set -> label name of the head, if the data set has no label names or other names.
        by_index: the data set's label numbers are the head's rows; label names are not compared.
        head: model whose classification head (or text tower) is used; None: the model's own head, or the one that
            fits.
        max_length: largest number of tokens; longer rows are cut. None: the model's own limit.
        limit: number of rows of a seeded sample; None: all rows.
        stream: read the rows as they come instead of downloading the data set; needs a limit.
        classes: class names for zero-shot prompts, in label order; None: those of the data set.
        templates: prompts with `{}` for the class name.
        prompt: text with `{column}` for multiple choice.
        choices: a column that holds the choices (`column.key` for one part of it), or one column for each.
        join: text between rows that are scored as one; None: every row by itself.
        benchmark: name of a task of lm-evaluation-harness or of MTEB.
        shots: examples in the prompt, for lm-eval.
    """

    name: str
    kind: str
    metric: str
    dataset: str = ""
    config: str | None = None
    split: str = "test"
    text: tuple[str, ...] = ()
    image: str | None = None
    label: str | None = None
    labels: Mapping[str, str] | None = None
    by_index: bool = False
    head: str | None = None
    max_length: int | None = None
    limit: int | None = None
    stream: bool = False
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)
    prompt: str | None = None
    choices: tuple[str, ...] = ()
    join: str | None = None
    benchmark: str | None = None
    shots: int = 0

    @property
    def classifies(self) -> bool:
        """Whether `head` is a classification head, which belongs to one fine-tune. Text towers serve all."""
        return self.kind in ("text-classification", "image-classification")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the keys at their default."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                result[field.name] = list(value) if isinstance(value, tuple) else value
        return result


@dataclass(frozen=True)
class Suite:
    """A checked suite.

    Attributes:
        name: as the file says.
        tasks: in order.
        description: one line.
        folder: where paths of data sets start.
    """

    name: str
    tasks: tuple[Task, ...]
    description: str = ""
    folder: Path = dataclasses.field(default=Path(), compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the suite's tasks, without paths of the machine."""
        return sha256_bytes(canonical_json([task.to_dict() for task in self.tasks]))

    def select(self, names: Sequence[str]) -> Suite:
        """The suite with some of its tasks only, in its own order.

        Raises:
            HfMergeError: no such task.
        """
        known = [task.name for task in self.tasks]
        for name in names:
            if name not in known:
                remedy = suggestion(name, known) or f"; one of {', '.join(known)}"
                raise HfMergeError(f"{self.name}: has no task {show(name)}{remedy}")
        return dataclasses.replace(self, tasks=tuple(task for task in self.tasks if task.name in names))


def ready_suites() -> dict[str, Path]:
    """The suites that come with hfmerge, by name: those installed with the package, or those of the checkout."""
    package = Path(__file__).resolve().parent
    folders = (package / "suites", package.parents[1] / "evaluation" / "suites")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def extras(suite: Suite) -> list[str]:
    """The extras of hfmerge that a suite needs, as pyproject names them."""
    found = {task.kind if task.kind in ("lm-eval", "mteb") else "evaluate" for task in suite.tasks}
    return sorted(found)


def load_suite(suite: str | Path) -> Suite:
    """Read a suite from a YAML file, or a ready one by its name.

    Raises:
        RecipeError: all problems; of YAML syntax only the first, with line and column.
    """
    path = Path(suite)
    ready = ready_suites()
    if not path.is_file() and str(suite) in ready:
        path = ready[str(suite)]
    elif not path.is_file() and path.suffix not in (".yaml", ".yml"):
        remedy = suggestion(str(suite), ready) or f"; ready suites: {', '.join(ready)}"
        raise RecipeError([Problem("suite", f"neither a file nor a ready suite{remedy}")], str(suite))
    data, problems = read_yaml(path)
    folder = path.resolve().parent
    known: tuple[Task, ...] = ()
    if isinstance(data, Mapping) and isinstance(data.get("extends"), str):
        other = folder / data["extends"]
        if other.resolve() == path.resolve() or not other.is_file():
            what = "is this suite itself" if other.is_file() else "is not a file beside this suite"
            raise RecipeError([*problems, Problem("extends", f"{show(data['extends'])} {what}")], str(suite))
        known = load_suite(other).tasks
    return parse_suite(data, str(suite), folder=folder, problems=problems, known=known)


def parse_suite(
    data: Any,
    origin: str,
    *,
    folder: Path | None = None,
    problems: Sequence[Problem] = (),
    known: Sequence[Task] = (),
) -> Suite:
    """Check a suite given as plain data.

    Args:
        data: as YAML gives it.
        origin: what error messages call it.
        folder: where paths of data sets start.
        problems: found by the reader, raised with the others.
        known: tasks of the suite that this one extends, which it takes over by name.

    Raises:
        RecipeError: all problems, each with its dotted path.
    """
    found = list(problems)
    if not isinstance(data, Mapping):
        found.append(Problem("suite", "is empty" if data is None else f"must be a mapping, not {show(data)}"))
        raise RecipeError(found, origin)
    top = Section(data, "", found)
    top.refuse_unknown(("name", "description", "extends", "tasks"), "key")
    name = top.read("name", text, "", required=True)
    entries = data.get("tasks")
    tasks: list[Task] = []
    if not isinstance(entries, list) or not entries:
        top.report("tasks", "must be a list of tasks, at least one")
    else:
        tasks = [_task(item, i, known, found) for i, item in enumerate(entries)]
        names = [task.name for task in tasks]
        for i, task in enumerate(names):
            if task and names.index(task) != i:
                top.report(f"tasks[{i}].name", f"{show(task)} is tasks[{names.index(task)}] again; rename one")
    description = top.read("description", text, "")
    if found:
        raise RecipeError(found, origin)
    return Suite(name, tuple(tasks), description, folder or Path())


def _task(item: Any, index: int, known: Sequence[Task], problems: list[Problem]) -> Task:
    """One task; what is returned is of use only if no problem was added."""
    path = f"tasks[{index}]"
    if isinstance(item, str):
        for task in known:
            if task.name == item:
                return task
        remedy = suggestion(item, [task.name for task in known]) or "; `extends` names the suite it is in"
        problems.append(Problem(path, f"{show(item)} is not a task{remedy}"))
        return Task(item, "", "")
    if not isinstance(item, Mapping):
        problems.append(Problem(path, f"must be a mapping, not {show(item)}"))
        return Task("", "", "")
    section = Section(item, path, problems)
    name = section.read("name", text, "", required=True)
    kind = section.read("kind", one_of(tuple(KINDS)), "", required=True)
    if not kind:
        return Task(name, "", "")
    rules = KINDS[kind]
    section.refuse_unknown(("name", "kind", "metric", *rules.required, *rules.optional), f"key of {kind}")
    values: dict[str, Any] = {}
    for key in (*rules.required, *rules.optional):
        if key == "metric":
            continue
        value = section.read(key, READERS[key], None, required=key in rules.required)
        if value is not None:
            values[key] = value
    metric = section.read(
        "metric", one_of(rules.metrics) if rules.metrics else text, rules.metric, required="metric" in rules.required
    )
    if values.get("stream") and "limit" not in values:
        section.report("stream", "needs a limit: how many rows are read")
    if values.get("labels") and values.get("by_index"):
        section.report("by_index", "says what labels says already; keep one")
    if metric in METRICS and METRICS[metric].regression and {"labels", "by_index"} & values.keys():
        section.report("metric", f"{metric} compares numbers, which have no label names; remove labels and by_index")
    return Task(name, kind, metric, **values)


def _columns(value: Any) -> tuple[str, ...]:
    return (text(value),) if isinstance(value, str) else texts(value)


def _text_columns(value: Any) -> tuple[str, ...]:
    columns = _columns(value)
    if len(columns) not in (1, 2):
        raise ValueError(f"must be one column, or two for a pair, not {len(columns)}")
    return columns


def _several(value: Any) -> tuple[str, ...]:
    if not (result := texts(value)):
        raise ValueError("must not be empty")
    return result


def _templates(value: Any) -> tuple[str, ...]:
    result = _several(value)
    if bad := [template for template in result if template.count("{}") != 1]:
        raise ValueError(f"{show(bad[0])} must have `{{}}` once, where the class name goes")
    return result


def _labels(value: Any) -> dict[str, str]:
    """Value -> label name: a mapping, or a list of names in the order of the values 0, 1, ..."""
    if isinstance(value, list):
        return {str(i): name for i, name in enumerate(texts(value))}
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must be a list of names or a mapping of values to names, not {show(value)}")
    return {str(key): text(item if not isinstance(item, int) else str(item)) for key, item in value.items()}


def _raw(value: Any) -> str:
    """Text that may hold line breaks and spaces at its ends."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {show(value)}; quote it if it is meant as text")
    return value


def _count(least: int) -> Callable[[Any], int]:
    def kind(value: Any) -> int:
        if (result := whole(value)) < least:
            raise ValueError(f"must be at least {least}, not {show(value)}")
        return result

    return kind


READERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("dataset", "config", "split", "image", "label", "head", "benchmark"), text),
    "text": _text_columns, "labels": _labels, "by_index": flag, "max_length": _count(2), "limit": _count(1),
    "stream": flag, "classes": _several, "templates": _templates, "prompt": _raw, "join": _raw,
    "choices": _columns, "shots": _count(0),
}  # fmt: skip
"""How each key of a task is read."""
