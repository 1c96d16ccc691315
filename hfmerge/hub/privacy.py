"""Who may read what a merge is made of: every input is looked at as everybody sees it, without a token.

The rule: an input is public if an anonymous request can read its repository at its commit and the repository is not
gated. What an anonymous request cannot read counts as private, also what was deleted or squashed out of its history.
A folder counts as public, since nothing is known of it: whoever merges a private folder pushes with `--private`. A
snapshot in a cache of the Hub is a folder too, and counts as its repository.
Inputs are the base, the models, the models beneath adapters, and all that inner merges say they contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfmerge.errors import AccessError, NotFoundError
from hfmerge.hub.client import hub_api, hub_errors, patiently


PUBLIC, GATED, REVIEWED, PRIVATE = range(4)
"""How few may read a repository: everybody, who asks, whom its owner lets in, nobody else."""
WORDS = ("public", "gated", "gated by review", "private")


def level_of(info: Any) -> int:
    """How few may read the repository that `model_info` describes."""
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
    """Name -> how few may read it, of those inputs that are not public.

    Args:
        identities: `org/name`, `org/name@revision`, or `name@sha256:digest` of a folder, which is passed over.

    Raises:
        SourceError: the Hub cannot be asked.
    """
    found: dict[str, int] = {}
    for identity in dict.fromkeys(identities):
        name, at, revision = identity.rpartition("@")
        if revision.startswith("sha256:"):
            continue
        level = _level(name if at else identity, revision if at else None)
        if level != PUBLIC:
            found[name if at else identity] = max(level, found.get(name, PUBLIC))
    return found


def _level(name: str, revision: str | None) -> int:
    from huggingface_hub.errors import HFValidationError

    api = hub_api()
    try:
        with hub_errors(name):
            return level_of(patiently(lambda: api.model_info(name, revision=revision, token=False)))
    except (NotFoundError, AccessError, HFValidationError):
        return PRIVATE  # a name that the Hub does not allow cannot be read by anybody either
