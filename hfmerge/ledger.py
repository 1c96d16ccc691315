"""The ledger: one immutable JSON file per action, each naming its parent's SHA-256, in in-toto's words.

`merge_history/0001.json, 0002.json, ...` say what went in (materials, pinned by commit and file digest), how (method,
settings, environment), what came out (products by digest) and what was kept to go on from (byproducts). `sha256sum`
checks the chain.
A merge is a function of its last entry alone: replaying it gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfmerge.digest import canonical_json, sha256_bytes
from hfmerge.errors import LedgerError
from hfmerge.recipe import MethodChoice, ModelEntry, Recipe


FOLDER = "merge_history"
SCHEMA = "hfmerge/ledger/1"
ACTIONS = ("merge", "add", "unmerge")
NEEDED = {
    "method": ("name", "version", "options", "norm"),
    "settings": ("dtype", "include", "exclude", "vocabulary", "state", "allow_nonfinite", "allow_pickle",
                 "trust_remote_code", "card"),
    "scalars": ("scale", "merged_norm"),
}  # fmt: skip
"""Keys that every entry has, by attribute of `Entry`."""


@dataclass(frozen=True)
class Material:
    """A base or model that went into a merge.

    Attributes:
        name: repository ID or folder name.
        commit: 40 hex digits, None for a folder.
        digest: of a folder: SHA-256 over its files' digests; None on the Hub.
        kind: "full" or "adapter".
        weight: as given; 1.0 for the base.
        files: path -> SHA-256 of every file the merge read; a leading `+` marks those of the model beneath an adapter.
        beneath: for `base+adapter` on another model: identity of that model.
        squared_norm: of its task vector; None for the base.
        head: folder of its task head in the output, or None.
        labels: label names of that head.
        license: as its card or configuration says, or None.
        unverified: those of `files` that were streamed and could not be compared with their digest, which is then only
            what the Hub lists.
    """

    name: str
    commit: str | None
    digest: str | None
    kind: str
    weight: float
    files: Mapping[str, str]
    beneath: str | None = None
    squared_norm: float | None = None
    head: str | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None
    unverified: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """What makes it this model: name and commit, or name and digest."""
        return f"{self.name}@{self.commit or 'sha256:' + str(self.digest)}"

    @property
    def label(self) -> str:
        """Short form of the identity for tables and messages."""
        return f"{self.name}@{(self.commit or str(self.digest))[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `unverified` only where there is something in it."""
        data = {
            "name": self.name, "commit": self.commit, "digest": self.digest, "kind": self.kind, "weight": self.weight,
            "files": dict(self.files), "beneath": self.beneath, "squared_norm": self.squared_norm, "head": self.head,
            "labels": list(self.labels), "license": self.license,
        }  # fmt: skip
        return data | ({"unverified": list(self.unverified)} if self.unverified else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Material:
        """Inverse of `to_dict`."""
        lists = {"labels": tuple(data["labels"]), "unverified": tuple(data.get("unverified", ()))}
        return cls(**{**data, **lists})


@dataclass(frozen=True)
class KeptState:
    """A carried state that lies beside the weights: after how many models, its digest and bytes."""

    count: int
    sha256: str
    nbytes: int

    @property
    def file(self) -> str:
        """Its path in the repository."""
        return f"merge_state/{self.sha256}.safetensors"


@dataclass(frozen=True)
class Entry:
    """One action.

    Attributes:
        step: 1 for the first.
        parent: SHA-256 of the previous file's bytes, None for the first.
        action: "merge", "add" or "unmerge".
        subjects: names of the models the action added or removed.
        how: one line on how the result was computed.
        base, models: materials, the models in order of arrival.
        method: name, version, options, norm.
        settings: dtype, include, exclude, vocabulary, state, allow_nonfinite, allow_pickle, trust_remote_code.
        scalars: scale, merged_norm; of a randomized run its greatest measured deviation.
        states: kept states.
        products: path -> SHA-256 of every file of the output but card, ledger and states.
        environment: versions and device the bytes depend on.
    """

    step: int
    parent: str | None
    action: str
    subjects: tuple[str, ...]
    how: str
    base: Material
    models: tuple[Material, ...]
    method: Mapping[str, Any]
    settings: Mapping[str, Any]
    scalars: Mapping[str, float]
    states: tuple[KeptState, ...]
    products: Mapping[str, str]
    environment: Mapping[str, Any]

    @property
    def file(self) -> str:
        """Its path in the repository."""
        return f"{FOLDER}/{self.step:04d}.json"

    def to_bytes(self) -> bytes:
        """The file's bytes; their SHA-256 is what the next entry names."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "step": self.step,
                "parent": self.parent,
                "action": {"type": self.action, "models": list(self.subjects), "how": self.how},
                "materials": {"base": self.base.to_dict(), "models": [model.to_dict() for model in self.models]},
                "method": dict(self.method),
                "settings": dict(self.settings),
                "byproducts": {
                    "scalars": dict(self.scalars),
                    "states": [{"count": s.count, "sha256": s.sha256, "nbytes": s.nbytes} for s in self.states],
                },
                "products": dict(self.products),
                "environment": dict(self.environment),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Entry:
        """Read one file.

        Raises:
            LedgerError: not a ledger entry of this schema, or not as hfmerge writes one.
        """
        try:
            raw = json.loads(data)
            if raw["schema"] != SCHEMA:
                raise LedgerError(f"{where}: schema {raw['schema']!r}; this version reads {SCHEMA}.")
            entry = cls(
                step=int(raw["step"]),
                parent=raw["parent"],
                action=raw["action"]["type"],
                subjects=tuple(raw["action"]["models"]),
                how=raw["action"]["how"],
                base=Material.from_dict(raw["materials"]["base"]),
                models=tuple(Material.from_dict(model) for model in raw["materials"]["models"]),
                method=raw["method"],
                settings=raw["settings"],
                scalars=raw["byproducts"]["scalars"],
                states=tuple(KeptState(**state) for state in raw["byproducts"]["states"]),
                products=raw["products"],
                environment=raw["environment"],
            )
            canonical = entry.to_bytes()
            lost = [key for key, held in NEEDED.items() for name in held if name not in getattr(entry, key)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(f"{where}: not a ledger entry ({type(error).__name__}: {error}).") from error
        if canonical != data:
            raise LedgerError(f"{where} is not in canonical form; it was edited by hand.")
        if lost:
            raise LedgerError(f"{where}: its {lost[0]} are incomplete; it was edited by hand.")
        return entry

    def find(self, name: str) -> int:
        """Index of the model called `name` (`org/name`, with or without `@revision`, or a folder's name or path).

        Raises:
            LedgerError: not in the merge (nearest names suggested) or named twice.
        """
        import difflib

        wanted, revision = name.rstrip("/"), ""
        if not any(m.name in (wanted, Path(wanted).name) for m in self.models):  # folders may have an @ in their name
            wanted, _, revision = name.partition("@")
        hits = [i for i, m in enumerate(self.models) if m.name in (wanted, Path(wanted).name)]
        if revision:
            hits = [i for i in hits if (self.models[i].commit or self.models[i].digest or "").startswith(revision)]
        if len(hits) == 1:
            return hits[0]
        names = [model.name for model in self.models]
        if hits:
            raise LedgerError(f"{name}: in the merge {len(hits)} times; name its commit, `{wanted}@<commit>`.")
        near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise LedgerError(f"{name}: not in this merge, which holds {', '.join(names)}.{hint}")


def check_chain(files: Mapping[str, bytes], where: str) -> tuple[Entry, ...]:
    """All entries of a ledger, oldest first, after checking that each names its parent's digest.

    Args:
        files: path in the repository -> bytes.
        where: the merge's name, for errors.

    Raises:
        LedgerError: no ledger, a gap, or a broken link; names the file.
    """
    names = sorted(name for name in files if name.startswith(f"{FOLDER}/"))
    if not names:
        raise LedgerError(f"{where}: no {FOLDER}/ there; not a merge made by hfmerge.")
    entries: list[Entry] = []
    parent: str | None = None
    for step, name in enumerate(names, 1):
        if name != f"{FOLDER}/{step:04d}.json":
            raise LedgerError(f"{where}: {FOLDER}/{step:04d}.json is missing; the chain is broken.")
        entry = Entry.from_bytes(files[name], f"{where}: {name}")
        if entry.step != step or entry.parent != parent:
            previous = f"{FOLDER}/{step - 1:04d}.json" if step > 1 else "nothing"
            raise LedgerError(
                f"{where}: {name} names another parent than {previous}; one of the two was changed after it was "
                "written."
            )
        if entry.action not in ACTIONS:
            raise LedgerError(f"{where}: {name}: unknown action {entry.action!r}.")
        entries.append(entry)
        parent = sha256_bytes(files[name])
    return tuple(entries)


def settings_of(recipe: Recipe, card: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe an entry keeps beside models and method, and what the card needs to know of the base."""
    return {
        "dtype": recipe.dtype,
        "include": list(recipe.include),
        "exclude": list(recipe.exclude),
        "vocabulary": recipe.vocabulary,
        "state": recipe.state,
        "allow_nonfinite": recipe.allow_nonfinite,
        "allow_pickle": recipe.allow_pickle,
        "trust_remote_code": recipe.trust_remote_code,
        "card": dict(card),
    }


def recipe_of(entry: Entry, refs: Mapping[str, str]) -> Recipe:
    """The recipe that replays an entry.

    Args:
        refs: identity of a material -> reference to read it from (a folder's path); Hub materials need none.
    """
    settings = entry.settings
    return Recipe(
        base=reference(entry.base, refs),
        models=tuple(ModelEntry(reference(model, refs), model.weight) for model in entry.models),
        method=MethodChoice(entry.method["name"], dict(entry.method["options"]), entry.method["norm"]),
        dtype=settings["dtype"],
        include=tuple(settings["include"]),
        exclude=tuple(settings["exclude"]),
        vocabulary=settings["vocabulary"],
        state=settings["state"],
        allow_nonfinite=settings["allow_nonfinite"],
        allow_pickle=settings["allow_pickle"],
        trust_remote_code=settings["trust_remote_code"],
    )


def reference(material: Material, refs: Mapping[str, str]) -> str:
    """How to read a material again: its own commit on the Hub, or the folder that `refs` knows by its identity.

    Raises:
        LedgerError: a folder that `refs` does not know.
    """
    own = _located(material.identity, refs)
    return f"{_located(material.beneath, refs)}+{own}" if material.beneath else own


def _located(identity: str, refs: Mapping[str, str]) -> str:
    if identity in refs:
        return refs[identity]
    name, folder, _ = identity.rpartition("@sha256:")
    if folder:
        raise LedgerError(f"{name}: was merged from a folder; say where it is now with --source {name}=FOLDER.")
    return identity


def same_prefix(entry: Entry, target: Sequence[Material], count: int) -> bool:
    """True when an entry's first `count` models, with their weights, are those of `target`."""
    if count > len(entry.models) or count > len(target):
        return False
    pairs = zip(entry.models[:count], target[:count], strict=True)
    return all((a.identity, a.beneath, a.weight) == (b.identity, b.beneath, b.weight) for a, b in pairs)
