"""Splits tasks of many labels into halves, trains a fine-tune of each half, and puts them on a Hub on loopback.

    hfmerge hub run --root STORE -- python -m evaluation.split_tasks BENCH [--work FOLDER]

`banking77-a` has the first 39 labels of `banking77` and the rows that bear one, `banking77-b` the other 38; so too
with `clinc_domain`, 5 and 5: the "split" tasks of continual learning. A half is trained as the fine-tunes of BENCH
were (all rows, 3 epochs, encoder 5e-5, head 1e-3, 64 tokens), by `train_baselines`, and becomes `bench/minilm-<half>`
and the data set `bench/<half>`. FOLDER then has BENCH's layout, `data/<half>/` and, not packed, `full/<half>/`; a
model that is there is not trained again. BENCH is described in `import_bench`; without it the script says `skipped`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from evaluation.import_bench import SPLITS, base_folder, labels_of, upload_task
from evaluation.train_baselines import ManyHeads, collator, rows_of, trained


FIRST = {"banking77": 39, "clinc_domain": 5}
"""Task -> how many of its labels its first half has."""
EPOCHS = 3


@dataclass(frozen=True)
class Half:
    """The labels of a task from `start` to before `stop`."""

    name: str
    task: str
    start: int
    stop: int

    def rows(self, table: pa.Table) -> pa.Table:
        """The task's rows that bear one of these labels, numbered from 0."""
        label = table["label"]
        kept = table.filter(pc.and_(pc.greater_equal(label, self.start), pc.less(label, self.stop)))
        numbers = pc.subtract(kept["label"], pa.scalar(self.start, kept["label"].type))
        return kept.set_column(kept.schema.get_field_index("label"), "label", numbers)


def main() -> int:
    """Train what is missing, and upload; 0 unless something fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("--work", type=Path, help="folder for models and rows; default: a temporary one")
    parser.add_argument("--seed", type=int, default=42, help="of training")
    args = parser.parse_args()
    if not (args.bench / "data").is_dir():
        print(f"skipped: {args.bench} is not there")
        return 0
    with tempfile.TemporaryDirectory(prefix="hfmerge-halves-") as temporary:
        work = args.work or Path(temporary)
        for task in FIRST:
            names = list(labels_of(args.bench, task).values())
            for half in halves(task, len(names)):
                cut_rows(args.bench, half, work)
                accuracy = fine_tune(half, names[half.start : half.stop], work, args.seed)
                print(f"   {half.name}: test accuracy {accuracy:.3f}", flush=True)
                upload_task(work, half.name, work / "full" / half.name, work / "hub" / half.name)
    return 0


def halves(task: str, labels: int) -> tuple[Half, Half]:
    """Both halves of a task of so many labels."""
    first = FIRST[task]
    return Half(f"{task}-a", task, 0, first), Half(f"{task}-b", task, first, labels)


def cut_rows(bench: Path, half: Half, work: Path) -> None:
    """Write the half's training and test rows."""
    folder = work / "data" / half.name
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        table = pq.read_table(bench / "data" / half.task / f"{split}.parquet")
        pq.write_table(half.rows(table), folder / f"{split}.parquet")


def fine_tune(half: Half, labels: list[str], work: Path, seed: int) -> float:
    """Test accuracy of the half's fine-tune, which is trained and saved unless it is there.

    Args:
        labels: their names.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = work / "full" / half.name
    if not folder.is_dir():
        torch.manual_seed(seed)
        train, test = (rows_of(work, half.name, split, 0, None) for split in SPLITS)
        collate = collator()
        learned = trained(ManyHeads([len(labels)]), train, collate, EPOCHS, seed)
        numbers = {name: i for i, name in enumerate(labels)}
        config = AutoConfig.from_pretrained(base_folder(), id2label=dict(enumerate(labels)), label2id=numbers)
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(learned.encoder.state_dict())
        model.classifier.load_state_dict(learned.heads[0].state_dict())
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(base_folder()).save_pretrained(part)
        found = {"train_rows": len(train), "test_rows": len(test), "accuracy": learned.accuracy(test, 0, collate)}
        (part / "metrics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.rename(folder)
    accuracy: float = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["accuracy"]
    return accuracy


if __name__ == "__main__":
    sys.exit(main())
