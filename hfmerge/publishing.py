"""Where the processes of a run write, and how the result gets from there to the Hub in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.disks import find_disks, own_params
from hfmerge.errors import OutputError
from hfmerge.hub import Pushed, ensure_repo, push_folder, upload_weights
from hfmerge.planned import Plan
from hfmerge.runtime import Ranks


if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


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


@dataclass(frozen=True)
class Destination:
    """A repository that a result goes to, and how; the attributes are the arguments of `hub.push_folder`."""

    repo_id: str
    private: bool | None = None
    create_pr: bool = False
    parent_commit: str | None = None

    def push(self, folder: Path, uploaded: Sequence[CommitOperationAdd] = ()) -> Pushed:
        """Publish a folder, and files that other machines have uploaded; see `hub.push_folder` for errors."""
        return push_folder(
            folder,
            self.repo_id,
            private=self.private,
            create_pr=self.create_pr,
            parent_commit=self.parent_commit,
            uploaded=uploaded,
        )


def publish(planned: Plan, folder: Path, ranks: Ranks, destination: Destination) -> Pushed:
    """Publish what a run made, all processes taking part: each machine uploads its own files, rank 0 commits them all.

    Args:
        folder: of this process's disk; that of rank 0 has everything but the weights made on other disks.

    Raises:
        PushError, SourceError: see `hub.push_folder`.
    """
    if ranks.disk_count == 1:
        return ranks.on_main(lambda: destination.push(folder))
    repo_id, create_pr = destination.repo_id, destination.create_pr
    ranks.on_main(lambda: ensure_repo(repo_id, private=destination.private, create_pr=create_pr))
    files = sorted({param.file for param in own_params(planned, ranks)}) if ranks.leads else []
    parts = ranks.together(lambda: upload_weights(folder, files, repo_id, create_pr=create_pr))
    return ranks.on_main(lambda: destination.push(folder, [operation for part in parts for operation in part]))
