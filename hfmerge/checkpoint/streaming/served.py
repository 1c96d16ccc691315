"""SHA-256 of files as the Hub serves them now, read from it anew: neither its listing nor any cache is believed.

Nothing is stored. A connection that is cut is taken up again at the byte that was reached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from hfmerge.errors import OfflineError
from hfmerge.hub.client import hub_errors
from hfmerge.hub.progress_bar import progress_bar
from hfmerge.hub.ranges import RangedFile, Traffic
from hfmerge.hub.reference import Snapshot
from hfmerge.validation.wording import parameter


BLOCK = 1 << 24
"""Bytes of one request."""


def served_digests(snapshot: Snapshot, files: Sequence[str]) -> dict[str, str]:
    """Path -> SHA-256 of what the Hub sends for it.

    Args:
        snapshot: a repository at one commit.
        files: paths in it.

    Raises:
        SourceError: the Hub cannot be reached, refuses, or sends fewer bytes than it lists.
    """
    from huggingface_hub import hf_hub_url

    if snapshot.offline or snapshot.vanished:
        raise OfflineError(
            f"{snapshot.label}: the Hub does not serve it now; run again online, or without "
            f"{parameter('download', True)}."
        )
    otherwise = f"without {parameter('download', True)} (the digests that the Hub lists are then believed)"
    total, traffic, digests = sum(snapshot.files[file].size for file in files), Traffic(), {}
    with (
        hub_errors(snapshot.label),
        progress_bar(total, "Downloading", "B", scaled=True) as bar,
    ):
        for file in files:
            url, size = (
                hf_hub_url(snapshot.repo_id, snapshot.path(file), revision=snapshot.commit),
                snapshot.files[file].size,
            )
            # without a digest, so that what the answer says of itself is not looked at
            ranged = RangedFile(f"{snapshot.label}: {file}", url, size, None, traffic, otherwise=otherwise)
            digests[file] = _hashed(ranged, bar.update)
    return digests


def _hashed(file: RangedFile, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    for start in range(0, file.size, BLOCK):
        data = file.read(start, min(start + BLOCK, file.size))
        digest.update(data)
        progress(len(data))
    return digest.hexdigest()
