"""Checks who may read the inputs of a merge: each input is looked up without a token, as everybody sees it.

The rule: an input is public if an anonymous request can read its repository at its commit and the repository is not
gated. An input that an anonymous request cannot read counts as private, also if it was deleted or squashed.
A folder counts as public, since hfmerge knows nothing about it. To publish a merge of a private folder, push with
`--private`. A snapshot in a cache of the Hub counts as its repository.
Inputs are the base, the models, the models beneath adapters, and all that inner merges say they contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfmerge.errors import AccessError, NotFoundError
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.reference import split_name


PUBLIC, GATED, REVIEWED, PRIVATE = range(4)
"""Levels of privacy: everybody may read; everybody who asks; people whom the owner admits; members alone."""
WORDS = ("public", "gated", "gated by review", "private")


def level_of(info: Any) -> int:
    """Level of privacy of the repository that `model_info` describes."""
    if info.private:
        return PRIVATE
    return REVIEWED if info.gated == "manual" else GATED if info.gated else PUBLIC


def snapshot_of(folder: str | Path) -> str | None:
    """The identity, `org/name@commit`, of what a folder in a cache of the Hub is a snapshot of; None of any other."""
    place = Path(folder).expanduser().resolve()
    for here in (place, *place.parents):
        found = re.fullmatch(r"models--(?:(.+?)--)?(.+)", here.parent.parent.name)
        if found is not None and here.parent.name == "snapshots":
            return f"{f'{found[1]}/' if found[1] else ''}{found[2]}@{here.name}"
    return None


def restricted(identities: Iterable[str]) -> dict[str, int]:
    """Name -> level of privacy, for the inputs that are not public.

    Args:
        identities: `org/name`, `org/name@revision`, both also with a subfolder, or `name@sha256:digest` of a folder,
            which is passed over.

    Raises:
        SourceError: the Hub cannot be asked.
    """
    found: dict[str, int] = {}
    for identity in dict.fromkeys(identities):
        name, at, revision = identity.rpartition("@")
        if revision.startswith("sha256:"):
            continue
        repo_id, _ = split_name(name if at else identity)
        level = _level(repo_id, revision if at else None)
        if level != PUBLIC:
            found[repo_id] = max(level, found.get(repo_id, PUBLIC))
    return found


def _level(name: str, revision: str | None) -> int:
    from huggingface_hub.errors import HFValidationError

    api = hub_api()
    try:
        with hub_errors(name):
            return level_of(patiently(lambda: api.model_info(name, revision=revision, token=False)))
    except (NotFoundError, AccessError, HFValidationError):
        return PRIVATE  # a name that the Hub does not allow cannot be read by anybody either
