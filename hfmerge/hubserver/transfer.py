"""Repositories into a store and out of it: whole with their history, a revision as a folder, a folder as a commit."""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from dulwich.errors import ApplyDeltaError, ChecksumMismatch, ObjectFormatException
from dulwich.pack import PackData, PackInflater, UnresolvedDeltas, write_pack_from_container
from dulwich.repo import Repo

from hfmerge.errors import HfMergeError, OutputError
from hfmerge.hubserver.attributes import DEFAULT_ATTRIBUTES, attributes_of, is_large
from hfmerge.hubserver.cards import REPO_ID
from hfmerge.hubserver.database import RepoRow
from hfmerge.hubserver.gitstore import DEFAULT_BRANCH, GitStore, parse_pointer, pointer_text, valid_ref
from hfmerge.hubserver.hub import Hub, now
from hfmerge.hubserver.info import tip_facts
from hfmerge.hubserver.packs import check_pack
from hfmerge.hubserver.upload import check_path
from hfmerge.hubserver.walking import walk


FORMAT = "hfmerge/hub-export/1"
_MANIFEST, _BUNDLE = "repository.json", "repository.bundle"
_BUNDLE_HEAD = b"# v2 git bundle\n"
# Discussions stay in the store, and so do the references of their pull requests.
_PREFIXES = ("refs/heads/", "refs/tags/", "refs/convert/")
_MOST_MANIFEST = 64 << 20
_MOST_LINE = 4096
_OID, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"(model|dataset)s--(.+)--(.+)")
# What dulwich raises for packs that are none.
_BROKEN = (
    *(ValueError, KeyError, IndexError, AssertionError, zlib.error, EOFError),
    *(ChecksumMismatch, ObjectFormatException, ApplyDeltaError, UnresolvedDeltas),
)
_LEFT_OUT = (".git", ".cache", "__pycache__")
_SAMPLE = 512
_CHUNK = 1 << 20
_DEFAULT_USER = "me"


# Out of a store


