"""What makes a model usable beside its weights: tokenizer, chat template, generation config; compared and chosen.

A merge has those of its base. Where a source has others, a user has to know it, and may choose the source's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.checkpoint.side_files import copy_side_files, is_fitting, is_side_file
from hfmerge.errors import CorruptFileError, OfflineError
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot
from hfmerge.validation.limits import JSON_BYTES
from hfmerge.validation.strict_json import read_json_file, read_limited
from hfmerge.validation.values import show


CHOICES = ("tokenizer", "chat_template", "generation_config")
"""Keys of a recipe that name the model whose files are taken."""
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
GENERATION = "generation_config.json"
SETTINGS = "tokenizer_config.json"
TOKEN_KEYS = ("bos_token", "eos_token", "pad_token")
GENERAL = ("transformers_version", "_from_model_config")
"""Keys of generation_config.json that say nothing about what is generated."""


def files_of(choice: str, snapshot: Snapshot) -> list[str]:
    """The files that one of `CHOICES` stands for; code and pickles are none of them."""
    return [name for name in sorted(snapshot.files) if _belongs(choice, name)]


def _belongs(choice: str, name: str) -> bool:
    patterns = {"tokenizer": TOKENIZER, "chat_template": TEMPLATES, "generation_config": (GENERATION,)}[choice]
    return is_fitting(name, patterns) and is_side_file(name)


def unlike_base(base: Snapshot, other: Snapshot) -> tuple[str, ...]:
    """In which words a model's usage differs from the base's; empty where nothing of it does.

    A file that only the Hub has, and that cannot be asked now, is not compared.
    """
    found = []
    try:
        theirs = template(other)
        if theirs is not None and theirs != template(base):
            found.append("chat template")
        mine, its = _special(base), _special(other)
        found += [f"{key} {show(its[key])}" for key in TOKEN_KEYS if key in its and its[key] != mine.get(key)]
        if GENERATION in other.files and not _same_file(GENERATION, base, other):
            ours = _json(base, GENERATION) if GENERATION in base.files else {}
            said = _json(other, GENERATION)
            keys = [key for key in sorted(said) if key not in GENERAL and said[key] not in (None, ours.get(key))]
            if keys:
                found.append(f"generation config ({', '.join(keys[:5])})")
    except OfflineError:
        return tuple(found)
    return tuple(found)


def template(snapshot: Snapshot) -> str | None:
    """The chat template of a model as one text, from whichever file holds it; several of them as JSON."""
    if TEMPLATES[0] in snapshot.files:
        return _text(snapshot, TEMPLATES[0])
    for name in (TEMPLATES[1], SETTINGS):
        if name in snapshot.files:
            value = _json(snapshot, name).get("chat_template")
            if value:
                return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return None


def is_in_settings(snapshot: Snapshot) -> bool:
    """Whether the settings of a model's tokenizer hold a chat template."""
    return SETTINGS in snapshot.files and bool(_json(snapshot, SETTINGS).get("chat_template"))


def _special(snapshot: Snapshot) -> dict[str, str]:
    """Special tokens by their key in tokenizer_config.json."""
    if SETTINGS not in snapshot.files:
        return {}
    said = _json(snapshot, SETTINGS)
    tokens = {key: value.get("content") if isinstance(value := said.get(key), dict) else value for key in TOKEN_KEYS}
    return {key: str(value) for key, value in tokens.items() if value is not None}


def _same_file(name: str, one: Snapshot, other: Snapshot) -> bool:
    held = [snapshot.files[name].blob_id if name in snapshot.files else None for snapshot in (one, other)]
    return held[0] is not None and held[0] == held[1]


def _json(snapshot: Snapshot, name: str) -> Mapping[str, Any]:
    value = read_snapshot_json(snapshot, name)
    return value if isinstance(value, dict) else {}


def _text(snapshot: Snapshot, name: str) -> str:
    try:
        return read_limited(fetch(snapshot, name), JSON_BYTES).decode("utf-8")
    except ValueError as error:
        raise CorruptFileError(f"{snapshot.label}: {name} cannot be used: {error}.") from error


def take(choice: str, snapshot: Snapshot, folder: Path) -> None:
    """Put the files of a choice into a merge, in the place of those that are there; they name no code.

    Args:
        choice: one of `CHOICES`; the tokenizer first, since its settings may hold a template.
        snapshot: of the model that is chosen.
        folder: the output, which has the base's files or none for this choice.
    """
    _remove(choice, folder)
    copy_side_files(snapshot, files_of(choice, snapshot), folder, {}, remote_code=False)
    if choice == "chat_template":
        own = _json(snapshot, SETTINGS).get("chat_template") if SETTINGS in snapshot.files else None
        _set_template(folder, None if files_of(choice, snapshot) else own)


def put_template(text: str, folder: Path) -> None:
    """Put a chat template into a merge, in the place of those that are there."""
    _remove("chat_template", folder)
    (folder / TEMPLATES[0]).write_bytes(text.encode("utf-8"))
    _set_template(folder, None)


def _remove(choice: str, folder: Path) -> None:
    """Remove the files of a choice from a merge, and folders that are empty then."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if _belongs(choice, path.relative_to(folder).as_posix()):
            path.unlink()
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()


def _set_template(folder: Path, value: Any) -> None:
    """The template in the settings of a merge's tokenizer; None or an empty one: none."""
    settings = folder / SETTINGS
    if settings.is_file():
        held = read_json_file(settings, JSON_BYTES, finite=False)
        held.pop("chat_template", None)
        if value:
            held["chat_template"] = value
        settings.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
