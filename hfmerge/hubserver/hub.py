"""The state of a running server, and who may do what to which repository."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from hfmerge.errors import HfMergeError
from hfmerge.hubserver.accounts import Accounts, check_name, digest_of, prepare_store
from hfmerge.hubserver.blobs import BlobStore
from hfmerge.hubserver.database import Database, DiscussionRow, RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, Entry, GitStore, Owned, Pointer
from hfmerge.hubserver.signing import Signer
from hfmerge.hubserver.wire import (
    Call,
    HubFault,
    entry_missing,
    forbidden,
    login_needed,
    repo_missing,
    revision_missing,
    segment,
)


# Objects larger than this are sent in parts by clients without Xet.
DEFAULT_PART_SIZE = 64 << 20

# How long an address is good that needs no authorisation.
URL_SECONDS = 24 * 3600

_MAY_CREATE = ("contributor", "write", "admin")


class Hub:
    """Everything the handlers share. `root` belongs to one server at a time.

    Args:
        root: folder of the store, made if it is missing.
        users: tokens that hold while this server runs, by user name; others are kept with the store.
        part_size: bytes of one part of a multipart LFS upload.
        cdn_port: port that serves large files after a redirect, None to serve them directly.
    """

    def __init__(
        self,
        root: Path,
        users: Mapping[str, str],
        *,
        part_size: int = DEFAULT_PART_SIZE,
        cdn_port: int | None = None,
    ):
        self.root = root
        self.part_size = part_size
        self.cdn_port = cdn_port
        self.signer = Signer()
        prepare_store(root)
        self.database = Database(root / "hub.sqlite")
        self.blobs = BlobStore(root / "objects", root / "incoming")
        self.xorbs = root / "xorbs"
        self._locks: dict[str, threading.Lock] = {}
        self._locks_guard = threading.Lock()
        try:
            self.accounts = Accounts(root)
            try:
                self._session: dict[str, str] = {}
                for name, token in users.items():
                    check_name(name)
                    self.accounts.add_user(name)
                    self._session[digest_of(token)] = self.accounts.user(name) or name
                self._name_namespaces()
                self._recover()
            except BaseException:  # nobody will call `close` of what was never made
                self.accounts.close()
                raise
        except BaseException:
            self.database.close()
            raise

    def close(self) -> None:
        """End: the folder may be used by another server."""
        self.database.close()
        self.accounts.close()
        (self.root / "running").unlink(missing_ok=True)

    def _name_namespaces(self) -> None:
        """Say whose the namespaces are in a store from before there were organisations."""
        for row in reversed(self.database.repos()):
            if row.namespace.lower() == row.owner.lower():
                self.accounts.add_user(row.owner)
            elif self.accounts.user(row.namespace) is None and self.accounts.org(row.namespace) is None:
                self.accounts.add_user(row.owner)
                self.accounts.add_org(row.namespace, row.owner)

    def _recover(self) -> None:
        """Remove what an ended server left: chunks, unfinished uploads, folders and objects nobody refers to."""
        running = self.root / "running"
        known = [row.rid for row in self.database.repos()]
        repos = self.root / "repos"
        repos.mkdir(exist_ok=True)
        for path in repos.iterdir():
            if path.name.removesuffix(".git") not in known:
                shutil.rmtree(path)
        if running.exists():
            # git refuses to write beside a lock that a killed process left.
            for lock in repos.glob("*/**/*.lock"):
                lock.unlink()
        running.touch()
        self.blobs.clear_temporary()
        shutil.rmtree(self.xorbs, ignore_errors=True)
        self.xorbs.mkdir()
        linked = self.database.linked_anywhere()
        for oid in list(self.blobs.all()):
            if oid not in linked:
                self.blobs.remove(oid)

    # Users

    def add_users(self, names: Sequence[str]) -> dict[str, str]:
        """Make those users that do not exist; returns their new tokens."""
        made = {}
        for name in names:
            check_name(name)
            if self.accounts.add_user(name):
                made[name] = self.accounts.add_token(name)
        return made

    def token_of(self, authorization: str | None) -> tuple[str, str] | None:
        """The user a request speaks for and what their token may do, `read` or `write`; None if it is anonymous.

        Raises:
            HubFault: 401 for a token nobody has.
        """
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer":
            digest = digest_of(token.strip())
            if digest in self._session:
                return self._session[digest], "write"
            if (known := self.accounts.owner_of(digest)) is not None:
                return known.user, known.role
        raise HubFault(401, "Invalid credentials in Authorization header")

    def claim_namespace(self, user: str, namespace: str) -> bool:
        """Whether a user may put repositories there; an organisation that does not exist becomes theirs."""
        if namespace.lower() == user.lower():
            return True
        if self.accounts.user(namespace) is not None:
            return False
        try:
            check_name(namespace)
            if self.accounts.add_org(namespace, user):
                return True
        except HfMergeError as error:
            raise HubFault(400, str(error)) from error
        return self.accounts.role(namespace, user) in _MAY_CREATE

    def may_write(self, repo: RepoRow, user: str | None) -> bool:
        """The user the namespace is named after; of an organisation, those who may write all or made this one."""
        if user is None:
            return False
        if user.lower() == repo.namespace.lower():
            return True
        role = self.accounts.role(repo.namespace, user)
        return role in ("write", "admin") or (role == "contributor" and user == repo.owner)

    def may_see(self, repo: RepoRow, user: str | None) -> bool:
        """Everybody for a public repository; its namespace's user, or any member, for a private one."""
        if not repo.private:
            return True
        if user is None:
            return False
        return user.lower() == repo.namespace.lower() or self.accounts.role(repo.namespace, user) is not None

    def may_read(self, repo: RepoRow, user: str | None) -> bool:
        """Whether somebody who sees a repository may have what is in its files: not before access, if it is gated."""
        if repo.gated is None or self.may_write(repo, user):
            return True
        if user is None:
            return False
        member = self.accounts.role(repo.namespace, user) is not None
        return member or self.database.access_of(repo.rid, user) == "accepted"

    # Repositories

    def repo(self, call: Call) -> RepoRow:
        """The repository of a request, if it may be seen.

        Raises:
            HubFault: `RepoNotFound`, or 307 to where the repository went.
        """
        return self.repo_named(call, call.kind, call.args["repo"])

    def repo_named(self, call: Call, kind: str, repo_id: str) -> RepoRow:
        """Like `repo`, for an id from a body."""
        row = self.database.repo(kind, repo_id) if "/" in repo_id else None
        if row is None and call.repo_span is not None and (row := self.database.moved(kind, repo_id)) is not None:
            if self.may_see(row, call.user):
                start, end = call.repo_span
                path = call.request.scope["raw_path"].decode("latin-1")
                query = call.request.url.query
                target = path[:start] + row.id + path[end:] + (f"?{query}" if query else "")
                raise HubFault(307, f"The repository is now {row.id}", headers={"Location": target})
        if row is None or not self.may_see(row, call.user):
            raise repo_missing(call.user)
        return row

    def writable(self, call: Call) -> RepoRow:
        """The repository of a request, if its user may write it."""
        row = self.repo(call)
        self.require_writer(row, call)
        return row

    def require_writer(self, repo: RepoRow, call: Call) -> str:
        """The user, if they may write the repository; else 401 or 403."""
        user = self.require_user(call)
        self._require_write_token(call)
        if not self.may_write(repo, user):
            raise forbidden(f"You don't have the rights to write to {repo.id}")
        return user

    def require_user(self, call: Call) -> str:
        """The user of a request; 401 if it is anonymous."""
        if call.user is None:
            raise login_needed()
        return call.user

    def speaker(self, call: Call) -> RepoRow:
        """The repository of a request, if it may be seen and its user is known."""
        row = self.repo(call)
        self.require_user(call)
        return row

    def _require_write_token(self, call: Call) -> None:
        if call.role == "read":
            raise forbidden("This token may only read; use one with the role `write`")

    def pushable(self, call: Call, revision: str | None, *, opens_pull: bool) -> RepoRow:
        """The repository of a request, if its user may send commits or objects for `revision`.

        People without write access may open a pull request, and push to one of theirs.
        """
        repo = self.speaker(call)
        user = self.require_user(call)
        self._require_write_token(call)
        if not self.may_write(repo, user) and not opens_pull:
            discussion = self.pull_of(repo, revision or "")
            if discussion is None or discussion.author != user:
                raise forbidden(f"You don't have the rights to write to {repo.id}; open a pull request instead")
        return repo

    def pull_of(self, repo: RepoRow, revision: str) -> DiscussionRow | None:
        """The pull request a revision such as `refs/pr/3` belongs to."""
        number = revision.removeprefix("refs/pr/")
        if number == revision or not number.isascii() or not number.isdigit() or len(number) > 9:
            return None
        row = self.database.discussion(repo.rid, int(number))
        return row if row is not None and row.pull else None

    def require_content(self, repo: RepoRow, call: Call) -> None:
        """Whether the files of a gated repository may be fetched.

        Raises:
            HubFault: `GatedRepo`, 401 for anonymous requests and 403 for users nobody accepted.
        """
        if self.may_read(repo, call.user):
            return
        message = f"Access to {repo.kind} {repo.id} is restricted"
        if call.user is None:
            raise HubFault(
                401, f"{message}. You must have access to it and be authenticated to access it.", "GatedRepo"
            )
        raise HubFault(
            403, f"{message} and you are not in the authorized list. Ask its owner for access.", "GatedRepo"
        )

    def git_path(self, rid: str) -> Path:
        """The folder of a repository."""
        return self.root / "repos" / f"{rid}.git"

    def drop_git(self, rid: str) -> None:
        """Delete the folder of a repository that the database no longer knows."""
        shutil.rmtree(self.git_path(rid))

    @contextmanager
    def git(self, repo: RepoRow) -> Iterator[GitStore]:
        """The git side of a repository, to read; a repository deleted meanwhile is missing."""
        try:
            store = GitStore(self.git_path(repo.rid), self._owned(repo.rid))
        except Exception as error:  # dulwich has no error of its own for a folder that is gone
            if self.database.repo_by_rid(repo.rid) is None:
                raise repo_missing("") from error
            raise
        with store:
            try:
                yield store
            except (KeyError, OSError) as error:
                if self.database.repo_by_rid(repo.rid) is None:
                    raise repo_missing("") from error
                raise

    @contextmanager
    def git_writing(self, repo: RepoRow) -> Iterator[GitStore]:
        """The git side of a repository, to change: one request at a time."""
        with self.lock(repo.rid):
            if self.database.repo_by_rid(repo.rid) is None:
                raise repo_missing("")
            with self.git(repo) as store:
                yield store

    @contextmanager
    def lock(self, rid: str) -> Iterator[None]:
        """Held by whoever changes a repository."""
        with self._locks_guard:
            lock = self._locks.setdefault(rid, threading.Lock())
        with lock:
            yield

    def _owned(self, rid: str) -> Owned:
        """Which pointers count in a repository: those to objects that were sent to it, with their true size."""
        known: list[frozenset[str]] = []

        def owned(pointer: Pointer) -> bool | None:
            if not known:
                known.extend((frozenset(self.database.objects(rid)), self.database.deleted(rid)))
            linked, deleted = known
            if pointer.oid in linked:
                size = self.blobs.size(pointer.oid)
                return size is not None if size in (None, pointer.size) else None
            return False if pointer.oid in deleted else None

        return owned

    # Content

    def tip(self, repo: RepoRow) -> str | None:
        """The newest commit of main: read from its file, as lists ask for a thousand; git may keep it elsewhere."""
        try:
            return (self.git_path(repo.rid) / DEFAULT_BRANCH).read_text("ascii").strip()
        except OSError:
            with self.git(repo) as git:
                return git.ref(DEFAULT_BRANCH)

    def commit_of(self, git: GitStore, revision: str) -> str:
        """The commit of a revision; `RevisionNotFound` if there is none."""
        commit = git.resolve(revision)
        if commit is None:
            raise revision_missing(revision)
        return commit

    def file_at(self, git: GitStore, commit: str, path: str) -> Entry:
        """The file at a path; `EntryNotFound` if there is none."""
        entry = git.lookup(commit, path)
        if entry is None or entry.is_folder:
            raise entry_missing(f"Entry not found: {path}", commit)
        return entry

    def content(self, git: GitStore, entry: Entry, *, start: int = 0, length: int = -1) -> bytes:
        """Bytes of a file, through its LFS pointer."""
        if entry.lfs is None:
            data = git.read(entry.oid)
            return data[start:] if length < 0 else data[start : start + length]
        with self.object_path(entry).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def object_path(self, entry: Entry) -> Path:
        """Where the content of a large file lies; `EntryNotFound` if it was deleted."""
        if entry.lfs is None or not entry.lfs.present:
            raise HubFault(404, f"{entry.path}: this large file was deleted", "EntryNotFound")
        return self.blobs.path(entry.lfs.oid)

    def xet_store(self, user: str) -> str:
        """The name of the chunks a user has sent since the server started.

        Clients remember by a store's address which chunks it has, and do not send them again. One store for all
        users would let them build files from chunks of which they know no more than the hash.
        """
        return self.signer.name("xet", user.lower())

    def link(self, rid: str, oid: str) -> None:
        """Let a repository refer to an object it has been sent; `RepoNotFound` if it was deleted meanwhile."""
        try:
            self.database.link(rid, oid)
        except sqlite3.IntegrityError as error:
            raise repo_missing("") from error

    def signed_url(self, call: Call, scope: str, claims: dict[str, object], *, seconds: int = URL_SECONDS) -> str:
        """An address that needs no authorisation, for a while."""
        token, _ = self.signer.sign(scope, claims, seconds=seconds)
        return f"{call.origin}/_signed/{scope}/{segment(token)}"


def now() -> str:
    """The time as the Hub writes it."""
    return moment(datetime.now(timezone.utc).timestamp())


def moment(seconds: float) -> str:
    """A Unix time as the Hub writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
