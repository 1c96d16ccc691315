"""Files beside the weights: configuration, tokenizer, processor, chat templates, sentence-transformers modules.

They are copied byte for byte from the base; only config.json is rewritten, for the output's dtype and vocabulary.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.fetching import fetch, read_json
from hfmerge.source import Pinned


PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "[0-9]_*/*.safetensors",
)
"""What is copied; never the base's own weights, card or history."""


def side_files(base: Pinned, *, remote_code: bool) -> list[str]:
    """The base's files that belong beside a merge, in order."""
    patterns = (*PATTERNS, "*.py") if remote_code else PATTERNS
    return [name for name in sorted(base.files) if _fits(name, patterns)]


def is_side_file(name: str) -> bool:
    """Whether a file of that name takes part in loading a model, though it holds no weights and no code."""
    return _fits(name, PATTERNS)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and _level(name, pattern) for pattern in patterns)


def _level(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/")


def copy_side_files(base: Pinned, names: list[str], folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy the files; `changes` replaces keys of config.json (None removes one)."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            config = dict(read_json(base, name))
            config.pop("_name_or_path", None)
            for key, value in changes.items():
                config.pop(key, None)
                if value is not None:
                    config[key] = value
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(fetch(base, name), target)
