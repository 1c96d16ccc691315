"""What is not git: repositories and their settings, redirects, discussions, rights on objects, access lists."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError


_SCHEMA = """
CREATE TABLE IF NOT EXISTS repos (
    rid TEXT PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL, key TEXT NOT NULL, owner TEXT NOT NULL,
    private INTEGER NOT NULL, gated TEXT, created TEXT NOT NULL, UNIQUE (kind, key));
CREATE TABLE IF NOT EXISTS moved (
    kind TEXT NOT NULL, key TEXT NOT NULL, rid TEXT NOT NULL REFERENCES repos (rid) ON DELETE CASCADE,
    PRIMARY KEY (kind, key));
CREATE TABLE IF NOT EXISTS objects (
    rid TEXT NOT NULL REFERENCES repos (rid) ON DELETE CASCADE, oid TEXT NOT NULL, PRIMARY KEY (rid, oid));
CREATE TABLE IF NOT EXISTS deleted (
    rid TEXT NOT NULL REFERENCES repos (rid) ON DELETE CASCADE, oid TEXT NOT NULL, PRIMARY KEY (rid, oid));
CREATE TABLE IF NOT EXISTS facts (
    rid TEXT PRIMARY KEY REFERENCES repos (rid) ON DELETE CASCADE, sha TEXT NOT NULL, document TEXT NOT NULL,
    siblings TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS access (
    rid TEXT NOT NULL REFERENCES repos (rid) ON DELETE CASCADE, user TEXT NOT NULL, status TEXT NOT NULL,
    time TEXT NOT NULL, PRIMARY KEY (rid, user));
CREATE TABLE IF NOT EXISTS discussions (
    rid TEXT NOT NULL REFERENCES repos (rid) ON DELETE CASCADE, num INTEGER NOT NULL, pull INTEGER NOT NULL,
    title TEXT NOT NULL, status TEXT NOT NULL, author TEXT NOT NULL, created TEXT NOT NULL, base TEXT NOT NULL,
    merged TEXT, PRIMARY KEY (rid, num));
CREATE TABLE IF NOT EXISTS events (
    rid TEXT NOT NULL, num INTEGER NOT NULL, id TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (rid, num, id),
    FOREIGN KEY (rid, num) REFERENCES discussions (rid, num) ON DELETE CASCADE);
"""


@dataclass(frozen=True)
class RepoRow:
    """One repository: `rid` names its folder for ever, `id` is what users call it."""

    rid: str
    kind: str
    id: str
    owner: str
    private: bool
    gated: str | None
    created: str

    @property
    def namespace(self) -> str:
        """The part of the id before the slash."""
        return self.id.split("/")[0]


@dataclass(frozen=True)
class DiscussionRow:
    """One discussion or pull request; `base` is the full name of the branch a pull request goes to."""

    num: int
    pull: bool
    title: str
    status: str
    author: str
    created: str
    base: str
    merged: str | None


class Database:
    """The SQLite file, opened by one server at a time and used by one thread at a time."""

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.2)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            self._connection.execute("BEGIN EXCLUSIVE")
            self._connection.execute("COMMIT")
            self._connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise HfMergeError(
                f"{path}: cannot be opened ({error}); stop the other server that uses this folder, or choose another"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:  # Ctrl-C too must not leave half a transaction
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    def _rows(self, query: str, *arguments: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, arguments).fetchall()

    def _write(self, query: str, *arguments: Any) -> None:
        with self.transaction() as connection:
            connection.execute(query, arguments)

    # Repositories

    def repo(self, kind: str, repo_id: str) -> RepoRow | None:
        """A repository by id, in any case."""
        rows = self._rows("SELECT * FROM repos WHERE kind = ? AND key = ?", kind, repo_id.lower())
        return _repo(rows[0]) if rows else None

    def repo_by_rid(self, rid: str) -> RepoRow | None:
        """A repository by its unchanging name."""
        rows = self._rows("SELECT * FROM repos WHERE rid = ?", rid)
        return _repo(rows[0]) if rows else None

    def moved(self, kind: str, repo_id: str) -> RepoRow | None:
        """The repository that had this id before it was moved."""
        rows = self._rows(
            "SELECT repos.* FROM moved JOIN repos USING (rid) WHERE moved.kind = ? AND moved.key = ?",
            kind,
            repo_id.lower(),
        )
        return _repo(rows[0]) if rows else None

    def repos(self, kind: str | None = None) -> list[RepoRow]:
        """All repositories, the newest first."""
        rows = self._rows("SELECT * FROM repos ORDER BY created DESC, rid")
        return [_repo(row) for row in rows if kind is None or row["kind"] == kind]

    def add_repo(self, row: RepoRow) -> bool:
        """Register a repository; False if its id is taken."""
        values = (row.rid, row.kind, row.id, row.id.lower(), row.owner, row.private, row.gated, row.created)
        try:
            with self.transaction() as connection:
                connection.execute("INSERT INTO repos VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
                connection.execute("DELETE FROM moved WHERE kind = ? AND key = ?", (row.kind, row.id.lower()))
        except sqlite3.IntegrityError:
            return False
        return True

    def move_repo(self, row: RepoRow, new_id: str) -> bool:
        """Give a repository another id and leave a redirect; False if the id is taken."""
        try:
            with self.transaction() as connection:
                connection.execute("UPDATE repos SET id = ?, key = ? WHERE rid = ?", (new_id, new_id.lower(), row.rid))
                old = (row.kind, row.id.lower(), row.rid)
                connection.execute("INSERT OR REPLACE INTO moved VALUES (?, ?, ?)", old)
                connection.execute("DELETE FROM moved WHERE kind = ? AND key = ?", (row.kind, new_id.lower()))
        except sqlite3.IntegrityError:
            return False
        return True

    def change_repo(self, rid: str, *, private: bool, gated: str | None) -> None:
        """Set visibility and gating."""
        self._write("UPDATE repos SET private = ?, gated = ? WHERE rid = ?", private, gated, rid)

    def delete_repo(self, rid: str) -> None:
        """Forget a repository and all that belongs to it."""
        self._write("DELETE FROM repos WHERE rid = ?", rid)

    # Large objects

    def link(self, rid: str, oid: str) -> None:
        """Let a repository refer to an object."""
        with self.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO objects VALUES (?, ?)", (rid, oid))
            connection.execute("DELETE FROM deleted WHERE rid = ? AND oid = ?", (rid, oid))
            # A pointer that stood there before its object may mean something now.
            connection.execute("UPDATE facts SET sha = '' WHERE rid = ?", (rid,))

    def linked(self, rid: str, oid: str) -> bool:
        """Whether a repository may refer to an object: it was uploaded to it, not only known by its hash."""
        return bool(self._rows("SELECT 1 FROM objects WHERE rid = ? AND oid = ?", rid, oid))

    def unlink(self, rid: str, oid: str) -> None:
        """Take an object from a repository, and remember that it was there."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM objects WHERE rid = ? AND oid = ?", (rid, oid))
            connection.execute("INSERT OR IGNORE INTO deleted VALUES (?, ?)", (rid, oid))
            connection.execute("UPDATE facts SET sha = '' WHERE rid = ?", (rid,))

    def objects(self, rid: str) -> list[str]:
        """All objects a repository may refer to, in order."""
        return [row["oid"] for row in self._rows("SELECT oid FROM objects WHERE rid = ? ORDER BY oid", rid)]

    def deleted(self, rid: str) -> frozenset[str]:
        """All objects that were taken from a repository."""
        return frozenset(row["oid"] for row in self._rows("SELECT oid FROM deleted WHERE rid = ?", rid))

    def linked_anywhere(self) -> frozenset[str]:
        """All objects some repository may refer to."""
        return frozenset(row["oid"] for row in self._rows("SELECT DISTINCT oid FROM objects"))

    # Facts about the newest commit of main

    def put_facts(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        """Remember what was found out: commit, document, files and `rid`; of a repository that is gone, nothing."""
        if rows:
            with self.transaction() as connection:
                query = "INSERT OR REPLACE INTO facts SELECT rid, ?, ?, ? FROM repos WHERE rid = ?"
                connection.executemany(query, rows)

    def facts(self, kind: str) -> dict[str, tuple[str, str, str]]:
        """Of each repository: the commit that is remembered, the document about it, and its files."""
        rows = self._rows("SELECT facts.* FROM facts JOIN repos USING (rid) WHERE kind = ?", kind)
        return {row["rid"]: (row["sha"], row["document"], row["siblings"]) for row in rows}

    def facts_of(self, rid: str) -> tuple[str, str, str] | None:
        """The commit that is remembered of one repository, the document about it, and its files."""
        rows = self._rows("SELECT sha, document, siblings FROM facts WHERE rid = ?", rid)
        return (rows[0]["sha"], rows[0]["document"], rows[0]["siblings"]) if rows else None

    # Gated access

    def set_access(self, rid: str, user: str, status: str, time: str) -> None:
        """Record an access request: `accepted`, `rejected` or `pending`."""
        self._write("INSERT OR REPLACE INTO access VALUES (?, ?, ?, ?)", rid, user, status, time)

    def access_of(self, rid: str, user: str) -> str | None:
        """The status of a user's request; None if they never asked."""
        rows = self._rows("SELECT status FROM access WHERE rid = ? AND user = ?", rid, user)
        return str(rows[0]["status"]) if rows else None

    def requesters(self, rid: str) -> list[str]:
        """Everybody who asked, or was let in."""
        return [row["user"] for row in self._rows("SELECT user FROM access WHERE rid = ? ORDER BY user", rid)]

    def access(self, rid: str, status: str) -> list[tuple[str, str]]:
        """Users with that status and since when."""
        rows = self._rows("SELECT user, time FROM access WHERE rid = ? AND status = ? ORDER BY user", rid, status)
        return [(row["user"], row["time"]) for row in rows]

    # Discussions

    def add_discussion(self, rid: str, row: DiscussionRow) -> None:
        """Open a discussion; its number must be `next_discussion`, taken under the lock of the repository."""
        self._write(
            "INSERT INTO discussions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(rid, row.num, row.pull, row.title, row.status, row.author, row.created, row.base, row.merged),
        )

    def next_discussion(self, rid: str) -> int:
        """The number of the next discussion."""
        return 1 + self._rows("SELECT COALESCE(MAX(num), 0) AS n FROM discussions WHERE rid = ?", rid)[0]["n"]

    def discussion(self, rid: str, num: int) -> DiscussionRow | None:
        """One discussion."""
        rows = self._rows("SELECT * FROM discussions WHERE rid = ? AND num = ?", rid, num)
        return _discussion(rows[0]) if rows else None

    def discussions(self, rid: str) -> list[DiscussionRow]:
        """All discussions in the order of their numbers."""
        return [_discussion(row) for row in self._rows("SELECT * FROM discussions WHERE rid = ? ORDER BY num", rid)]

    def change_discussion(self, rid: str, num: int, *, title: str, status: str, merged: str | None) -> None:
        """Set what can change about a discussion."""
        self._write(
            "UPDATE discussions SET title = ?, status = ?, merged = ? WHERE rid = ? AND num = ?",
            *(title, status, merged, rid, num),
        )

    def put_event(self, rid: str, num: int, event: dict[str, Any]) -> None:
        """Add an event to a discussion, or replace the one with the same id in its place."""
        self._write(
            "INSERT INTO events VALUES (?, ?, ?, ?)"
            " ON CONFLICT (rid, num, id) DO UPDATE SET document = excluded.document",
            *(rid, num, event["id"], json.dumps(event)),
        )

    def events(self, rid: str, num: int) -> list[dict[str, Any]]:
        """The events of a discussion, the oldest first."""
        rows = self._rows("SELECT document FROM events WHERE rid = ? AND num = ? ORDER BY rowid", rid, num)
        return [json.loads(row["document"]) for row in rows]


def _repo(row: sqlite3.Row) -> RepoRow:
    return RepoRow(
        row["rid"], row["kind"], row["id"], row["owner"], bool(row["private"]), row["gated"], row["created"]
    )


def _discussion(row: sqlite3.Row) -> DiscussionRow:
    return DiscussionRow(
        *(row["num"], bool(row["pull"]), row["title"], row["status"], row["author"], row["created"], row["base"]),
        merged=row["merged"],
    )
