"""A model's reference as written, and the snapshot that it is pinned to.

The four nouns of a model: `ModelRef` (as written), `Snapshot` (pinned to one state), `Model` (described, in
`checkpoint/model.py`), `Delta` (its task vectors can be read, in `checkpoint/delta.py`).

`org/name`, `org/name@revision`, `org/name/folder@revision`, a folder, an `hf://` URI, or `base+adapter` of any two of
these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hfmerge.errors import CorruptFileError, SourceError
from hfmerge.hashing import is_digest


_SEGMENT = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,255}")
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelRef:
    """Where a model lies, as written: a Hub repository with the asked revision, or a folder."""

    text: str
    repo_id: str | None
    revision: str | None
    folder: Path | None
    subfolder: str | None = None

    @property
    def name(self) -> str:
        """Of a Hub model: the repository, and the subfolder in it."""
        assert self.repo_id is not None
        return f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id


@dataclass(frozen=True)
class FileInfo:
    """One file of a snapshot: bytes, and the digests known without reading it."""

    size: int
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A reference pinned to one state: a commit on the Hub, or a folder with its files' sizes.

    Attributes:
        name: repository ID with the subfolder in it, or the folder's own name (never its path).
        commit: 40 hex digits, None for a folder.
        folder: the folder; of a commit, that of the copy that is read in its place; None on the Hub.
        files: path in the repository, or in its subfolder -> what is known of the file.
        offline: the Hub could not be asked, and `files` are those that the cache holds.
        vanished: the Hub was asked and no longer has, or shows, this commit; `files` are those that the cache holds.
        subfolder: the folder of the repository that is the model; None: the whole repository.
    """

    ref: ModelRef
    name: str
    commit: str | None
    folder: Path | None
    files: Mapping[str, FileInfo] = field(repr=False)
    offline: bool = False
    vanished: bool = False
    subfolder: str | None = None

    @property
    def repo_id(self) -> str:
        """Of a snapshot of the Hub: its repository."""
        return self.name.removesuffix(f"/{self.subfolder}") if self.subfolder else self.name

    def path(self, file: str) -> str:
        """The path of one of `files` in the repository."""
        return f"{self.subfolder}/{file}" if self.subfolder else file

    @property
    def label(self) -> str:
        """Short text for messages and tables: `org/name@0123abcd`, or the folder as written."""
        return f"{self.name}@{self.commit[:8]}" if self.commit else self.ref.text


def is_segment(name: object) -> bool:
    """Whether a value can be the name of one file or folder, wherever it comes from."""
    return isinstance(name, str) and _SEGMENT.fullmatch(name) is not None and name not in (".", "..")


def is_path(name: object) -> bool:
    """Whether a value can be the path of a file in a repository or a folder, and so does not leave it."""
    return isinstance(name, str) and all(is_segment(part) for part in name.split("/"))


def checked_path(name: str, where: str) -> str:
    """Check the path of a file in a repository that somebody else wrote, before the file is read or written.

    Raises:
        CorruptFileError: the path leads out of the repository.
    """
    if not is_path(name):
        raise CorruptFileError(
            f"{where}: names the file {name!r}, which is not a path in a repository; do not use it."
        )
    return name


