"""Checking a store: every git object and large object against its name, the database against git, what was left."""

from __future__ import annotations

import hashlib
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dulwich.errors import NotGitRepository
from dulwich.repo import Repo

from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, parse_pointer
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.walking import walk


_OID = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
# What a running server may still be working on is younger than this.
_WORKING_SECONDS = 3600.0


@dataclass(frozen=True)
class Fault:
    """Something wrong, in `where`; `harmless` is what a server makes and removes in passing."""

    where: str
    what: str
    harmless: bool = False
    repaired: bool = False

    def line(self) -> str:
        """The fault as one line of text."""
        mark = "repaired" if self.repaired else "left over" if self.harmless else "fault"
        return f"{mark}: {self.where}: {self.what}"


def check_store(hub: Hub, *, repair: bool, running: bool) -> list[dict[str, Any]]:
    """Check everything; slow, as every byte is read.

    Args:
        hub: the store.
        repair: remove what was left, and put large objects with wrong bytes aside, so that they can be sent again.
        running: a server is working on the store: what it may be working on is no fault.
    """
    faults = [*_database(hub), *_objects(hub, repair)]
    for row in hub.database.repos():
        found = list(_repository(hub, row))
        # One that was deleted meanwhile has no faults.
        faults += found if hub.database.repo_by_rid(row.rid) is not None else []
    faults += _left_over(hub, repair, running)
    return [asdict(fault) | {"line": fault.line()} for fault in faults]


def _database(hub: Hub) -> Iterator[Fault]:
    with hub.database.transaction() as connection:
        said = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
        torn = connection.execute("PRAGMA foreign_key_check").fetchall()
    for line in said:
        if line != "ok":
            yield Fault("hub.sqlite", line)
    # Several processes may have this one open.
    with closing(sqlite3.connect(hub.root / "people.sqlite", timeout=10)) as people:
        try:
            people_said = [str(row[0]) for row in people.execute("PRAGMA integrity_check")]
        except sqlite3.DatabaseError as error:
            people_said = [str(error)]
    for line in people_said:
        if line != "ok":
            yield Fault("people.sqlite", line)
    for row in torn:
        yield Fault("hub.sqlite", f"a row of {row[0]} belongs to none of {row[2]}")


def _objects(hub: Hub, repair: bool) -> Iterator[Fault]:
    linked = hub.database.linked_anywhere()
    for path in sorted(hub.blobs.root.glob("*/*/*")):
        name = f"objects/{path.name}"
        if not _OID.fullmatch(path.name) or path != hub.blobs.path(path.name):
            yield Fault(str(path.relative_to(hub.root)), "is no large object")
        elif (digest := _sha256(path)) != path.name:
            if repair:
                _put_aside(hub, path)
            yield Fault(name, f"has other bytes: their SHA-256 is {digest}" + (", put aside" if repair else ""))
        elif path.name not in linked:
            yield Fault(name, "belongs to no repository; the next start of the server removes it", harmless=True)


def _put_aside(hub: Hub, path: Path) -> None:
    folder = hub.root / "damaged"
    folder.mkdir(exist_ok=True)
    path.replace(folder / path.name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _repository(hub: Hub, row: RepoRow) -> Iterator[Fault]:
    name = f"{row.kind} {row.id}"
    for oid in hub.database.objects(row.rid):
        if hub.blobs.size(oid) is None:
            yield Fault(name, f"the large object {oid} is missing; send the file again")
    if not hub.git_path(row.rid).is_dir():
        yield Fault(name, f"its git repository is gone: {hub.git_path(row.rid)}")
        return
    try:
        repo = Repo(str(hub.git_path(row.rid)), bare=True)
    except (NotGitRepository, OSError) as error:
        yield Fault(name, f"its git repository cannot be opened ({type(error).__name__}: {error})")
        return
    try:
        refs = {ref.decode("utf-8", "replace"): oid.decode() for ref, oid in repo.get_refs().items()}
        if DEFAULT_BRANCH not in refs:
            yield Fault(name, f"{DEFAULT_BRANCH} is missing")
        linked, sizes = frozenset(hub.database.objects(row.rid)), {}
        for found in walk(repo.object_store, refs.values()):
            if found.fault is not None:
                place = f" ({found.path})" if found.path else ""
                yield Fault(name, f"{found.kind} {found.oid}{place} {found.fault}")
            elif found.kind == "file" and (pointer := parse_pointer(found.data)) is not None:
                if pointer.oid in linked:
                    sizes[pointer.oid] = (found.path, pointer.size)
    finally:
        repo.close()
    for oid, (path, size) in sizes.items():
        if hub.blobs.size(oid) not in (None, size):
            yield Fault(name, f"{path}: the large object {oid} has {hub.blobs.size(oid)} bytes, not {size}")
    yield from _discussions(hub, row, name, refs)


def _discussions(hub: Hub, row: RepoRow, name: str, refs: dict[str, str]) -> Iterator[Fault]:
    for discussion in hub.database.discussions(row.rid):
        if discussion.pull and f"refs/pr/{discussion.num}" not in refs:
            yield Fault(name, f"pull request {discussion.num} has no reference refs/pr/{discussion.num}")
        try:
            hub.database.events(row.rid, discussion.num)
        except ValueError as error:
            yield Fault(name, f"discussion {discussion.num} cannot be read ({error})")


def _left_over(hub: Hub, repair: bool, running: bool) -> Iterator[Fault]:
    known = [row.rid for row in hub.database.repos()]
    born = time.time() - _WORKING_SECONDS if running else float("inf")

    def old(path: Path) -> bool:
        try:
            return path.lstat().st_mtime < born
        except FileNotFoundError:
            return False  # the server has just removed it

    for path in sorted((hub.root / "repos").glob("*")):
        if path.name.removesuffix(".git") not in known and old(path):
            yield _removed(hub, path, "belongs to no repository", repair)
    for path in sorted((hub.root / "repos").glob("*/**/*.lock")):
        if old(path):
            yield _removed(hub, path, "a lock that a killed server left; git refuses to write beside it", repair)
    for path in sorted(hub.blobs.temporary.glob("*")):
        if old(path):
            yield _removed(hub, path, "an upload that never ended", repair)
    if not running and hub.xorbs.is_dir():
        for path in sorted(hub.xorbs.glob("*")):
            yield _removed(hub, path, "chunks of finished uploads", repair, harmless=True)


def _removed(hub: Hub, path: Path, what: str, repair: bool, *, harmless: bool = False) -> Fault:
    if repair:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return Fault(str(path.relative_to(hub.root)), what, harmless, repair)
