"""Causal language models: perplexity of texts, and multiple choice by the likelihood of each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfmerge.errors import HfMergeError
from hfmerge.evaluation.batches import Runner, padded
from hfmerge.evaluation.suite import Task


if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 28
"""Numbers that the logits of one batch may have: a gigabyte in float32."""


def windows(tokenizer: Any, texts: Sequence[str], join: str | None, most: int) -> list[Any]:
    """Texts as token numbers, cut in pieces of at most `most` tokens; a piece of one token has nothing to predict.

    Args:
        join: text between texts that are scored as one; None: each by itself.
    """
    import numpy as np

    joined = [join.join(texts)] if join is not None else list(texts)
    found = []
    for row in tokenizer(joined, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]:
        found += [np.asarray(row[at : at + most], dtype=np.int32) for at in range(0, len(row), most)]
    return [piece for piece in found if len(piece) > 1]


def likelihoods(
    model: PreTrainedModel, ids: Sequence[Any], starts: Sequence[int], runner: Runner, pad: int
) -> list[float]:
    """Sum of the log-likelihoods of each row's tokens from `starts` on, given all before.

    Args:
        ids: integer arrays.
        starts: first token that counts, at least 1, since the first has nothing before it.
    """
    import torch

    def work(batch: Sequence[int]) -> list[float]:
        tokens, mask = padded([ids[i] for i in batch], pad, runner.device)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        sums = []
        for row, i in enumerate(batch):
            first, end = starts[i], len(ids[i])
            scores = torch.log_softmax(logits[row, first - 1 : end - 1].float(), -1)
            sums.append(float(scores.gather(-1, tokens[row, first:end, None]).double().sum()))
        return sums

    return runner.run([len(row) for row in ids], work, budget=LOGITS // int(model.config.get_text_config().vocab_size))


def questions(task: Task, rows: Any, where: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Prompts, choices and the right choice of every row.

    Raises:
        HfMergeError: a prompt that names no column, a row without choices, an answer that is none of them.
    """
    prompts, choices, answers = [], [], []
    for i, row in enumerate(rows):
        try:
            prompts.append(str(task.prompt).format_map(row))
        except (KeyError, IndexError, ValueError) as error:
            raise HfMergeError(f"{where}: the prompt does not fit the columns ({error}).") from error
        given = [_part(row, name, where) for name in task.choices]
        options = [str(value) for value in (given[0] if len(given) == 1 else given)]
        if len(options) < 2:
            raise HfMergeError(f"{where}: row {i} has {len(options)} choices; two are the least.")
        choices.append(options)
        names = _names(row, task.choices)
        answers.append(_answer(row[str(task.label)], options, names, f"{where}: row {i}"))
    return prompts, choices, answers


def encode_choices(
    tokenizer: Any, prompts: Sequence[str], choices: Sequence[Sequence[str]], most: int
) -> tuple[list[Any], list[int]]:
    """Each prompt with each of its choices, as token numbers, and where the choice begins; long prompts lose their
    beginning.
    """
    import numpy as np

    ids, starts = [], []
    for prompt, options in zip(prompts, choices, strict=True):
        stem = prompt.rstrip()
        before = tokenizer(stem)["input_ids"] if stem else []
        for option in options:
            whole = tokenizer(f"{stem} {option.strip()}" if stem else option.strip())["input_ids"]
            start = 0
            while start < min(len(before), len(whole) - 1) and before[start] == whole[start]:
                start += 1
            cut = max(0, len(whole) - most)
            ids.append(np.asarray(whole[cut:], dtype=np.int32))
            starts.append(max(1, start - cut))
    return ids, starts


def chosen(sums: Sequence[float], choices: Sequence[Sequence[str]], *, normalised: bool) -> list[int]:
    """The most likely choice of each row; `normalised` by the bytes of its text."""
    found, at = [], 0
    for options in choices:
        scores = list(sums[at : at + len(options)])
        if normalised:
            scores = [s / max(1, len(o.strip().encode())) for s, o in zip(scores, options, strict=True)]
        found.append(max(range(len(options)), key=lambda i: (scores[i], -i)))
        at += len(options)
    return found


def _part(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A column, or `column.key` of one that holds mappings."""
    column, _, key = name.partition(".")
    value = row[column]
    if not key:
        return value
    if not isinstance(value, Mapping) or key not in value:
        raise HfMergeError(f"{where}: {column} holds no {key!r}.")
    return value[key]


def _names(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """How the choices are called where the data set says so, as in `choices: {text: [...], label: [A, B, ...]}`."""
    column, _, key = columns[0].partition(".")
    value = row[column]
    return [str(name) for name in value.get("label", ())] if key and isinstance(value, Mapping) else []


def _answer(value: Any, options: Sequence[str], names: Sequence[str], where: str) -> int:
    """Number of the right choice, given as a number, a digit, a letter, its name or its text."""
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, str):
        for known in (names, options, [chr(ord("A") + i) for i in range(len(options))]):
            if value in known:
                return list(known).index(value)
        value = int(value) if value.isdigit() else value
    if not isinstance(value, int) or not 0 <= value < len(options):
        raise HfMergeError(f"{where}: the answer {value!r} is not one of its {len(options)} choices.")
    return value
