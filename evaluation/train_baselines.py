"""What training instead of merging gives: tasks one after another (lower bound), and all together (upper bound).

    python -m evaluation.train_baselines BENCH [--rows 1200] [--epochs 3] [--orders 1]

One encoder (all-MiniLM-L6-v2) with a head a task, trained by transformers' Trainer on the rows of
BENCH/data/<task>/train.parquet, as the fine-tunes of BENCH were (AdamW, encoder 5e-5, heads 1e-3, 64 tokens) but on
fewer of them, in batches of rows of about one length. Sequential: the encoder goes from task to task in an order of
arrival of `hfmerge continual --seed 42`, without any memory of earlier rows; each head is trained with its task and
then kept. Multi-task: all rows at once. A task is scored on its test rows when its model arrives, and at the end.
Writes evaluation/results/baselines/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.import_bench import base_folder, labels_of, tasks_of
from hfmerge.evaluation.results import markdown_table
from hfmerge.experiments.continual import metrics
from hfmerge.experiments.continual.config import orders
from hfmerge.validation.quoting import Markdown


ROOT = Path(__file__).resolve().parents[1]
TOKENS = 64


class ManyHeads(nn.Module):
    """An encoder with one classification head a task; a batch may hold rows of several tasks."""

    def __init__(self, classes: Sequence[int]):
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(base_folder())
        width = self.encoder.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean loss over the rows, as Trainer takes it."""
        pooled = self.dropout(self.encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output)
        losses = []
        for number in task.unique().tolist():
            mine = task == number
            losses.append(nn.functional.cross_entropy(self.heads[number](pooled[mine]), labels[mine], reduction="sum"))
        return {"loss": torch.stack(losses).sum() / len(labels)}

    @torch.inference_mode()
    def accuracy(self, rows: Sequence[Mapping[str, Any]], number: int, collate: Any) -> float:
        """Share of rows of one task that are right."""
        self.eval()
        right, ranked = 0, sorted(rows, key=lambda row: len(row["input_ids"]))
        for at in range(0, len(ranked), 64):
            batch = collate(ranked[at : at + 64])
            pooled = self.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
            right += int((self.heads[number](pooled).argmax(-1) == batch["labels"]).sum())
        return right / len(rows)


def main() -> int:
    """Train both ways, score, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("--rows", type=int, default=1200, help="training rows of each task, a seeded sample")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="test rows of each task; default: all")
    parser.add_argument(
        "--orders", type=int, default=1, help="orders of arrival for sequential training; 0: multi-task only"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the orders, and of training")
    parser.add_argument("--output", type=Path, default=ROOT / "evaluation" / "results" / "baselines")
    args = parser.parse_args()
    if not (args.bench / "data").is_dir():
        print(f"skipped: {args.bench} is not there")
        return 0
    tasks = tasks_of(args.bench, "full")
    train = [rows_of(args.bench, task, "train", i, args.rows) for i, task in enumerate(tasks)]
    test = [rows_of(args.bench, task, "test", i, args.limit) for i, task in enumerate(tasks)]
    classes = [len(labels_of(args.bench, task)) for task in tasks]
    collate = collator()
    start = time.monotonic()
    together = trained(ManyHeads(classes), [row for rows in train for row in rows], collate, args.epochs, args.seed)
    multi = {i: together.accuracy(test[i], i, collate) for i in range(len(tasks))}
    print(f"multi-task: mean {sum(multi.values()) / len(multi):.3f}, {time.monotonic() - start:.0f} s", flush=True)
    found = []
    for order in orders(len(tasks), args.orders, args.seed):
        torch.manual_seed(args.seed)
        model, scores = ManyHeads(classes), []
        for t, i in enumerate(order):
            model = trained(model, train[i], collate, args.epochs, args.seed)
            known = range(t + 1) if t + 1 == len(order) else (t,)
            scores.append({p: model.accuracy(test[order[p]], order[p], collate) for p in known})
            print(f"sequential: {tasks[i]} {scores[t][t]:.3f}, {time.monotonic() - start:.0f} s", flush=True)
        found.append(
            {
                "order": list(order),
                "arrival": {str(i): scores[t][t] for t, i in enumerate(order)},
                "final": {str(i): scores[-1][t] for t, i in enumerate(order)},
                "accuracy": metrics.accuracy(scores, len(order) - 1),
                "backward_transfer": metrics.backward_transfer(scores),
            }
        )
    settings = {key: getattr(args, key) for key in ("rows", "epochs", "limit", "orders", "seed")}
    data = {
        "kind": "baselines", "schema": 1, "base": base_folder().parent.name, "tasks": tasks, "settings": settings,
        "test_rows": [len(rows) for rows in test], "multi_task": {str(i): value for i, value in multi.items()},
        "sequential": found,
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "baselines.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = _markdown(data)
    (args.output / "baselines.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def rows_of(bench: Path, task: str, split: str, number: int, limit: int | None) -> list[dict[str, Any]]:
    """Tokenised rows of one task, a seeded sample."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    with tempfile.TemporaryDirectory() as cache:
        data = Dataset.from_parquet(str(bench / "data" / task / f"{split}.parquet"), cache_dir=cache)
        if limit is not None and limit < len(data):
            data = data.shuffle(seed=0).select(range(limit))
        texts, labels = list(data["text"]), list(data["label"])
    ids = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    return [{"input_ids": row, "task": number, "labels": label} for row, label in zip(ids, labels, strict=True)]


def collator() -> Any:
    """Pads rows to a batch."""
    from transformers import AutoTokenizer, DataCollatorWithPadding

    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(base_folder()))


def trained(model: ManyHeads, rows: Sequence[Mapping[str, Any]], collate: Any, epochs: int, seed: int) -> ManyHeads:
    """Train on rows of one or of all tasks."""
    from transformers import Trainer, TrainingArguments

    groups = [
        {"params": list(model.encoder.parameters()), "lr": 5e-5},
        {"params": list(model.heads.parameters()), "lr": 1e-3},
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=32, warmup_steps=0.06,
            seed=seed, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, train_sampling_strategy="group_by_length",
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        trainer = Trainer(model, settings, collate, list(rows), optimizers=(optimizer, None))
        trainer.train()
    return model.cpu()


def _markdown(data: Mapping[str, Any]) -> str:
    tasks, first = data["tasks"], next(iter(data["sequential"]), None)
    found = {"sequential, on arrival": first["arrival"], "sequential, at the end": first["final"]} if first else {}
    found["multi-task"] = data["multi_task"]
    columns = [[scores[str(i)] for i in range(len(tasks))] for scores in found.values()]
    cells = [[f"{value:.3f}" for value in row] for row in zip(*columns, strict=True)]
    cells.append([f"{sum(column) / len(column):.3f}" for column in columns])
    names = [f"{task} ({rows} rows)" for task, rows in zip(tasks, data["test_rows"], strict=True)]
    settings = data["settings"]
    how = f"{settings['rows']} training rows a task at most, {settings['epochs']} epochs."
    if first:
        order = ", ".join(tasks[i] for i in first["order"])
        how += f" Sequential in the order {order}: BWT, /(T-1) {first['backward_transfer']:.3f}."
    return f"{how}\n\n" + markdown_table("task", list(found), [*names, Markdown("**mean**")], cells)


if __name__ == "__main__":
    sys.exit(main())
