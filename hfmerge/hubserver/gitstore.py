"""One Hub repository as a bare git repository: revisions, entries, commits, references."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dulwich.objects import Blob, Commit, ShaFile, Tag, Tree
from dulwich.refs import check_ref_format
from dulwich.repo import Repo

from hfmerge.hubserver.treeedit import TreeEditor


DEFAULT_BRANCH = "refs/heads/main"

_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize ([0-9]{1,18})\n"
)
_POINTER_LIMIT = 200
_HEX = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Pointer:
    """What a Git-LFS pointer file says; `present` is False for an object that was deleted for good."""

    oid: str
    size: int
    pointer_size: int
    present: bool = True


# Whether the repository has the object a pointer names: True, False if it had it and it was deleted, None if not.
Owned = Callable[[Pointer], "bool | None"]


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; `size` is that of the content, not of its LFS pointer."""

    path: str
    oid: str
    is_folder: bool
    size: int
    lfs: Pointer | None


@dataclass(frozen=True)
class LogEntry:
    """One commit of a history."""

    oid: str
    title: str
    body: str
    author: str
    time: int


def pointer_text(oid: str, size: int) -> bytes:
    """The pointer file of an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def parse_pointer(data: bytes) -> Pointer | None:
    """The pointer in a file, None if the file is an ordinary one."""
    match = _POINTER.fullmatch(data) if len(data) <= _POINTER_LIMIT else None
    return Pointer(match[1].decode(), int(match[2]), len(data)) if match else None


def valid_ref(name: str) -> bool:
    """Whether git accepts the full reference name."""
    return check_ref_format(name.encode("utf-8", "replace"))


class GitStore:
    """A bare repository, opened for one request. Histories are linear here: merges are squashed.

    Anybody can write a text that reads as a pointer to somebody else's object. So a pointer counts as one only if
    `owned` knows its object; any other is an ordinary small file. By default none counts.
    """

    def __init__(self, path: Path, owned: Owned = lambda pointer: None):
        self._repo = Repo(str(path), bare=True)
        self._owned = owned
        self.objects = self._repo.object_store
        self._folders: dict[bytes, dict[bytes, tuple[int, bytes]]] = {}
        self._blobs: dict[bytes, tuple[int, Pointer | None]] = {}

    @classmethod
    def create(cls, path: Path) -> GitStore:
        """An empty repository in a new folder."""
        path.mkdir(parents=True)
        Repo.init_bare(str(path), default_branch=b"main", object_format="sha1").close()
        return cls(path)

    def __enter__(self) -> GitStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self._repo.close()

    # Revisions

    def resolve(self, revision: str) -> str | None:
        """The commit a branch, tag, full reference, commit id (7 to 40 hex digits) or `HEAD` names."""
        if revision == "HEAD":
            revision = DEFAULT_BRANCH
        names = [revision] if revision.startswith("refs/") else [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        for name in names:
            if (commit := self.ref(name)) is not None:
                return commit
        if _HEX.fullmatch(revision):
            found = [oid for oid in self.objects.iter_prefix(revision.encode()) if self._is_commit(oid)]
            if len(found) == 1:
                return found[0].decode()
        return None

    def ref(self, name: str) -> str | None:
        """The commit a full reference points to, through annotated tags."""
        if not valid_ref(name):
            return None
        try:
            oid = self._repo.refs[name.encode()]
        except (KeyError, NotADirectoryError, IsADirectoryError):
            return None
        target: ShaFile = self.objects[oid]
        while isinstance(target, Tag):
            target = self.objects[target.object[1]]
        return target.id.decode()

    def refs(self, prefix: str) -> list[tuple[str, str]]:
        """Full names under a prefix (`refs/heads/`) and their commits."""
        names = sorted(name.decode() for name in self._repo.refs.allkeys() if name.startswith(prefix.encode()))
        return [(name, commit) for name in names if (commit := self.ref(name)) is not None]

    def set_ref(self, name: str, commit: str) -> None:
        """Point a reference to a commit, atomically."""
        self._repo.refs[name.encode()] = commit.encode()

    def tag(self, name: str, commit: str, message: str, author: str) -> None:
        """Make a tag; annotated if there is a message."""
        if message:
            tag = Tag()
            tag.name = name.encode()
            tag.object = (Commit, commit.encode())
            tag.message = message.encode()
            tag.tagger = _person(author)
            tag.tag_time, tag.tag_timezone = int(time.time()), 0
            self.objects.add_object(tag)
            commit = tag.id.decode()
        self.set_ref(f"refs/tags/{name}", commit)

    def delete_ref(self, name: str) -> None:
        """Delete a reference."""
        del self._repo.refs[name.encode()]

    # Entries

    def tree_id(self, commit: str) -> bytes:
        """The root tree of a commit."""
        return self._commit(commit).tree

    def lookup(self, commit: str, path: str) -> Entry | None:
        """The entry at a path; the root is the empty path."""
        found = self._find(self.tree_id(commit), path)
        if found is None:
            return None
        mode, oid = found
        return self._entry(path, mode, oid)

    def entries(
        self, commit: str, folder: str = "", *, recursive: bool = False, start: int = 0, stop: int | None = None
    ) -> Iterator[Entry]:
        """The entries under a folder from `start` to before `stop`, in git's order, folders before what is in them."""
        found = self._find(self.tree_id(commit), folder)
        if found is not None and stat.S_ISDIR(found[0]):
            # Only the wanted ones are described: that reads each file to know its size.
            for path, mode, oid in islice(
                self._walk(found[1], f"{folder}/" if folder else "", recursive), start, stop
            ):
                yield self._entry(path, mode, oid)

    def recall(self, entries: Sequence[Entry]) -> None:
        """Take over what an earlier commit's entries said, so that only new files are read to know their size.

        Whether a pointer counts is asked anew; a small file that did not count as one is read again.
        """
        for entry in entries:
            if entry.lfs is not None or entry.size > _POINTER_LIMIT:
                self._blobs[entry.oid.encode()] = (entry.size, entry.lfs)

    def read(self, oid: str) -> bytes:
        """The bytes of a blob: for an LFS file, its pointer."""
        return self.objects.get_raw(oid.encode())[1]

    # Commits

    def add_blob(self, data: bytes) -> bytes:
        """Store bytes, return the blob's id."""
        blob = Blob.from_string(data)
        self.objects.add_object(blob)
        return blob.id

    def edit(self, commit: str | None) -> TreeEditor:
        """An editor on the tree of a commit, or on an empty one."""
        return TreeEditor(self.objects, None if commit is None else self.tree_id(commit))

    def commit(self, tree: bytes, parent: str | None, author: str, message: str) -> str:
        """Store a commit, return its id; no reference moves."""
        commit = Commit()
        commit.tree = tree
        commit.parents = [] if parent is None else [parent.encode()]
        commit.author = commit.committer = _person(author)
        commit.author_time = commit.commit_time = int(time.time())
        commit.author_timezone = commit.commit_timezone = 0
        commit.encoding = b"UTF-8"
        commit.message = message.encode()
        self.objects.add_object(commit)
        return commit.id.decode()

    def history(self, commit: str) -> Iterator[LogEntry]:
        """The commit and its ancestors."""
        current: str | None = commit
        while current is not None:
            found = self._commit(current)
            title, _, body = found.message.decode("utf-8", "replace").partition("\n")
            author = found.author.decode("utf-8", "replace").rpartition(" <")[0]
            yield LogEntry(current, title.strip(), body.strip(), author, found.commit_time)
            current = found.parents[0].decode() if found.parents else None

    def common_ancestor(self, one: str, other: str) -> str | None:
        """The newest commit two histories share."""
        known = {entry.oid: None for entry in self.history(one)}
        return next((entry.oid for entry in self.history(other) if entry.oid in known), None)

    def last_changes(self, commit: str, paths: Sequence[str]) -> dict[str, LogEntry]:
        """For each path, the newest commit that changed it."""
        wanted = {path: self._find(self.tree_id(commit), path) for path in paths}
        found: dict[str, LogEntry] = {}
        previous: LogEntry | None = None
        for entry in self.history(commit):
            if previous is not None and self.tree_id(entry.oid) != self.tree_id(previous.oid):
                for path, value in list(wanted.items()):
                    if self._find(self.tree_id(entry.oid), path) != value:
                        found[path] = previous
                        del wanted[path]
            previous = entry
            if not wanted:
                break
        if previous is not None:
            found.update(dict.fromkeys(wanted, previous))
        return found

    # Internals

    def _commit(self, oid: str) -> Commit:
        found = self.objects[oid.encode()]
        assert isinstance(found, Commit)
        return found

    def _tree(self, oid: bytes) -> Tree:
        found = self.objects[oid]
        assert isinstance(found, Tree)
        return found

    def _is_commit(self, oid: bytes) -> bool:
        return isinstance(self.objects[oid], Commit)

    def _items(self, tree: bytes) -> dict[bytes, tuple[int, bytes]]:
        """The entries of a tree in git's order; read once, as a history meets the same trees again and again."""
        if tree not in self._folders:
            self._folders[tree] = {item.path: (item.mode, item.sha) for item in self._tree(tree).iteritems()}
        return self._folders[tree]

    def _find(self, tree: bytes, path: str) -> tuple[int, bytes] | None:
        mode, oid = stat.S_IFDIR, tree
        for part in path.encode("utf-8", "replace").split(b"/") if path else []:
            if not stat.S_ISDIR(mode) or part not in self._items(oid):
                return None
            mode, oid = self._items(oid)[part]
        return mode, oid

    def _walk(self, tree: bytes, prefix: str, recursive: bool) -> Iterator[tuple[str, int, bytes]]:
        for name, (mode, oid) in self._items(tree).items():
            path = prefix + name.decode("utf-8", "replace")
            yield path, mode, oid
            if recursive and stat.S_ISDIR(mode):
                yield from self._walk(oid, f"{path}/", recursive)

    def _entry(self, path: str, mode: int, oid: bytes) -> Entry:
        if stat.S_ISDIR(mode):
            return Entry(path, oid.decode(), True, 0, None)
        if oid not in self._blobs:
            data = self.read(oid.decode())
            self._blobs[oid] = (len(data), parse_pointer(data))
        size, pointer = self._blobs[oid]
        present = None if pointer is None else self._owned(pointer)
        pointer = replace(pointer, present=present) if pointer is not None and present is not None else None
        return Entry(path, oid.decode(), False, pointer.size if pointer else size, pointer)


def _person(user: str) -> bytes:
    # The client reads the user's name back from the commit, so it stands where git wants a full name.
    return f"{user} <{user}@localhost>".encode()
