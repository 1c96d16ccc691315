"""Data sets: pinned to a commit or to the digest of files, loaded through `datasets`, columns and rows checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.digests import folder_digest
from hfmerge.errors import AccessError, HfMergeError, NotFoundError, OfflineError, SourceError, UnsupportedError
from hfmerge.evaluation.suite import Suite, Task
from hfmerge.hashing import sha256_file
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.download import pin
from hfmerge.hub.reference import parse_ref
from hfmerge.validation.folders import files_in
from hfmerge.validation.strict_yaml import dump_yaml
from hfmerge.validation.values import suggestion


if TYPE_CHECKING:
    from datasets import Dataset

BUFFER = 10_000
"""Rows among which a streamed sample is shuffled."""
LOADERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
"""Builder of `datasets` for a single file, by its ending."""


@dataclass(frozen=True)
class DataPin:
    """A data set fixed to one state.

    Attributes:
        name: repository ID, or the name of the file or folder.
        commit: 40 hex digits on the Hub; None for files.
        digest: the commit, or SHA-256 of the files.
        path: of the file or folder; None on the Hub.
        offline: the Hub could not be asked.
    """

    name: str
    commit: str | None
    digest: str
    path: Path | None
    offline: bool = False

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.name}@{self.commit[:8]}" if self.commit else self.name


def pin_data(task: Task, folder: Path) -> DataPin:
    """Fix a task's data set to the commit its revision means now, or to the digests of its files.

    Args:
        folder: where relative paths start.

    Raises:
        SourceError: missing, private, gated, unreachable.
    """
    if task.dataset.startswith((".", "/", "~")):
        path = (folder / Path(task.dataset).expanduser()).resolve()
        if path.is_file():
            return DataPin(path.name, None, sha256_file(path), path)
        if not path.is_dir():
            raise NotFoundError(f"{task.name}: {task.dataset}: no such file or folder beside the suite.")
        files = {name: sha256_file(file) for name, file in files_in(path).items()}
        return DataPin(path.name, None, folder_digest(files), path)
    repo_id, _, revision = task.dataset.partition("@")
    with hub_errors(f"{task.name}: data set {task.dataset}"):
        commit, offline = _commit(repo_id, revision or None)
    return DataPin(repo_id, commit, commit, None, offline)


def _commit(repo_id: str, revision: str | None) -> tuple[str, bool]:
    """The commit of a data set, and whether only the cache could be asked."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    api = hub_api()
    try:
        commit = str(patiently(lambda: api.dataset_info(repo_id, revision=revision)).sha)
    except (ConnectionError, httpx2.TransportError, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        found = api.resolve_revision(repo_id, repo_type="dataset", revision=revision, local_files_only=True)
        return str(found.resolved), True
    if revision != commit:
        # so that the cache knows the branch's commit when the Hub is out of reach; nothing depends on it now
        with contextlib.suppress(RevisionResolutionError):
            api.resolve_revision(repo_id, repo_type="dataset", revision=revision)
    return commit, False


def load_rows(task: Task, pin: DataPin, *, limit: int | None, seed: int) -> Dataset:
    """The rows of a task, as many as asked for: a seeded sample where there are more.

    Raises:
        SourceError: what cannot be loaded, with the reason. HfMergeError: no such split or column, no rows.
    """
    where = f"{task.name} ({pin.label})"
    with data_errors(where):
        rows = _stream(task, pin, limit, seed) if task.stream else _load(task, pin)
    if task.image is not None:
        rows = _undecoded(rows, task.image)
    for column in (*task.text, task.image, task.label, *(choice.partition(".")[0] for choice in task.choices)):
        if column is not None and column not in rows.column_names:
            remedy = suggestion(column, rows.column_names) or f"; it has {', '.join(rows.column_names)}."
            raise HfMergeError(f"{where}: no column {column}{remedy}")
    if not len(rows):
        raise HfMergeError(f"{where}: the split {task.split} has no rows.")
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))
    return rows


