"""The base that an adapter names: a hint on what it was trained on, compared with the model that it is merged onto."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.errors import HfMergeError, SourceError
from hfmerge.hub.client import hub_api
from hfmerge.hub.download import listed_snapshot
from hfmerge.hub.reference import ModelRef, Snapshot, is_hub_id
from hfmerge.validation.values import folder_name, show
from hfmerge.validation.wording import parameter


_QUANTISED = re.compile(
    r"(-unsloth)?-(bnb-(4|8)bit|[48]-?bit|(gptq|awq|hqq|eetq|nf4|fp8|int[48])(-.*)?)$", re.IGNORECASE
)
"""Ends of the names under which quantised copies of a model are published."""
_COMPARED = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_SECONDS = 5.0


def name_of_base(adapter: Mapping[str, Any]) -> str | None:
    """The base that an adapter's configuration names: a Hub ID, or the last part of a folder's path.

    None if it names none, or what cannot be the name of a model.
    """
    text = _named(adapter)
    if is_hub_id(text) and not text.startswith((".", "~")):
        return text
    try:
        return folder_name(PureWindowsPath(text).name)  # parts end at either kind of slash
    except ValueError:
        return None


def folder_of_base(adapter: Mapping[str, Any]) -> Path | None:
    """The folder on this machine that an adapter's configuration names; None where the text is no path."""
    text = _named(adapter)
    try:
        return Path(text).expanduser().resolve() if text else None
    except (OSError, RuntimeError, ValueError):  # a user who does not exist, a character that no path has
        return None


def _named(adapter: Mapping[str, Any]) -> str:
    return str(adapter.get("base_model_name_or_path") or "").strip()


def compare_base(under: Model, source: Model, *, strict: bool) -> str | None:
    """Compare the base that an adapter names with the model that it is merged onto.

    The Hub is asked once, without patience, since the answer is a hint only.

    Args:
        under: the base of the merge, or the model beneath in `base+adapter`.
        source: the adapter.
        strict: refuse what would be a warning.

    Returns:
        None if they are known to be the same, or nothing is named; else a warning.

    Raises:
        SourceError: the named base is another, or cannot be told to be the same, and `strict` is set.
    """
    adapter = source.adapter or {}
    named, said = name_of_base(adapter), _named(adapter)
    if not said or _is_folder(source, under):
        return None
    why: str | None = "That cannot be the name of a model, so only shapes were compared."
    if named is not None:
        why = _difference(named, str(adapter.get("revision") or "") or None, under)
    if why is None:
        return None
    text = f"{source.snapshot.label} names {named or show(said)} as its base and is merged onto {under.name}. {why}"
    if strict:
        raise SourceError(f"{text} Use that base, or leave out {parameter('strict_base', True)}.")
    return text


def _is_folder(source: Model, under: Model) -> bool:
    """Whether an adapter in a folder names the very folder it is merged onto; others' paths mean nothing here."""
    folder = under.snapshot.folder
    if folder is None or source.snapshot.commit is not None:
        return False
    return folder_of_base(source.adapter or {}) == folder.resolve()


def _difference(named: str, revision: str | None, under: Model) -> str | None:
    """What speaks against two models being the same, or that nothing is known; None if they are the same."""
    same_name = named.lower() == under.name.lower()
    if "/" not in named:
        return None if same_name and under.snapshot.folder is not None else _UNKNOWN_FOLDER
    if same_name and (revision is None or revision == under.snapshot.commit):
        return None
    found = _look_up(named, revision)
    if found is None:
        if same_name:
            return (
                f"It names the revision {revision}, which cannot be looked up; this one is {_state(under.snapshot)}."
            )
        return _by_name(named, under.name)
    if found.commit is not None and found.commit == under.snapshot.commit and under.snapshot.subfolder is None:
        return None  # renamed, or a branch that leads here
    if _has_same_files(found, under.snapshot):
        return None
    if found.name.lower() == under.name.lower():
        if revision is None:
            return None
        return f"It was trained on commit {str(found.commit)[:8]}; this one is {_state(under.snapshot)}."
    different = _config_difference(found, under.config)
    if different:
        return f"Their configurations differ: {different}."
    return _by_name(named, under.name)


_UNKNOWN_FOLDER = (
    "That is a folder of whoever trained it, so only shapes were compared; check that it is the same model."
)


def _by_name(named: str, ours: str) -> str:
    """What the names alone say."""
    plain = _QUANTISED.sub("", named)
    if plain != named and plain.rpartition("/")[2].lower() == ours.rpartition("/")[2].lower():
        return "By its name that is a quantised copy of this model."
    return "Their weights were not compared; check that both are the same model."


def _state(snapshot: Snapshot) -> str:
    return f"commit {snapshot.commit[:8]}" if snapshot.commit else "a folder"


def _look_up(name: str, revision: str | None) -> Snapshot | None:
    """A repository as the Hub shows it now, by its present name; None if the Hub does not tell."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = hub_api().model_info(name, revision=revision, files_metadata=True, timeout=_SECONDS)
    except (HfHubHTTPError, HFValidationError, ConnectionError, httpx2.TransportError):
        return None  # not there, not for this user, or no Hub: nothing can be compared
    try:
        return listed_snapshot(ModelRef(name, name, revision, None), info)
    except HfMergeError:
        return None  # a listing that is refused compares with nothing


def _has_same_files(one: Snapshot, other: Snapshot) -> bool:
    """Whether both have the same weights, as far as digests, or else sizes, are known."""
    names = [{name for name in each.files if name.endswith((".safetensors", ".bin"))} for each in (one, other)]
    if not names[0] or names[0] != names[1]:
        return False
    pairs = [(one.files[name], other.files[name]) for name in names[0]]
    return all(
        a.size == b.size and (a.sha256 == b.sha256 if a.sha256 and b.sha256 else other.commit is None)
        for a, b in pairs
    )


def _config_difference(found: Snapshot, config: Mapping[str, Any]) -> str:
    """The sizes in which two configurations differ, as text."""
    try:
        theirs = read_snapshot_json(found, "config.json") if "config.json" in found.files else {}
    except HfMergeError:
        return ""  # what cannot be read is not compared
    both = [key for key in _COMPARED if key in theirs and key in config and theirs[key] != config[key]]
    return ", ".join(f"{key} {show(theirs[key])} and {show(config[key])}" for key in both)
