"""Changing a git tree: additions and deletions in their order, written once at the end."""

from __future__ import annotations

import stat

from dulwich.object_store import BaseObjectStore
from dulwich.objects import Tree


_FILE_MODE = 0o100644


class TreeEditor:
    """One folder being changed; sub-folders are read when they are touched."""

    def __init__(self, objects: BaseObjectStore, oid: bytes | None):
        self._objects = objects
        self._items: dict[bytes, tuple[int, bytes] | TreeEditor] = {}
        if oid is not None:
            tree = objects[oid]
            assert isinstance(tree, Tree)
            self._items = {item.path: (item.mode, item.sha) for item in tree.iteritems()}

    def put(self, path: str, blob: bytes) -> None:
        """Add or replace a file.

        Raises:
            NotADirectoryError: a file stands where the path needs a folder.
            IsADirectoryError: a folder stands where the file should be.
        """
        *folders, name = path.encode().split(b"/")
        folder = self
        for part in folders:
            if part not in folder._items:
                folder._items[part] = TreeEditor(self._objects, None)
            child = folder._open(part)
            if child is None:
                raise NotADirectoryError(part.decode())
            folder = child
        if name in folder._items and folder._open(name) is not None:
            raise IsADirectoryError(path)
        folder._items[name] = (_FILE_MODE, blob)

    def remove(self, path: str, *, folder_only: bool) -> None:
        """Delete a file or a folder.

        Raises:
            KeyError: nothing is there, or only a file where a folder was named.
        """
        *folders, name = path.encode().split(b"/")
        folder: TreeEditor | None = self
        for part in folders:
            folder = folder._open(part) if folder is not None and part in folder._items else None
        if folder is None or name not in folder._items or (folder_only and folder._open(name) is None):
            raise KeyError(path)
        del folder._items[name]

    def store(self) -> bytes:
        """Write the tree and what is under it; folders left empty vanish. Returns its id."""
        tree = self._build()
        self._objects.add_object(tree)
        return tree.id

    def _build(self) -> Tree:
        tree = Tree()
        for name, item in self._items.items():
            if not isinstance(item, TreeEditor):
                tree.add(name, item[0], item[1])
            elif len(child := item._build()):
                self._objects.add_object(child)
                tree.add(name, stat.S_IFDIR, child.id)
        return tree

    def _open(self, name: bytes) -> TreeEditor | None:
        item = self._items[name]
        if isinstance(item, TreeEditor):
            return item
        mode, oid = item
        if not stat.S_ISDIR(mode):
            return None
        child = TreeEditor(self._objects, oid)
        self._items[name] = child
        return child
