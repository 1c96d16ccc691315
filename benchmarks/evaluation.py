"""Rows a second of `hfmerge evaluate` beside a bare loop over the same model and the same batches.

    python -m benchmarks.evaluation [--rows 300] [--runs 5]

The model is a random BERT of the size of all-MiniLM-L6-v2 with a classification head; rows are random words of 4 to 60
tokens. The bare loop is what one would write by hand: sort by length, pad each batch, run, count. Both get rows that
are tokenised already, in one process that has the model in memory, and take turns: a ratio is the median over pairs of
neighbouring runs, of wall time and of CPU seconds. A second pair of figures is the time from files to the score.
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


WHOLE = 2
"""Counted pairs of runs from files to the score, which warm up the rest."""
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
        "runs": f"{options.runs} pairs in turns ({WHOLE} from files to the score, after one that is not counted); "
        "medians (range), ratios of pairs",
    }
    rows = []
    for what, name in (("scoring", "inner"), ("from files to the score", "whole")):
        for side, label in enumerate(("wall", "CPU")):
            ours, bare = ([pair[side] for pair in found[f"{who}_{name}"]] for who in ("ours", "bare"))
            ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
            cells = [_cell(values, options.rows, label) for values in (ours, bare)]
            goal = (f"<= {GOAL}x", ratio <= GOAL) if name == "inner" else ("", None)
            rows.append(Row(f"{what}, {label}", *cells, f"{ratio:.2f}x the time", *goal))
    return common.report("Evaluation against a bare loop", facts, rows)


def _cell(seconds: list[float], rows: int, label: str) -> str:
    middle, spread = statistics.median(seconds), f"{min(seconds):.2f} to {max(seconds):.2f} s"
    return f"{rows / middle:.0f} rows/s ({spread})" if label == "wall" else f"{middle:.2f} s ({spread})"


def measure(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every run, in this process; needs torch."""
    import torch

    torch.set_num_threads(options.threads)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="hfmerge-bench-evaluation-") as name:
        folder = Path(name)
        suite = _make(folder, options.rows, QUICK if options.quick else SIZE)
        sides: dict[str, Callable[[], float]] = {}
        for i in range(WHOLE + 1):
            for who, prepare in (("ours", lambda: _ours(folder, suite)), ("bare", lambda: _bare(folder))):
                begun = time.perf_counter(), time.process_time()
                sides[who] = prepare()
                score = sides[who]()
                _note(found, f"{who}_whole", begun)
                common.progress(f"{who}, from files to the score: {found[f'{who}_whole'][-1][0]:.2f} s wall")
            found = {} if i == 0 else found
        for _ in range(options.runs):
            scores = {}
            for who, work in sides.items():
                begun = time.perf_counter(), time.process_time()
                scores[who] = work()
                _note(found, f"{who}_inner", begun)
                common.progress(f"{who}, scoring: {found[f'{who}_inner'][-1][0]:.2f} s wall")
            if max(abs(value - score) for value in scores.values()) > 1e-9:
                raise SystemExit(f"accuracies differ: {scores}, {score}")
    return found


def _note(found: dict[str, list[tuple[float, float]]], name: str, begun: tuple[float, float]) -> None:
    spent = (time.perf_counter() - begun[0], time.process_time() - begun[1])
    found.setdefault(name, []).append(spent)


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


def _ours(folder: Path, suite: Path) -> Callable[[], float]:
    """Gives the accuracy of a model in memory; rows are loaded and tokenised when it is first called."""
    from hfmerge.evaluation.evaluator import Evaluator, Settings
    from hfmerge.evaluation.models import subject_in_memory
    from hfmerge.evaluation.suite import load_suite

    evaluator = Evaluator(load_suite(suite), Settings(cache=False, batch_size=BATCH, device="cpu"))
    subject = evaluator.open(folder / "model")
    head = subject.own_head()
    assert head is not None
    loaded = subject_in_memory(subject.with_head(head, "text-classification"), "loaded", subject)

    def work() -> float:
        found = evaluator.score(loaded)["t"]
        assert found is not None
        return found.value

    return work


def _bare(folder: Path) -> Callable[[], float]:
    """Gives the accuracy by a loop over rows that are tokenised already."""
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    ids = tokenizer(list(rows["text"]), truncation=True, max_length=512)["input_ids"]
    labels = [model.config.label2id[name] for name in rows["label"]]

    def work() -> float:
        right = 0
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        with torch.inference_mode():
            for at in range(0, len(order), BATCH):
                batch = order[at : at + BATCH]
                longest = max(len(ids[i]) for i in batch)
                tokens = torch.tensor([ids[i] + [1] * (longest - len(ids[i])) for i in batch])
                mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in batch])
                guesses = model(input_ids=tokens, attention_mask=mask).logits.argmax(-1).tolist()
                right += sum(guess == labels[i] for guess, i in zip(guesses, batch, strict=True))
        return right / len(ids)

    return work


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    found = common.arguments(__doc__ or "", runs=5)
    # two threads wait for each other wherever something else runs
    found.set_defaults(threads=1)
    found.add_argument("--rows", type=int, default=300, help="(default: %(default)s)")
    found.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    given = parser().parse_args()
    if given.measure:
        print(json.dumps(measure(given)))
        sys.exit()
    print(run(given), end="")