def is_commit(value: object) -> bool:
    """Whether a value is the full name of a commit."""
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def is_hub_id(name: object) -> bool:
    """Whether a value is a repository's name, and so can be a part of a path and of an address."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_identity(value: object) -> bool:
    """Whether a value names a model as ledgers do: `org/name@COMMIT` on the Hub, `name@sha256:DIGEST` of a folder."""
    if not isinstance(value, str):
        return False
    name, folder, digest = value.rpartition("@sha256:")
    if folder:
        return is_segment(name) and is_digest(digest)
    name, _, commit = value.rpartition("@")
    repo_id, subfolder = split_name(name)
    return is_hub_id(repo_id) and is_commit(commit) and (subfolder is None or is_path(subfolder))


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and subfolder of `org/name` or `org/name/folder`."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


def hub_ref(name: str, revision: str | None, text: str | None = None) -> ModelRef:
    """The reference to a model on the Hub, by the name that ledgers give it: `org/name` or `org/name/folder`.

    Args:
        text: what messages call it; None: its name.
    """
    repo_id, subfolder = split_name(name)
    return ModelRef(text or name, repo_id, revision, None, subfolder)


def in_subfolder(text: str, subfolder: str) -> str:
    """The reference to a folder inside of what a reference names.

    Raises:
        ValueError: the folder leads out of it, or no reference can name it.
    """
    inside = subfolder.strip("/") if not subfolder.startswith("/") else subfolder
    if not is_path(inside) or "@" in inside or "+" in inside:
        raise ValueError(f"must be a folder inside of the model's repository, not {subfolder!r}")
    if "+" in text:
        raise ValueError("cannot stand beside base+adapter; write the folder into the reference, org/name/folder")
    if text.startswith((".", "/", "~")) or Path(text).is_dir():
        return f"{text.rstrip('/')}/{inside}"
    start, at, revision = text.partition("@")
    if start.removeprefix("hf://").count("/") == 0:
        raise ValueError("needs the repository's owner; write the model as org/name")
    return f"{start.rstrip('/')}/{inside}{at}{revision}"


def distinct_names(names: Iterable[str]) -> list[str]:
    """Names that differ as folders do: one that an earlier model has gets the next free number, such as `org/a-2`.

    A name follows from the names before it alone. So it stays when more models join.
    """
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        wanted, number = name, 1
        while (mark := wanted.replace("/", "--").lower()) in taken:
            number += 1
            wanted = f"{name}-{number}"
        taken.add(mark)
        found.append(wanted)
    return found


def parse_ref(text: str) -> list[ModelRef]:
    """The model, or the two models of `base+adapter`, that a reference names.

    Raises:
        SourceError: not a folder and not a valid repository ID.
    """
    text = text.strip()
    if not text:
        raise SourceError("a model's name is empty; write a Hub ID or a folder.")
    if "+" in text and not _path(text)[1]:
        base, _, adapter = text.partition("+")
        return [_parse_one(base), _parse_one(adapter)]
    return [_parse_one(text)]


def _parse_one(text: str) -> ModelRef:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    if text.startswith("hf://"):
        try:
            uri = parse_hf_uri(text)
        except HfUriError as error:
            raise SourceError(f"{text}: {error}") from error
        if uri.type != "model":
            raise SourceError(f"{text}: name a model repository, `hf://org/name@revision`.")
        return _on_hub(text, uri.id, uri.revision, (uri.path_in_repo or "").strip("/") or None)
    path, there = _path(text)
    if (there and path.is_dir()) or text.startswith((".", "/", "~")):
        return ModelRef(text, None, None, path)
    name, _, revision = text.partition("@")
    repo_id, subfolder = split_name(name.removesuffix("/"))
    return _on_hub(text, repo_id, revision or None, subfolder)


def _on_hub(text: str, repo_id: str, revision: str | None, subfolder: str | None) -> ModelRef:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SourceError(f"{text}: neither a folder here nor a Hub ID `org/name[/folder][@revision]`.") from error
    if subfolder is not None and ("/" not in repo_id or not is_path(subfolder) or {"@", "+"} & {*subfolder}):
        raise SourceError(
            f"{text}: {subfolder!r} cannot be a folder in a repository; write `org/name/folder[@revision]`."
        )
    return ModelRef(text, repo_id, revision, None, subfolder)


def _path(text: str) -> tuple[Path, bool]:
    """A reference as a path, and whether something is there.

    Raises:
        SourceError: it can be no path of this machine, and so is too long for a Hub ID too.
    """
    try:
        path = Path(text).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user's home, a null character
        raise SourceError(f"{text[:200]}: neither a folder here nor a Hub ID ({error.__class__.__name__}).") from error
