"""Where the processes of a run write, and how the result gets from there to the Hub in one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hfmerge.disks import find_disks, own_params
from hfmerge.errors import OutputError
from hfmerge.hub import Pushed, open_push, push_folder, upload_weights
from hfmerge.planned import Plan
from hfmerge.runtime import Ranks
from hfmerge.targets import Destination


def with_disks(ranks: Ranks, target: str | Path | None, storage: str) -> Ranks:
    """The processes with a note on which of them write to one disk.

    Args:
        target: folder of the result; None when it only goes to the Hub, from temporary folders.
        storage: see `disks.STORAGE`.

    Raises:
        OutputError: the result is wanted in a folder that not all machines see.
    """
    place = Path(target).absolute().parent if target is not None else Path(tempfile.gettempdir())
    ranks = find_disks(ranks, place, storage)
    if ranks.disk_count > 1 and target is not None:
        raise OutputError(
            f"{target}: the machines of this run share no disk there; choose a folder that all of them see, or name "
            "none and publish with --push-to: each machine then uploads its own files."
        )
    return ranks


def publish(planned: Plan, folder: Path, ranks: Ranks, to: Destination) -> Pushed:
    """Publish what a run made, all processes taking part: each machine uploads its own files, rank 0 commits them all.

    Args:
        folder: of this process's disk; that of rank 0 has everything but the weights made on other disks.

    Raises:
        PushError, SourceError: see `hub.push_folder`.
    """
    if ranks.disk_count == 1:
        return ranks.on_main(lambda: push_folder(folder, to))
    repo_id, create_pr = to.repo_id, to.create_pr
    ranks.on_main(lambda: open_push(folder, to).target.head)
    files = sorted({param.file for param in own_params(planned, ranks)}) if ranks.leads else []
    parts = ranks.together(lambda: upload_weights(folder, files, repo_id, create_pr=create_pr))
    return ranks.on_main(lambda: push_folder(folder, to, [operation for part in parts for operation in part]))
