"""Users, their tokens and organisations: kept beside the store, and changed also while a server runs.

A token is shown once, when it is made; what is kept is its SHA-256. Tokens have 136 random bits, so that a plain hash
cannot be turned back by guessing.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError


# What a member may do, from the least: see the organisation's private repositories; create repositories and write
# those one created; write all of them; add and remove members.
ROLES = ("read", "contributor", "write", "admin")
TOKEN_ROLES = ("read", "write")

_FORMAT = "1"
_NAME = re.compile(r"(?=.{1,94}$)(?!.*(--|\.\.))\w[\w.-]*(?<![.-])", re.ASCII)
# First segments of addresses that mean something else.
_RESERVED = frozenset(
    "api cas cdn models datasets spaces kernels buckets settings login _signed _pages _control".split()
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS users (name TEXT PRIMARY KEY COLLATE NOCASE, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (
    digest TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, user TEXT NOT NULL COLLATE NOCASE
    REFERENCES users (name) ON DELETE CASCADE, label TEXT NOT NULL, role TEXT NOT NULL, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS orgs (name TEXT PRIMARY KEY COLLATE NOCASE, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (
    org TEXT NOT NULL COLLATE NOCASE REFERENCES orgs (name) ON DELETE CASCADE,
    user TEXT NOT NULL COLLATE NOCASE REFERENCES users (name) ON DELETE CASCADE,
    role TEXT NOT NULL, PRIMARY KEY (org, user));
"""


@dataclass(frozen=True)
class Token:
    """One token as it is kept: `id` names it, nothing gives it back."""

    id: str
    user: str
    label: str
    role: str
    created: str


