"""Rows a second of `hfmerge evaluate` beside a bare loop over the same model and the same batches.

    python -m benchmarks.evaluation [--rows 2000] [--runs 5]

The model is a random BERT of the size of all-MiniLM-L6-v2 with a classification head; rows are random words of 4 to 60
tokens. The bare loop is what one would write by hand: sort by length, pad each batch, run, count. Both get rows that
are tokenised already, in a process that has the model in memory; a second pair of figures is the time from files to
the score.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row


GOAL = 1.1
"""Ours over theirs, in time."""
WORDS = 30522
SIZE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
QUICK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BATCH = 32


def run(options: argparse.Namespace) -> str:
    """All of it; the Markdown report."""
    found = common.ask("evaluation", "--measure", "--rows", options.rows, "--runs", options.runs,
                       "--threads", options.threads, *(["--quick"] if options.quick else []))  # fmt: skip
    facts = {
        "machine": common.machine(options.threads),
        "hfmerge": common.our_versions(),
        "work": f"{options.rows} rows in batches of {BATCH}, the same for both; accuracies agree",
        "runs": f"{options.runs} of each, alternating, after one that is not counted; medians (range)",
    }
    rows = []
    for what, ours, theirs in (("scoring", "ours", "bare"), ("from files to the score", "ours_whole", "bare_whole")):
        a, b = statistics.median(found[ours]), statistics.median(found[theirs])
        cells = [f"{options.rows / statistics.median(v):.0f} rows/s ({min(v):.2f} to {max(v):.2f} s)"
                 for v in (found[ours], found[theirs])]  # fmt: skip
        goal = (f"<= {GOAL}x", a <= GOAL * b) if ours == "ours" else ("", None)
        rows.append(Row(what, cells[0], cells[1], f"{a / b:.2f}x the time", *goal))
    return common.report("Evaluation against a bare loop", facts, rows)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every run, in this process; needs torch."""
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="hfmerge-bench-evaluation-") as name:
        folder = Path(name)
        suite = _make(folder, options.rows, QUICK if options.quick else SIZE)
        seconds: dict[str, list[float]] = {key: [] for key in ("ours", "bare", "ours_whole", "bare_whole")}
        for i in range(options.runs + 1):
            scores = {
                **_timed(seconds, "ours", lambda: _ours(folder, suite)),
                **_timed(seconds, "bare", lambda: _bare(folder)),
            }
            if abs(scores["ours"] - scores["bare"]) > 1e-9:
                raise SystemExit(f"accuracies differ: {scores}")
            if i == 0:
                seconds = {key: [] for key in seconds}
    return seconds


def _timed(seconds: dict[str, list[float]], name: str, work: Callable[[], tuple[float, float]]) -> dict[str, float]:
    start = time.perf_counter()
    score, inner = work()
    seconds[f"{name}_whole"].append(time.perf_counter() - start)
    seconds[name].append(inner)
    return {name: score}


def _make(folder: Path, count: int, size: dict[str, int]) -> Path:
    """Model, tokenizer, rows and suite."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    names = {i: f"label {i}" for i in range(10)}
    config = BertConfig(**size, vocab_size=WORDS, id2label=names, label2id={v: k for k, v in names.items()})
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    raw = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    raw.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", pad_token="w1").save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [
        {"text": " ".join(f"w{rng.randrange(2, WORDS)}" for _ in range(rng.randint(4, 60))), "label": names[i % 10]}
        for i in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "t", "kind": "text-classification", "dataset": "./rows.jsonl", "text": "text", "label": "label"}
    (folder / "suite.yaml").write_text(json.dumps({"name": "bench", "tasks": [task]}), encoding="utf-8")
    return folder / "suite.yaml"


def _ours(folder: Path, suite: Path) -> tuple[float, float]:
    """Accuracy, and seconds of a second model on rows that are loaded and tokenised already."""
    from hfmerge.evaluation.models import subject_in_memory
    from hfmerge.evaluation.running import Evaluator, Settings
    from hfmerge.evaluation.suite import load_suite

    evaluator = Evaluator(load_suite(suite), Settings(cache=False, batch_size=BATCH, device="cpu"))
    subject = evaluator.open(folder / "model")
    first = evaluator.score(subject)["t"]
    assert first is not None
    head = subject.own_head()
    assert head is not None
    loaded = subject_in_memory(subject.with_head(head, "text-classification"), "loaded", subject)
    start = time.perf_counter()
    again = evaluator.score(loaded)["t"]
    inner = time.perf_counter() - start
    assert again == first
    return first.value, inner


def _bare(folder: Path) -> tuple[float, float]:
    """Accuracy, and seconds of the loop alone."""
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    ids = tokenizer(list(rows["text"]), truncation=True, max_length=512)["input_ids"]
    labels = [model.config.label2id[name] for name in rows["label"]]
    inner, right = 0.0, 0
    for _ in range(2):  # the whole thing does the work twice, as ours does
        start, right = time.perf_counter(), 0
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        with torch.inference_mode():
            for at in range(0, len(order), BATCH):
                batch = order[at : at + BATCH]
                longest = max(len(ids[i]) for i in batch)
                tokens = torch.tensor([ids[i] + [1] * (longest - len(ids[i])) for i in batch])
                mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in batch])
                guesses = model(input_ids=tokens, attention_mask=mask).logits.argmax(-1).tolist()
                right += sum(guess == labels[i] for guess, i in zip(guesses, batch, strict=True))
        inner = time.perf_counter() - start
    return right / len(ids), inner


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=5)
    found.add_argument("--rows", type=int, default=2000, help="(default: %(default)s)")
    found.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    given = parser().parse_args()
    if given.measure:
        print(json.dumps(measure(given)))
        sys.exit()
    print(run(given), end="")