def export_repository(hub: Hub, kind: str, repo_id: str, folder: Path) -> dict[str, Any]:
    """Write a repository with its history: a git bundle, the large objects it points to, and a manifest.

    `git clone FOLDER/repository.bundle` reads it, and `import_export` takes it back with the same commits.
    """
    row = _known(hub, kind, repo_id)
    _new_folder(folder, private=row.private or row.gated is not None)
    repo = Repo(str(hub.git_path(row.rid)), bare=True)
    try:
        refs = {name.decode(): oid.decode() for name, oid in repo.get_refs().items()}
        refs = {name: oid for name, oid in sorted(refs.items()) if name.startswith(_PREFIXES)}
        oids, large = [], {}
        linked = frozenset(hub.database.objects(row.rid))
        for found in walk(repo.object_store, refs.values()):
            if found.fault is not None:
                raise HfMergeError(f"{repo_id}: {found.kind} {found.oid} {found.fault}; run: hfmerge hub fsck")
            oids.append(found.oid.encode())
            pointer = parse_pointer(found.data) if found.kind == "file" else None
            if pointer is not None and pointer.oid in linked:
                large[pointer.oid] = pointer.size
        with (folder / _BUNDLE).open("xb") as file:
            file.write(_BUNDLE_HEAD)
            # HEAD is for git: it says what a clone of the bundle checks out.
            named = [(refs[DEFAULT_BRANCH], "HEAD"), *((oid, name) for name, oid in refs.items())]
            file.writelines(f"{oid} {name}\n".encode() for oid, name in named)
            file.write(b"\n")
            write_pack_from_container(
                file.write, repo.object_store, [(oid, None) for oid in oids], object_format=repo.object_format
            )
    finally:
        repo.close()
    for oid in sorted(large):
        _copy_out(hub, oid, folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid)
    manifest = {"format": FORMAT, "kind": row.kind, "id": row.id, "private": row.private, "gated": row.gated}
    manifest |= {"refs": refs, "objects": sorted(large)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return {"repo": row.id, "commit": refs[DEFAULT_BRANCH], "objects": len(oids), "large": len(large)}


def export_revision(hub: Hub, kind: str, repo_id: str, revision: str, folder: Path) -> dict[str, Any]:
    """Write the files of a revision as a plain folder."""
    row = _known(hub, kind, repo_id)
    with hub.git(row) as git:
        commit = hub.commit_of(git, revision)
        entries = [entry for entry in git.entries(commit, recursive=True) if not entry.is_folder]
        for entry in entries:
            check_path(entry.path)
            if entry.lfs is not None and not entry.lfs.present:
                raise HfMergeError(f"{repo_id}: {entry.path} was deleted from the store; export another revision")
        _new_folder(folder, private=row.private or row.gated is not None)
        for entry in entries:
            target = folder / entry.path
            if entry.lfs is not None:
                _copy_out(hub, entry.lfs.oid, target)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    file.write(git.read(entry.oid))
    return {"repo": row.id, "commit": commit, "files": len(entries)}


def _known(hub: Hub, kind: str, repo_id: str) -> RepoRow:
    row = hub.database.repo(kind, repo_id)
    if row is None:
        raise HfMergeError(f"{repo_id}: no such {kind} in this store")
    return row


def _new_folder(folder: Path, *, private: bool) -> None:
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise OutputError(f"{folder}: not empty; name a folder that is new")
    folder.mkdir(parents=True, exist_ok=True)
    if private:
        folder.chmod(0o700)


def _copy_out(hub: Hub, oid: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hub.blobs.path(oid).open("rb") as source, target.open("xb") as file:
            _copy(source, file)
    except FileNotFoundError as error:
        raise HfMergeError(f"the large object {oid} is missing; run: hfmerge hub fsck") from error


def _copy(source: IO[bytes], target: Any) -> None:
    while data := source.read(_CHUNK):
        target.write(data)


# Into a store


def import_any(
    hub: Hub, source: Path, repo_id: str | None, kind: str, owner: str | None, *, private: bool
) -> list[dict[str, Any]]:
    """Take in what a folder holds: an export, a Hugging Face cache or one repository of it, or plain files."""
    if not source.is_dir():
        raise OutputError(f"{source}: no such folder")
    if (source / _MANIFEST).is_file() and (source / _BUNDLE).is_file():
        return [import_export(hub, source, repo_id, owner)]
    cached = [source] if _CACHED.fullmatch(source.name) else sorted(filter(_is_cached, source.iterdir()))
    cached = cached or (sorted(filter(_is_cached, (source / "hub").iterdir())) if (source / "hub").is_dir() else [])
    if cached and repo_id is not None and len(cached) > 1:
        raise HfMergeError(f"{source}: a cache of several repositories; name one of its folders, or leave out --as")
    if cached:
        made = []
        for folder in cached:
            found = _CACHED.fullmatch(folder.name)
            assert found is not None
            snapshot = _snapshot(folder)
            if snapshot is not None:
                name = repo_id or f"{found[2]}/{found[3]}"
                message = f"Import commit {snapshot.name} from a cache"
                made.append(_import_files(hub, snapshot, folder.parent, found[1], name, owner, private, message))
        return made
    if repo_id is None:
        raise HfMergeError(f"{source}: plain files; say with --as org/name what the repository is called")
    return [_import_files(hub, source, source, kind, repo_id, owner, private, "Import a local folder")]


def import_export(hub: Hub, folder: Path, repo_id: str | None, owner: str | None) -> dict[str, Any]:
    """Take a whole repository in, with the commits it had; everything in it is checked first."""
    manifest = _manifest(folder / _MANIFEST)
    name = repo_id or manifest["id"]
    if hub.database.repo(manifest["kind"], name) is not None:
        raise HfMergeError(f"{name}: exists already; delete it, or choose another name with --as")
    row = _new_row(hub, manifest["kind"], name, owner, manifest["private"], manifest["gated"])
    path = hub.git_path(row.rid)
    try:
        GitStore.create(path).__exit__()
        large = _unbundle(path, folder / _BUNDLE, manifest["refs"], hub.blobs.scratch())
        for oid in manifest["objects"]:
            if oid not in large:
                raise HfMergeError(f"{folder / _MANIFEST}: no commit points to the large object {oid}")
            _take_in(hub, folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid, oid)
        if not hub.database.add_repo(row):
            raise HfMergeError(f"{name}: exists already; delete it, or choose another name with --as")
    except BaseException:  # what was begun leaves nothing
        hub.drop_git(row.rid)
        raise
    for oid in manifest["objects"]:
        hub.link(row.rid, oid)
    tip_facts(hub, row)
    return {"repo": row.id, "kind": row.kind, "commit": manifest["refs"][DEFAULT_BRANCH]}


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of an export, checked: a stranger may have written it."""
    with _opened(path) as file:
        data = file.read(_MOST_MANIFEST + 1)
    try:
        raw: Any = json.loads(data) if len(data) <= _MOST_MANIFEST else None
        kind, name, refs, objects = raw["kind"], raw["id"], raw["refs"], raw["objects"]
        sound = (
            raw["format"] == FORMAT
            and kind in ("model", "dataset")
            and isinstance(raw["private"], bool)
            and raw["gated"] in (None, "auto", "manual")
            and REPO_ID.fullmatch(name) is not None
            and name.count("/") == 1
            and DEFAULT_BRANCH in refs
            and all(n.startswith(_PREFIXES) and valid_ref(n) and _COMMIT.fullmatch(oid) for n, oid in refs.items())
            and all(_OID.fullmatch(oid) for oid in objects)
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise HfMergeError(f"{path}: not the manifest of an export ({type(error).__name__}: {error})") from error
    if not sound:
        raise HfMergeError(f"{path}: not the manifest of an export of this version")
    return cast("dict[str, Any]", raw)


def _unbundle(path: Path, bundle: Path, refs: dict[str, str], scratch: IO[bytes]) -> set[str]:
    """Unpack a bundle into an empty repository and set its references; returns the large objects it points to."""
    repo = Repo(str(path), bare=True)
    try:
        with scratch as pack, _opened(bundle) as file:
            if file.readline(_MOST_LINE) != _BUNDLE_HEAD:
                raise HfMergeError(f"{bundle}: not a git bundle of version 2")
            while (line := file.readline(_MOST_LINE)) != b"\n":
                if not line or line.startswith(b"-"):
                    raise HfMergeError(f"{bundle}: not a whole git bundle")
            start = file.tell()
            check_pack(file)
            file.seek(start)
            _copy(file, pack)
            pack.seek(0)
            with closing(PackData.from_file(pack, repo.object_format)) as data:
                data.check()
                for made in PackInflater.for_pack_data(data):
                    repo.object_store.add_object(made)
        large = set()
        for found in walk(repo.object_store, refs.values()):
            if found.fault is not None:
                raise HfMergeError(f"{bundle}: {found.kind} {found.oid} {found.fault}")
            if found.kind == "file" and (pointer := parse_pointer(found.data)) is not None:
                large.add(pointer.oid)
        for name, oid in refs.items():
            repo.refs[name.encode()] = oid.encode()
        return large
    except _BROKEN as error:
        raise HfMergeError(f"{bundle}: cannot be unpacked ({type(error).__name__}: {error})") from error
    finally:
        repo.close()


def _import_files(
    hub: Hub, folder: Path, root: Path, kind: str, repo_id: str, owner: str | None, private: bool, message: str
) -> dict[str, Any]:
    """Files into one commit on main, on top of what is there; links may lead to other files below `root` only."""
    row = hub.database.repo(kind, repo_id)
    new = row is None
    if row is None:
        row = _new_row(hub, kind, repo_id, owner, private, None)
        GitStore.create(hub.git_path(row.rid)).__exit__()
    sent: list[str] = []
    try:
        with hub.lock(row.rid), GitStore(hub.git_path(row.rid)) as git:
            tip = git.ref(DEFAULT_BRANCH)
            editor = git.edit(tip)
            rules = DEFAULT_ATTRIBUTES[kind].encode()
            if tip is not None and (entry := git.lookup(tip, ".gitattributes")) is not None:
                rules = git.read(entry.oid)
            elif not (folder / ".gitattributes").is_file():
                editor.put(".gitattributes", git.add_blob(rules))
            else:
                with _inside(folder / ".gitattributes", root) as file:
                    rules = file.read(_CHUNK)
            attributes = attributes_of(rules)
            for path, source in _files(folder):
                with _inside(source, root) as file:
                    size = os.fstat(file.fileno()).st_size
                    large = is_large(attributes, path, size, file.read(_SAMPLE))
                    file.seek(0)
                    if large:
                        oid = _receive(hub, file, None)
                        sent.append(oid)
                        data = pointer_text(oid, hub.blobs.size(oid) or 0)
                    else:
                        data = file.read()
                editor.put(path, git.add_blob(data))
            tree = editor.store()
            commit = tip if tip is not None and tree == git.tree_id(tip) else None
            for oid in sent if not new else ():
                hub.link(row.rid, oid)
            if commit is None:
                commit = git.commit(tree, tip, row.owner, f"{message}\n")
                git.set_ref(DEFAULT_BRANCH, commit)
        if new and not hub.database.add_repo(row):
            raise HfMergeError(f"{repo_id}: was created by somebody else meanwhile; try again")
    except BaseException:  # what was begun leaves nothing
        if new:
            hub.drop_git(row.rid)
        raise
    for oid in sent if new else ():
        hub.link(row.rid, oid)
    tip_facts(hub, row)
    return {"repo": row.id, "kind": row.kind, "commit": commit}


def _new_row(hub: Hub, kind: str, repo_id: str, owner: str | None, private: bool, gated: str | None) -> RepoRow:
    if not REPO_ID.fullmatch(repo_id) or repo_id.count("/") != 1 or repo_id.endswith(".git"):
        raise HfMergeError(f"{repo_id}: not a name for a repository; write org/name")
    return RepoRow(uuid.uuid4().hex, kind, repo_id, _owner(hub, repo_id, owner), private, gated, now())


def _owner(hub: Hub, repo_id: str, wanted: str | None) -> str:
    """Whose a new repository is: its namespace's user, who was named, or the one user there is."""
    namespace = repo_id.split("/")[0]
    if (user := hub.accounts.user(namespace)) is not None:
        return user
    if wanted is not None and hub.accounts.user(wanted) is None:
        raise HfMergeError(f"{wanted}: no such user; `hfmerge hub user add {wanted}` makes one")
    members = [name for name, role in hub.accounts.members(namespace) if role == "admin"]
    users = members or hub.accounts.users()
    if wanted is None and len(users) > 1 and not members:
        raise HfMergeError(f"{repo_id}: say with --owner whose it is: {', '.join(users[:10])}")
    if not users:
        hub.accounts.add_user(_DEFAULT_USER)
        users = [_DEFAULT_USER]
    owner = hub.accounts.user(wanted or users[0]) or users[0]
    if not hub.claim_namespace(owner, namespace):
        raise HfMergeError(f"{owner} may not create a repository in {namespace}; name another --owner")
    return owner


def _is_cached(path: Path) -> bool:
    return path.is_dir() and _CACHED.fullmatch(path.name) is not None


def _snapshot(folder: Path) -> Path | None:
    """The snapshot of main in a folder of a cache, or the only one there is."""
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    try:
        wanted = (folder / "refs" / "main").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        wanted = ""
    found = [path for path in snapshots if path.name == wanted] or snapshots
    return found[0] if len(found) == 1 else None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder, by their path in a repository."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        for name in sorted(names):
            source = Path(place) / name
            yield check_path(source.relative_to(folder).as_posix()), source


def _inside(path: Path, root: Path) -> BinaryIO:
    """A file, opened; a link may lead to it, but not out of `root`."""
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise HfMergeError(f"{path}: a link that leads out of {root}; put the file itself there")
    return _opened(real)


def _opened(path: Path) -> BinaryIO:
    """A regular file, and no link to one."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise HfMergeError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise HfMergeError(f"{path}: not a regular file")
    return os.fdopen(handle, "rb")


def _take_in(hub: Hub, path: Path, oid: str) -> None:
    if hub.blobs.size(oid) is None:
        with _opened(path) as file:
            _receive(hub, file, oid)


def _receive(hub: Hub, file: BinaryIO, oid: str | None) -> str:
    """Store a large object; it must have the given SHA-256, if there is one."""
    with hub.blobs.receive() as incoming:
        _copy(file, incoming)
        found = incoming.digest()
        if oid is not None and found != oid:
            raise HfMergeError(f"{file.name}: its SHA-256 is {found}")
        incoming.keep(found, None)
    return found
