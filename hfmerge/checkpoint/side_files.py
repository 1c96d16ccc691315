"""Files beside the weights: configuration, tokenizer, processor, chat templates, sentence-transformers modules; code.

They are copied byte for byte from the base; only config.json is rewritten, for the output's dtype and vocabulary, and
so that it names no other weights.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot


_PATTERNS = (
    "config.json",
    "generation_config.json",
    "decision.json",
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    # sentencepiece's, tiktoken's and mistral-common's models, by whatever name a tokenizer knows them
    *("*.model", "*.spm", "*.tiktoken", "tekken.json"),
    *("bpe.codes", "dict.txt", "prophetnet.tokenizer", "target_vocab.json", "entity_vocab.json", "emoji.json"),
    *("byte_maps.json", "word_shape.json", "word_pronunciation.json"),
    *("chat_template.json", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*processor_config.json", "audio_tokenizer_config.json"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "router_config.json"),
    *("[0-9]_*/*.json", "[0-9]_*/*.txt", "[0-9]_*/*.model", "[0-9]_*/*.safetensors"),
)
"""What is copied: what transformers, sentence-transformers and mistral-common read; never weights, card or history."""
CODE = ("*.py", "[0-9]_*/*.py", "custom_generate/*")
"""What is copied, with the caller's consent alone: code, and what lies beside it."""
NO_SIDES = (".py", ".pyc", ".so", ".pkl", ".pickle", ".bin", ".pt", ".pth")
"""How names end that are never a side file, whatever they begin with: code, and pickles."""
_ASSETS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
"""How names of files end that people may add to a merge: text and pictures for its card, which nothing loads."""
GIT = (".gitattributes", ".gitignore")
KEPT_BY_TOOLS = (".git/", ".cache/huggingface/")
"""What git and the Hub's client keep in a folder."""


def side_files(base: Snapshot, *, remote_code: bool) -> list[str]:
    """The base's files that belong beside a merge, in order; its code only where the caller allows that."""
    return [name for name in sorted(base.files) if is_side_file(name) or (remote_code and is_code(name))]


def is_side_file(name: str) -> bool:
    """Whether a file of that name takes part in loading a model, though it holds no weights and no code."""
    return is_fitting(name, _PATTERNS) and not name.endswith(NO_SIDES)


def is_code(name: str) -> bool:
    """Whether a file of that name is code that a loader runs where it is trusted, or lies beside such code."""
    return is_fitting(name, CODE)


def is_asset(name: str) -> bool:
    """Whether people may add a file of that name to a merge: it is for the card or for git, and no loader reads it."""
    return name.lower().endswith(_ASSETS) or name in GIT or name.startswith(KEPT_BY_TOOLS)


def without_code(value: Any) -> Any:
    """A configuration that names no code at any depth, so that no class of transformers asks whether to run some."""
    if isinstance(value, Mapping):
        return {key: without_code(item) for key, item in value.items() if key != "auto_map"}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def is_fitting(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path fits one of the patterns, in as many folders as the pattern has."""
    return any(fnmatch.fnmatchcase(name, pattern) and _level(name, pattern) for pattern in patterns)


def _level(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/")


def copy_side_files(
    base: Snapshot, names: list[str], folder: Path, changes: Mapping[str, Any], *, remote_code: bool
) -> None:
    """Copy the files; `changes` replaces keys of config.json (None removes one).

    Args:
        remote_code: whether code may be named in configurations, which may be that of any repository, of any commit.
    """
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            read = dict(read_snapshot_json(base, name))
            config = read if remote_code else without_code(read)
            for key in ("_name_or_path", "transformers_weights"):
                config.pop(key, None)
            for key, value in changes.items():
                config.pop(key, None)
                if value is not None:
                    config[key] = value
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif name.endswith("config.json") and not remote_code:
            read = read_snapshot_json(base, name)
            config = without_code(read)
            if config == read:
                shutil.copyfile(fetch(base, name), target)
            else:
                target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(fetch(base, name), target)
