"""Labelled rows of a suite's tasks, in the form of replay rows whose outputs give all probability to the label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.errors import UnsupportedError
from hfmerge.evaluation.batches import padded
from hfmerge.evaluation.classifying import pixels
from hfmerge.evaluation.data import load_rows, pin_data
from hfmerge.evaluation.labels import head_rows, named_answers, numbered_answers
from hfmerge.evaluation.models import Subject
from hfmerge.evaluation.processors import (
    IMAGE_FILES,
    TOKENIZER_FILES,
    encode,
    find_snapshot,
    load_images,
    load_tokenizer,
    longest,
    padding,
    texts_of,
)
from hfmerge.evaluation.suite import Suite, Task
from hfmerge.learning.replay.dataset import Replay


if TYPE_CHECKING:
    from torch import Tensor

CERTAIN = -100.0
"""Logit of a label that is not the answer, beside 0 of the answer."""


def task_of(suite: Suite, names: Sequence[str]) -> Task | None:
    """The classification task whose head is that of a model, by any of its names; None where the suite has none."""
    for task in suite.tasks:
        if task.classifies and task.head is not None and task.head.partition("@")[0] in names:
            return task
    return None


def labelled_rows(task: Task, suite: Suite, subject: Subject, *, split: str, rows: int, seed: int) -> Replay:
    """A seeded sample of labelled rows of a task; no row is held out.

    With one certain answer the divergence of a model's outputs is its cross-entropy.
    Two columns of texts make rows of pairs, with `token_type_ids` where the tokenizer has them.

    Raises:
        HfMergeError: the data set has no such split or columns, or labels that the head has not.
        UnsupportedError: a task of numbers instead of classes.
    """
    import torch

    if task.metric in ("pearson", "spearman"):
        raise UnsupportedError(f"learn: {task.name} has numbers for answers; labelled rows need classes.")
    limited = dataclasses.replace(task, split=split, limit=rows)
    pin = pin_data(limited, suite.folder)
    where = f"{task.name} ({pin.label})"
    loaded = load_rows(limited, pin, limit=rows, seed=seed)
    head = subject.own_head()
    assert head is not None and task.label is not None
    values = list(loaded[task.label])
    if task.by_index:
        answers = list(numbered_answers(limited, values, head.labels, where).values)
    else:
        named = named_answers(limited, loaded.features[task.label], values, where)
        places = head_rows(named.used, head.labels, where, head.owner)
        answers = [places[named.names[value]] for value in named.values]
    logits = torch.full((len(answers), len(head.labels)), CERTAIN)
    logits[range(len(answers)), answers] = 0.0
    inputs, pad = _pixels(task, loaded, subject, where) if task.image else _texts(task, loaded, subject, where)
    mark = f"{pin.name}@{pin.digest}"
    return Replay(mark, task.kind, "labels", seed, "classes", pad, 0, inputs, {"logits": logits})


def _texts(task: Task, rows: Any, subject: Subject, where: str) -> tuple[dict[str, Tensor], int]:
    import torch

    tokenizer = load_tokenizer(find_snapshot(subject.snapshots, TOKENIZER_FILES, "tokenizer", subject.info.label))
    columns = [texts_of(rows, column, where) for column in task.text]
    pad = padding(tokenizer)
    ids, types = encode(tokenizer, columns, longest(tokenizer, subject.config, task.max_length))
    tokens, mask = padded(ids, pad, "cpu")
    found = {"input_ids": tokens.to(torch.int32), "attention_mask": mask.to(torch.uint8)}
    if types is not None:
        found["token_type_ids"] = padded(types, 0, "cpu")[0].to(torch.uint8)
    return found, pad


def _pixels(task: Task, rows: Any, subject: Subject, where: str) -> tuple[dict[str, Tensor], None]:
    import torch

    processor = load_images(find_snapshot(subject.snapshots, IMAGE_FILES, "image processor", subject.info.label))
    assert task.image is not None
    found = pixels(rows, task.image, processor, range(len(rows)), "cpu", where)
    return {"pixel_values": found.to(torch.float16)}, None
