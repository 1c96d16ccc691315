"""A model as a plan needs it: described by its small files and the headers of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hfmerge.checkpoint.headers import TensorEntry
from hfmerge.hub.reference import Snapshot


@dataclass(frozen=True)
class Model:
    """A model described by its small files and headers: everything a plan needs.

    Attributes:
        ref: as written in the recipe.
        snapshot: where it lies.
        kind: "full" or "adapter".
        config: config.json; for an adapter, what its own config.json adds (label names), or {}.
        adapter: adapter_config.json of an adapter.
        tensors: stored key -> header entry.
        pickled: the weights are pickles.
        beneath: for `base+adapter` on another model than the merge's base: that model.
        streams: weight files that are read from the Hub piece by piece; others are read on this machine.
        beside: further file that the method reads -> what each tensor in it is.
        renamed: key of `tensors` -> its name in its file, where that is another one: a tensor of a module has the
            module's folder before its name, and the other end of a tie has the values of the tensor that is stored.
        called: what heads and messages call it where that is not its name: see `distinct_names`.
        modules: folders of sentence-transformers modules whose weights are among the tensors.
    """

    ref: str
    snapshot: Snapshot
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    adapter: Mapping[str, Any] | None = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    pickled: bool = False
    beneath: Model | None = None
    streams: tuple[str, ...] = field(default=(), repr=False)
    beside: Mapping[str, Mapping[str, TensorEntry]] = field(default_factory=dict, repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)
    modules: tuple[str, ...] = ()
    called: str | None = None

    @property
    def name(self) -> str:
        """Repository ID or folder name, the adapter's for an adapter."""
        return self.snapshot.name

    @property
    def label(self) -> str:
        """Short text for tables: that of its snapshot, behind what it is called."""
        return f"{self.called} ({self.snapshot.label})" if self.called is not None else self.snapshot.label

    @property
    def slug(self) -> str:
        """What it is called, as one path segment: `org--name`."""
        return (self.called or self.name).replace("/", "--")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored key -> shape."""
        return {key: entry.shape for key, entry in self.tensors.items()}

    def stored_key(self, key: str) -> str:
        """Name, in its file, of what a key of `tensors` stands for."""
        return self.renamed.get(key, key)

    def is_of_module(self, key: str) -> bool:
        """Whether a tensor belongs to a module of sentence-transformers, and not to the class of transformers."""
        return key.startswith(tuple(f"{folder}/" for folder in self.modules))

    def streamed_bytes(self, keys: Iterable[str]) -> int:
        """Bytes of those of the tensors that are streamed."""
        entries = (self.tensors[key] for key in keys)
        return sum(entry.nbytes for entry in entries if entry.file in self.streams)


def weight_files(source: Model) -> list[str]:
    """Every file of a source that a merge depends on, in order: configuration first, then weights, then others."""
    small = ["config.json", "adapter_config.json"]
    files = [name for name in small if name in source.snapshot.files]
    files += sorted({entry.file for entry in source.tensors.values()})
    return list(dict.fromkeys([*files, *source.beside]))
