"""Helpers of the tests of evaluation: rows of random words, and an independent loop over a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel


TOKENS = ["[UNK]", "[PAD]", *(f"w{i}" for i in range(tiny.WORDS - 2))]
"""Words of the tiny tokenizers, in the order of their numbers."""


def sentences(count: int, seed: int, most: int = 9) -> list[str]:
    """Texts of different lengths."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(TOKENS[2:], k=rng.randint(1, most))) for _ in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(path: Path, labels: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Write sentences with random labels, all of which occur; returns the rows."""
    rng = random.Random(seed)
    names = [*labels, *rng.choices(labels, k=count - len(labels))]
    rows = [{"text": text, "label": name} for text, name in zip(sentences(count, seed), names, strict=True)]
    write_rows(path, rows)
    return rows


def ids(text: str) -> list[int]:
    """Token numbers, without any tokenizer."""
    return [TOKENS.index(word) for word in text.split()]


def guesses(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The label a model gives each row, one at a time, without padding."""
    names = model.config.id2label
    with torch.inference_mode():
        return [names[int(model(torch.tensor([ids(row["text"])])).logits.argmax())] for row in rows]


def accuracy(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    """Share of the rows whose label the model gives."""
    found = guesses(model, rows)
    return sum(guess == row["label"] for guess, row in zip(found, rows, strict=True)) / len(rows)


def suite(path: Path, *tasks: dict[str, Any], name: str = "tiny") -> Path:
    """Write a suite; JSON is YAML."""
    path.write_text(json.dumps({"name": name, "tasks": list(tasks)}), encoding="utf-8")
    return path
