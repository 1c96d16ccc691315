"""Pins references to commits, and downloads files into the Hugging Face cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.errors import NotFoundError, OfflineError, SourceError
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.reference import FileInfo, ModelRef, Snapshot, checked_path, is_commit, is_segment
from hfmerge.validation.folders import files_in
from hfmerge.validation.limits import FILES
from hfmerge.validation.values import show


if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def pin(ref: ModelRef, copies: Mapping[str, Path] | None = None) -> Snapshot:
    """Pin a reference to one state: the present commit of its revision, or the present files of its folder.

    Args:
        copies: `org/name@COMMIT` -> folder that is read instead, because the Hub no longer has this commit.

    Raises:
        SourceError: missing, private, gated, unreachable, an unknown revision; a folder with a link out of it.
    """
    if ref.folder is not None:
        if not ref.folder.is_dir():
            raise NotFoundError(f"{ref.text}: no such folder.")
        folder = ref.folder.resolve()
        if not is_segment(folder.name):
            raise SourceError(f"{ref.text}: its name {folder.name!r} cannot be that of a model; rename the folder.")
        files = _held(folder)
        _check_count(files, ref)
        return Snapshot(ref, folder.name, None, folder, files)
    assert ref.repo_id is not None
    copy = (copies or {}).get(f"{ref.name}@{ref.revision}")
    if copy is not None:
        return Snapshot(ref, ref.name, ref.revision, copy, _held(copy))
    with hub_errors(ref.text):
        whole = _asked(ref, ref.repo_id)
    return whole if ref.subfolder is None else _inside(whole, ref.subfolder)


def _inside(whole: Snapshot, subfolder: str) -> Snapshot:
    """A folder of a repository as a model of its own.

    Raises:
        NotFoundError: there is no such folder; names those that hold a model.
    """
    start = f"{subfolder}/"
    files = {name.removeprefix(start): info for name, info in whole.files.items() if name.startswith(start)}
    if not files and whole.offline:
        raise OfflineError(
            f"{whole.ref.text}: {subfolder} is not in the local cache and the Hub cannot be reached; run once online, "
            "or unset HF_HUB_OFFLINE."
        )
    if not files:
        there = model_folders(whole.files)
        todo = f"models lie in {show_some(there)}" if there else "no folder of it holds a model"
        raise NotFoundError(f"{whole.ref.text}: {whole.label} has no folder {subfolder}; {todo}.")
    return dataclasses.replace(whole, name=f"{whole.name}/{subfolder}", files=files, subfolder=subfolder)


def model_folders(files: Iterable[str]) -> list[str]:
    """Folders below the top that hold a full model or an adapter, in order."""
    marks = ("config.json", "adapter_config.json")
    known = set(files)
    folders = {name.rpartition("/")[0] for name in known if "/" in name and name.endswith(_WEIGHTS)}
    return sorted(folder for folder in folders if any(f"{folder}/{mark}" in known for mark in marks))


def show_some(folders: Sequence[str]) -> str:
    """Up to five names of folders from elsewhere, for a message."""
    more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
    return ", ".join(show(folder) for folder in folders[:5]) + more


def _held(folder: Path) -> dict[str, FileInfo]:
    return {name: FileInfo(path.stat().st_size) for name, path in files_in(folder).items()}


def _asked(ref: ModelRef, repo_id: str) -> Snapshot:
    """Commit and files of a repository from the Hub or, if the Hub cannot be reached, from the cache.

    A commit by its full name is the same in the cache, even if its repository was deleted or its history rewritten.
    """
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    api, revision, seconds = hub_api(), ref.revision, constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        info = patiently(
            lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=float(seconds))
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        files = _cached_files(repo_id, str(revision)) if is_commit(revision) else {}
        if not revision or not files:
            raise
        return Snapshot(ref, repo_id, revision, None, files, vanished=True)
    except (ConnectionError, httpx2.TransportError, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        commit = str(api.resolve_revision(repo_id, revision=revision, local_files_only=True).resolved)
        files = _cached_files(repo_id, commit)
        if not files:
            raise
        return Snapshot(ref, repo_id, commit, None, files, offline=True)
    if revision != info.sha:
        # so that the cache knows the branch's commit when the Hub is out of reach; nothing depends on it now
        with contextlib.suppress(RevisionResolutionError):
            api.resolve_revision(repo_id, revision=revision)
    return dataclasses.replace(listed_snapshot(ref, info), name=repo_id)


def listed_snapshot(ref: ModelRef, info: ModelInfo) -> Snapshot:
    """What the Hub tells of a repository, under the name that it has there now.

    Raises:
        SourceError: it lists more files than the limit. CorruptFileError: a path leads out of the repository.
    """
    files = {
        checked_path(item.rfilename, ref.text): FileInfo(
            item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id
        )
        for item in info.siblings or ()
    }
    _check_count(files, ref)
    return Snapshot(ref, info.id, str(info.sha), None, files)


def _check_count(files: Mapping[str, FileInfo], ref: ModelRef) -> None:
    try:
        FILES.check(len(files))
    except ValueError as error:
        raise SourceError(f"{ref.text}: {error}.") from error


def _cached_files(repo_id: str, commit: str) -> dict[str, FileInfo]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshot = (
        Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit
    )
    return {
        path.relative_to(snapshot).as_posix(): FileInfo(path.stat().st_size)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file()
    }


def fetch(snapshot: Snapshot, file: str) -> Path:
    """A file of a snapshot on this machine, downloaded into the Hugging Face cache when it is not there yet.

    Raises:
        SourceError: the file is missing, cannot be reached, or has another length than the Hub lists; or its name is a
            path out of the repository.
    """
    checked_path(file, snapshot.label)
    if snapshot.folder is not None:
        return snapshot.folder / file
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{snapshot.label}: {file}"):
        return Path(
            patiently(
                lambda: hf_hub_download(
                    snapshot.repo_id, snapshot.path(file), revision=snapshot.commit, library_name="hfmerge"
                )
            )
        )


def cached(snapshot: Snapshot, file: str) -> Path | None:
    """The file on this machine if it is there already, else None."""
    checked_path(file, snapshot.label)
    if snapshot.folder is not None:
        return snapshot.folder / file
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(snapshot.repo_id, snapshot.path(file), revision=snapshot.commit)
    return Path(found) if isinstance(found, str) else None