def _load(task: Task, pin: DataPin) -> Dataset:
    import datasets

    if pin.path is not None and pin.path.is_file():
        loader = LOADERS.get(pin.path.suffix)
        if loader is None:
            raise UnsupportedError(f"{task.name}: {pin.name}: one of {', '.join(LOADERS)} is needed, or a folder.")
        extra = {"sep": "\t"} if pin.path.suffix == ".tsv" else {}
        return datasets.load_dataset(loader, data_files={task.split: str(pin.path)}, split=task.split, **extra)
    builder = datasets.load_dataset_builder(str(pin.path or pin.name), task.config, revision=pin.commit)
    if pin.commit is not None and builder.hash != pin.commit:
        # without the Hub `datasets` takes whatever commit it has
        raise OfflineError(
            f"{task.name}: {pin.label} is not in the local cache and the Hub cannot be reached; run once online, or "
            "unset HF_HUB_OFFLINE."
        )
    builder.download_and_prepare()
    _check_split(task, pin, list(builder.info.splits or ()))
    return builder.as_dataset(split=task.split)


def _stream(task: Task, pin: DataPin, limit: int | None, seed: int) -> Dataset:
    """The first rows of a shuffled stream, and with them only as much of the data set as they lie in."""
    import datasets

    assert limit is not None
    builder = datasets.load_dataset_builder(str(pin.path or pin.name), task.config, revision=pin.commit)
    splits = list(builder.as_streaming_dataset())
    _check_split(task, pin, splits)
    stream = builder.as_streaming_dataset(split=task.split)
    if task.image is not None:
        stream = _undecoded(stream, task.image)
    rows = list(stream.shuffle(seed=seed, buffer_size=BUFFER).take(limit))
    return datasets.Dataset.from_list(rows, features=stream.features)


def _undecoded(rows: Any, column: str) -> Any:
    """Images stay encoded until their batch is due; files named by a path column become images."""
    import datasets

    if rows.features is not None and column in rows.features:
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _check_split(task: Task, pin: DataPin, splits: list[str]) -> None:
    if splits and task.split not in splits:
        remedy = suggestion(task.split, splits) or f"; it has {', '.join(splits)}."
        raise HfMergeError(f"{task.name} ({pin.label}): no split {task.split}{remedy}")


@contextlib.contextmanager
def data_errors(where: str) -> Iterator[None]:
    """Re-raise what `datasets` raises as one line that names `where` and the remedy."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    def line(error: BaseException) -> str:
        return " ".join(str(error).split())[:300]

    with hub_errors(where):
        try:
            yield
        except DatasetNotFoundError as error:
            if "gated" in str(error):
                raise AccessError(
                    f"{where}: gated; ask for access on its page, then pass a token that may read it: "
                    "`hf auth login`, or HF_TOKEN."
                ) from error
            raise NotFoundError(f"{where}: {line(error)}") from error
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise UnsupportedError(
                f"{where}: is made by a script, which `datasets` no longer runs; use a copy of it in Parquet."
            ) from error
        except StopIteration as error:
            # an empty file of JSON lines
            raise HfMergeError(f"{where}: the data set has no rows.") from error
        except (DatasetsError, ValueError, FileNotFoundError) as error:
            raise SourceError(f"{where}: not loaded: {line(error)}") from error


def limited(task: Task, limit: int | None) -> Task:
    """The task with the smaller of its own limit and the run's."""
    limits = [value for value in (task.limit, limit) if value is not None]
    return dataclasses.replace(task, limit=min(limits)) if limits else task


def pinned_suite(suite: Suite) -> Suite:
    """The suite with commits; data sets that are files get their full path.

    Raises:
        HfMergeError: a data set or head that cannot be reached.
    """
    heads: dict[str, str] = {}
    return dataclasses.replace(suite, tasks=tuple(_pinned(suite, task, heads) for task in suite.tasks))


def suite_text(suite: Suite) -> str:
    """The suite as the YAML that `suite.load_suite` reads."""
    told: dict[str, Any] = {"description": suite.description} if suite.description else {}
    return dump_yaml({"name": suite.name, **told, "tasks": [task.to_dict() for task in suite.tasks]})


def _pinned(suite: Suite, task: Task, heads: dict[str, str]) -> Task:
    dataset, head = task.dataset, task.head
    if dataset:
        found = pin_data(task, suite.folder)
        dataset = f"{found.name}@{found.commit}" if found.path is None else str(found.path)
    if head is not None:
        if head not in heads:
            places = [pin(place) for place in parse_ref(head)]
            heads[head] = "+".join(f"{p.name}@{p.commit}" if p.commit else p.ref.text for p in places)
        head = heads[head]
    return dataclasses.replace(task, dataset=dataset, head=head)
