"""Runs each kind of task on a model: prepares the rows once, runs the model, compares its outputs with the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hfmerge.errors import HeadError, HfMergeError
from hfmerge.evaluation import classifying, language
from hfmerge.evaluation.batches import Runner
from hfmerge.evaluation.data import DataPin, load_rows
from hfmerge.evaluation.harnesses import lm_eval_score, mteb_score
from hfmerge.evaluation.labels import Answers, fits, head_rows, named_answers, numbered_answers, numbers
from hfmerge.evaluation.metrics import METRICS, scored
from hfmerge.evaluation.models import Subject, TaskHead
from hfmerge.evaluation.processors import (
    IMAGE_FILES,
    TOKENIZER_FILES,
    encode,
    files_digest,
    find_snapshot,
    load_images,
    load_tokenizer,
    longest,
    padding,
    texts_of,
)
from hfmerge.evaluation.results import Score
from hfmerge.evaluation.suite import Suite, Task
from hfmerge.validation.wording import parameter


class Tasks:
    """The tasks of a suite with what is kept of them between models: rows, tokens, answers, features of class names.

    Args:
        suite: with the limits of this run.
        seed: of samples and intervals.
        runner: of batches.
        pin: the data set of a task.
        other: a model by reference, for its head or text tower.
        grow: told by how much the pieces of work differ from the rows.
    """

    def __init__(
        self,
        suite: Suite,
        seed: int,
        runner: Runner,
        pin: Callable[[Task], DataPin],
        other: Callable[[str], Subject],
        grow: Callable[[int], object],
    ):
        self._seed, self._runner, self._pin, self._other, self._grow = seed, runner, pin, other, grow
        self._rows: dict[str, Any] = {}
        self._kept: dict[tuple[Any, ...], Any] = {}

    def size(self, task: Task) -> int:
        """Rows of a task; 0 for tasks of other harnesses."""
        return len(self.rows(task)) if task.dataset else 0

    def rows(self, task: Task) -> Any:
        """Rows of a task, loaded when first needed; the first process downloads, the others find it in the cache."""
        if task.name not in self._rows:
            ranks = self._runner.ranks
            pin = self._pin(task)
            if ranks.world > 1:
                ranks.on_main(lambda: len(load_rows(task, pin, limit=task.limit, seed=self._seed)))
            self._rows[task.name] = ranks.each(lambda: load_rows(task, pin, limit=task.limit, seed=self._seed))
        return self._rows[task.name]

    def score(self, subject: Subject, task: Task, head: str | None) -> Score:
        """Run a task on a model.

        Raises:
            HeadError: the model has no head for the task. HfMergeError: something else does not fit.
        """
        run = {
            "text-classification": self._texts,
            "image-classification": self._images,
            "zero-shot-image-classification": self._zero_shot,
            "perplexity": self._perplexity,
            "multiple-choice": self._multiple_choice,
        }.get(task.kind)
        if run is not None:
            return run(subject, task, head)
        ranks, size = self._runner.ranks, self._runner.batch_size
        if task.kind == "lm-eval":
            return ranks.on_main(lambda: lm_eval_score(subject, task, batch_size=size, seed=self._seed))
        return ranks.on_main(lambda: mteb_score(subject, task, batch_size=size))

    def _texts(self, subject: Subject, task: Task, head_of: str | None) -> Score:
        head, spare = self._head(subject, task, head_of)
        model = subject.with_head(head, task.kind, spare)
        snapshots = (*subject.snapshots, *(spare.snapshots if spare is not None else ()))
        snapshot = find_snapshot(snapshots, TOKENIZER_FILES, "tokenizer", subject.info.label)
        ids, types, pad = self._tokens(task, snapshot, subject)
        number = METRICS[task.metric].regression
        found = classifying.classify_texts(model, ids, types, self._runner, pad=pad, number=number)
        if not number:
            return self._compare(task, head, found)
        if len(head.labels) != 1:
            raise HeadError(f"{self._where(task)}: {task.metric} needs a head of one number; that of {head.owner} has "
                            f"{len(head.labels)} labels.")  # fmt: skip
        answers = numbers(task, self.rows(task)[task.label], self._where(task))
        return scored(task.metric, found, answers, seed=self._seed)

    def _images(self, subject: Subject, task: Task, head_of: str | None) -> Score:
        head, spare = self._head(subject, task, head_of)
        model, rows = subject.with_head(head, task.kind, spare), self.rows(task)
        snapshots = (*subject.snapshots, *(spare.snapshots if spare is not None else ()))
        processor = load_images(find_snapshot(snapshots, IMAGE_FILES, "image processor", subject.info.label))
        where = self._where(task)
        found = classifying.classify_images(model, rows, str(task.image), processor, self._runner, where)
        return self._compare(task, head, found)

    def _zero_shot(self, subject: Subject, task: Task, head_of: str | None) -> Score:
        rows, where = self.rows(task), self._where(task)
        listed = getattr(rows.features.get(task.label), "names", None) or ()
        if task.classes is None and not listed:
            raise HfMergeError(f"{where}: {task.label} has no class names; list them under `classes` in the suite.")
        classes = task.classes or tuple(str(name).replace("_", " ") for name in listed)
        answers = numbered_answers(task, rows[task.label], classes, where)
        text = self._other(head_of) if head_of is not None and not subject.reads_texts else None
        model = subject.keep(("towers", head_of), lambda: subject.two_towers(text))
        reader = text or subject
        snapshots = (*subject.snapshots, *reader.snapshots)
        processor = load_images(find_snapshot(snapshots, IMAGE_FILES, "image processor", subject.info.label))
        tokenizer = load_tokenizer(find_snapshot(reader.snapshots, TOKENIZER_FILES, "tokenizer", reader.info.label))
        features = self._remember(
            ("classes", task.name, reader.info.digest or id(reader)),
            lambda: classifying.class_features(model, tokenizer, classes, task.templates, self._runner.device),
        )
        found = classifying.match_images(model, features, rows, str(task.image), processor, self._runner, where)
        return scored(task.metric, found, answers.values, seed=self._seed)

    def _perplexity(self, subject: Subject, task: Task, head_of: str | None) -> Score:
        snapshot = find_snapshot(subject.snapshots, TOKENIZER_FILES, "tokenizer", subject.info.label)
        where = self._where(task)

        def cut() -> tuple[list[Any], int]:
            tokenizer = load_tokenizer(snapshot)
            most = longest(tokenizer, subject.config, task.max_length)
            texts = texts_of(self.rows(task), task.text[0], where)
            return language.windows(tokenizer, texts, task.join, most), padding(tokenizer)

        pieces, pad = self._remember(("windows", task.name, files_digest(snapshot, TOKENIZER_FILES)), cut)
        if not pieces:
            raise HfMergeError(f"{where}: no text of two tokens or more.")
        self._grow(len(pieces) - len(self.rows(task)))
        sums = language.likelihoods(subject.whole("causal"), pieces, [1] * len(pieces), self._runner, pad)
        return scored(task.metric, [-value for value in sums], [len(piece) - 1 for piece in pieces], seed=self._seed)

    def _multiple_choice(self, subject: Subject, task: Task, head_of: str | None) -> Score:
        snapshot = find_snapshot(subject.snapshots, TOKENIZER_FILES, "tokenizer", subject.info.label)

        def make() -> tuple[list[list[str]], list[int], list[Any], list[int], int]:
            tokenizer = load_tokenizer(snapshot)
            prompts, choices, answers = language.questions(task, self.rows(task), self._where(task))
            most = longest(tokenizer, subject.config, task.max_length)
            ids, starts = language.encode_choices(tokenizer, prompts, choices, most)
            return choices, answers, ids, starts, padding(tokenizer)

        key = ("choices", task.name, files_digest(snapshot, TOKENIZER_FILES))
        choices, answers, ids, starts, pad = self._remember(key, make)
        self._grow(len(ids) - len(self.rows(task)))
        sums = language.likelihoods(subject.whole("causal"), ids, starts, self._runner, pad)
        found = language.chosen(sums, choices, normalised=task.metric == "accuracy_norm")
        return scored(task.metric, found, answers, seed=self._seed)

    def _head(self, subject: Subject, task: Task, head_of: str | None) -> tuple[TaskHead, Subject | None]:
        """The head for a task and the model it comes from, None for one that this model or merge has itself."""
        if head_of is not None and subject.holds(head_of):
            return subject.head_of(head_of), None
        if head_of is not None:
            other = self._other(head_of)
            head = other.own_head()
            if head is None:
                raise HeadError(
                    f"{self._where(task)}: {head_of} has no classification head; name a model that has one."
                )
            return head, other
        own = subject.own_head()
        heads = [*([own] if own is not None else []), *(subject.head_of(owner) for owner in subject.held)]
        if not heads:
            raise HeadError(
                f"{self._where(task)}: {subject.info.label} has no head; name a model that has one: `head` in the "
                f"suite, or {parameter('heads', {'TASK': 'MODEL'})}."
            )
        if len(heads) == 1:
            return heads[0], None
        names = self._answers(task).names if not task.by_index and not METRICS[task.metric].regression else ()
        fitting = [head for head in heads if names and fits(names, head.labels)]
        if len(fitting) != 1:
            which = "none" if not fitting else f"{len(fitting)} ({', '.join(h.owner for h in fitting)})"
            raise HeadError(
                f"{self._where(task)}: of the {len(heads)} heads of {subject.info.label} {which} have the labels of "
                f"the data; say which to use: `head` in the suite, or {parameter('heads', {'TASK': 'MODEL'})}."
            )
        return fitting[0], None

    def _answers(self, task: Task) -> Answers:
        def read() -> Answers:
            rows = self.rows(task)
            return named_answers(task, rows.features.get(task.label), rows[task.label], self._where(task))

        result: Answers = self._remember(("answers", task.name), read)
        return result

    def _compare(self, task: Task, head: TaskHead, predictions: Sequence[int]) -> Score:
        """Rows of the head as labels of the data; a row whose label no data has counts as wrong."""
        where = self._where(task)
        if task.by_index:
            answers = numbered_answers(task, self.rows(task)[task.label], head.labels, where)
            return scored(task.metric, predictions, answers.values, seed=self._seed)
        answers = self._answers(task)
        rows = head_rows(answers.used, head.labels, where, head.owner)
        labels = {row: answers.names.index(name) for name, row in rows.items()}
        return scored(task.metric, [labels.get(row, -1) for row in predictions], answers.values, seed=self._seed)

    def _tokens(self, task: Task, snapshot: Any, subject: Subject) -> tuple[list[Any], list[Any] | None, int]:
        def make() -> tuple[list[Any], list[Any] | None, int]:
            tokenizer = load_tokenizer(snapshot)
            columns = [texts_of(self.rows(task), column, self._where(task)) for column in task.text]
            most = longest(tokenizer, subject.config, task.max_length)
            return *encode(tokenizer, columns, most), padding(tokenizer)

        key = (
            "tokens",
            task.name,
            files_digest(snapshot, TOKENIZER_FILES),
            subject.config.get("max_position_embeddings"),
        )
        result: tuple[list[Any], list[Any] | None, int] = self._remember(key, make)
        return result

    def _remember(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _where(self, task: Task) -> str:
        return f"{task.name} ({self._pin(task).label})"