def prepare_store(root: Path) -> None:
    """Make the folder of a store, or make sure that it is one.

    Raises:
        HfMergeError: the folder holds something else.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    mark = root / "format"
    if mark.exists():
        if mark.read_text().strip() != _FORMAT:
            raise HfMergeError(f"{root}: written by another version of the server; choose another folder")
    elif any(root.iterdir()):
        raise HfMergeError(f"{root}: not empty and not a store of this server; choose another folder")
    else:
        mark.write_text(_FORMAT + "\n")


def new_token() -> str:
    """A token nobody has."""
    return "hf_" + secrets.token_hex(17)


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def check_name(name: str) -> None:
    """Whether a user or organisation may be called so.

    Raises:
        HfMergeError: it may not.
    """
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise HfMergeError(f"{name!r}: not a name; use up to 94 letters, digits, `-`, `_` and `.`")


class Accounts:
    """The file `people.sqlite` of a store; several processes may have it open. Names match in any case."""

    def __init__(self, root: Path):
        path = root / "people.sqlite"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        self._connection.row_factory = sqlite3.Row
        try:
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise HfMergeError(f"{path}: cannot be opened ({error})") from error

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    # Users and tokens

    def users(self) -> list[str]:
        """All users."""
        return [row["name"] for row in self._rows("SELECT name FROM users ORDER BY name")]

    def user(self, name: str) -> str | None:
        """A user's name as it is written; None if there is none."""
        return self._one("SELECT name FROM users WHERE name = ?", name)

    def add_user(self, name: str) -> bool:
        """Add a user without a token; False if there is one of that name.

        Raises:
            HfMergeError: the name is an organisation's.
        """
        with self._transaction():
            if self.user(name) is not None:
                return False
            if self.org(name) is not None:
                raise HfMergeError(f"{name} is the name of an organisation; choose another name")
            self._connection.execute("INSERT INTO users VALUES (?, ?)", (name, _now()))
        return True

    def remove_user(self, name: str) -> None:
        """Remove a user with all tokens and memberships; repositories stay.

        Raises:
            HfMergeError: there is no such user.
        """
        self._known_user(name)
        self._write("DELETE FROM users WHERE name = ?", name)

    def add_token(self, user: str, *, role: str = "write", label: str = "") -> str:
        """Make a token; it is given back here, and never again.

        Raises:
            HfMergeError: there is no such user.
        """
        _check_role(role, TOKEN_ROLES)
        token = new_token()
        values = (digest_of(token), secrets.token_hex(4), self._known_user(user), label, role, _now())
        self._write("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?)", *values)
        return token

    def tokens(self, user: str | None = None) -> list[Token]:
        """The tokens of a user, or of all, the oldest first."""
        rows = self._rows("SELECT * FROM tokens WHERE ? IS NULL OR user = ? ORDER BY user, created, id", user, user)
        return [_token(row) for row in rows]

    def revoke(self, token_id: str) -> None:
        """Make a token worthless.

        Raises:
            HfMergeError: there is no such token.
        """
        if self._write("DELETE FROM tokens WHERE id = ?", token_id) == 0:
            raise HfMergeError(f"{token_id}: no such token; `hfmerge hub token list` shows the ids")

    def rotate(self, user: str) -> str:
        """Make all tokens of a user worthless, and one new one."""
        self._write("DELETE FROM tokens WHERE user = ?", self._known_user(user))
        return self.add_token(user)

    def owner_of(self, digest: str) -> Token | None:
        """The token with that SHA-256."""
        rows = self._rows("SELECT * FROM tokens WHERE digest = ?", digest)
        return _token(rows[0]) if rows else None

    # Organisations

    def orgs(self) -> list[str]:
        """All organisations."""
        return [row["name"] for row in self._rows("SELECT name FROM orgs ORDER BY name")]

    def org(self, name: str) -> str | None:
        """An organisation's name as it is written; None if there is none."""
        return self._one("SELECT name FROM orgs WHERE name = ?", name)

    def add_org(self, name: str, user: str, role: str = "admin") -> bool:
        """Add an organisation with its first member; False if there is one of that name.

        Raises:
            HfMergeError: the name is a user's, or the member is no user.
        """
        _check_role(role, ROLES)
        member = self._known_user(user)
        with self._transaction():
            if self.org(name) is not None:
                return False
            if self.user(name) is not None:
                raise HfMergeError(f"{name} is the name of a user; choose another name")
            self._connection.execute("INSERT INTO orgs VALUES (?, ?)", (name, _now()))
            self._connection.execute("INSERT INTO members VALUES (?, ?, ?)", (name, member, role))
        return True

    def set_member(self, org: str, user: str, role: str) -> None:
        """Make a user a member, or change their role.

        Raises:
            HfMergeError: there is no such user, organisation or role.
        """
        _check_role(role, ROLES)
        member = self._known_user(user)
        self._write("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", self._known_org(org), member, role)

    def remove_member(self, org: str, user: str) -> None:
        """Take a user out of an organisation.

        Raises:
            HfMergeError: they are no member.
        """
        if self._write("DELETE FROM members WHERE org = ? AND user = ?", self._known_org(org), user) == 0:
            raise HfMergeError(f"{user} is not a member of {org}")

    def role(self, org: str, user: str) -> str | None:
        """A member's role; None for others."""
        return self._one("SELECT role FROM members WHERE org = ? AND user = ?", org, user)

    def members(self, org: str) -> list[tuple[str, str]]:
        """The members of an organisation and their roles."""
        rows = self._rows("SELECT user, role FROM members WHERE org = ? ORDER BY user", org)
        return [(row["user"], row["role"]) for row in rows]

    def memberships(self, user: str) -> list[tuple[str, str]]:
        """The organisations of a user and their role in each."""
        rows = self._rows("SELECT org, role FROM members WHERE user = ? ORDER BY org", user)
        return [(row["org"], row["role"]) for row in rows]

    # Internals

    def _known_user(self, name: str) -> str:
        if (found := self.user(name)) is None:
            raise HfMergeError(f"{name}: no such user; `hfmerge hub user add {name}` makes one")
        return found

    def _known_org(self, name: str) -> str:
        if (found := self.org(name)) is None:
            raise HfMergeError(f"{name}: no such organisation")
        return found

    def _rows(self, query: str, *arguments: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, arguments).fetchall()

    def _one(self, query: str, *arguments: Any) -> str | None:
        rows = self._rows(query, *arguments)
        return str(rows[0][0]) if rows else None

    def _write(self, query: str, *arguments: Any) -> int:
        with self._lock:
            return self._connection.execute(query, arguments).rowcount

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:  # Ctrl-C too must not leave half a transaction
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


def _check_role(role: str, roles: tuple[str, ...]) -> None:
    if role not in roles:
        raise HfMergeError(f"{role!r}: no such role; use one of {', '.join(roles)}")


def _token(row: sqlite3.Row) -> Token:
    return Token(row["id"], row["user"], row["label"], row["role"], row["created"])


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
