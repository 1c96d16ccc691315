"""Everything that some commits lead to in a git repository, each object checked against its name and its kind."""

from __future__ import annotations

import hashlib
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dulwich.errors import ChecksumMismatch, ObjectFormatException
from dulwich.object_store import BaseObjectStore
from dulwich.objects import Blob, Commit, ShaFile, Tag, Tree

from hfmerge.hubserver.upload import check_path
from hfmerge.hubserver.wire import HubFault


_MODES = (0o100644, 0o100755, 0o40000)
_KINDS = {Commit: "commit", Tree: "tree", Blob: "file", Tag: "tag"}


@dataclass(frozen=True)
class Reached:
    """One object: its bytes, or what is wrong with it. `path` is one place where a tree has it."""

    oid: str
    kind: str
    path: str
    data: bytes
    fault: str | None


def walk(objects: BaseObjectStore, roots: Iterable[str]) -> Iterator[Reached]:
    """The objects that commits or tags lead to, each once; nothing is followed from one that is broken."""
    waiting: list[tuple[str, str, str]] = [(oid, "commit", "") for oid in roots]
    seen: set[str] = set()
    while waiting:
        oid, kind, path = waiting.pop()
        if oid in seen:
            continue
        seen.add(oid)
        data, found, fault = _read(objects, oid)
        if found is None:
            yield Reached(oid, kind, path, data, fault)
            continue
        if isinstance(found, Tag) and kind == "commit":
            waiting.append((found.object[1].decode(), "commit", ""))
            yield Reached(oid, "tag", path, data, None)
            continue
        if _KINDS.get(type(found)) != kind:
            yield Reached(oid, kind, path, data, f"is a {_KINDS.get(type(found))}, not a {kind}")
            continue
        yield Reached(oid, kind, path, data, _follow(found, path, waiting))


def _read(objects: BaseObjectStore, oid: str) -> tuple[bytes, ShaFile | None, str | None]:
    try:
        number, data = objects.get_raw(oid.encode())
        found = ShaFile.from_raw_string(number, data)
        name = hashlib.sha1(b"%s %d\0" % (found.type_name, len(data)) + data, usedforsecurity=False).hexdigest()
    except KeyError:
        return b"", None, "is missing"
    except (zlib.error, ChecksumMismatch, ObjectFormatException, ValueError, AssertionError, OSError) as error:
        return b"", None, f"cannot be read ({type(error).__name__}: {error})"
    if name != oid:
        return b"", None, f"has other bytes: their SHA-1 is {name}"
    return data, found, None


def _follow(git_object: ShaFile, path: str, waiting: list[tuple[str, str, str]]) -> str | None:
    """Note what an object leads to; returns what is wrong with how it does."""
    try:
        if isinstance(git_object, Commit):
            waiting.append((git_object.tree.decode(), "tree", ""))
            waiting.extend((parent.decode(), "commit", "") for parent in git_object.parents)
        elif isinstance(git_object, Tree):
            for item in git_object.iteritems():
                place = f"{path}/{item.path.decode()}" if path else item.path.decode()
                if item.mode not in _MODES:
                    return f"{place}: mode {item.mode:o}; only files and folders are kept here, no links"
                check_path(place)
                waiting.append((item.sha.decode(), "tree" if stat.S_ISDIR(item.mode) else "file", place))
    except (ObjectFormatException, UnicodeDecodeError, ValueError, KeyError, AttributeError) as error:
        return f"is malformed ({type(error).__name__}: {error})"
    except HubFault as fault:
        return fault.message
    return None
