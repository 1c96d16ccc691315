"""The ledger: one immutable JSON file per action, each naming its parent's SHA-256, in in-toto's words.

The files are `merge_history/0001.json`, `0002.json`, ... An entry has four parts. Materials are the inputs, pinned by
commit and file digest. Method, settings and environment say how they were merged. Products are the output files with
their digests. Byproducts are the kept states, from which a change can continue. `sha256sum` checks the chain.
A merge is a function of its last entry alone: replaying it gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hfmerge.engine.options import Consent
from hfmerge.engine.plan import KeptState, checked_digest
from hfmerge.errors import LedgerError, NoLedgerError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.hub.reference import distinct_names
from hfmerge.ledger.learned import LearnedWeights
from hfmerge.ledger.schema import SCHEMA, check_entry
from hfmerge.recipe.keys import keys_of
from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe
from hfmerge.recipe.weights import Weight, restored, stored
from hfmerge.validation.limits import ENTRIES, ENTRY_BYTES
from hfmerge.validation.strict_json import read_json
from hfmerge.validation.wording import parameter


LEDGER_FOLDER = "merge_history"
ARCHIVES = "merge_state/sources"
"""Folder of the kept copies of sources (see `checkpoint.archive`)."""


@dataclass(frozen=True)
class Material:
    """A base or model that went into a merge.

    Attributes:
        name: repository ID or folder name.
        commit: 40 hex digits, None for a folder.
        digest: of a folder: SHA-256 over its files' digests; None on the Hub.
        kind: "full" or "adapter".
        weight: as given; 1.0 for the base. In the file one by pattern is a list of pairs.
        files: path -> SHA-256 of every file the merge read; a leading `+` marks those of the model beneath an adapter.
        beneath: for `base+adapter` on another model: identity of that model.
        squared_norm: squared norm of its task vector; None for the base.
        head: folder of its task head in the output, or None.
        labels: label names of that head.
        license: licence, as the model's card or configuration names it, or None.
        unverified: those of `files` that were streamed and not hashed. For them the digest is only what the Hub lists.
        ledger: of a model that is a merge by hfmerge itself: SHA-256 of its last ledger entry.
        contains: if the model is itself a merge, or lies on one: identities of all models in that merge (see
            `contained`).
        subtracted: the model is still in the carried state and was approximately subtracted from the merged change.
        trained_on: the base that an adapter's configuration names: a Hub ID, or a folder's own name. It is a claim.
        untied: the model changes one end of a weight that the base ties, so the merge has a tensor for every end.
        differing: in what the model is used otherwise than the base, such as "chat template"; see `settings` for the
            model whose files the merge has.
        kept: SHA-256 of the kept copy of the model, which lies beside the carried states.
        alias: what the user calls the model; see `Entry.names`.
    """

    name: str
    commit: str | None
    digest: str | None
    kind: str
    weight: Weight
    files: Mapping[str, str]
    beneath: str | None = None
    squared_norm: float | None = None
    head: str | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None
    unverified: tuple[str, ...] = ()
    ledger: str | None = None
    contains: tuple[str, ...] = ()
    subtracted: bool = False
    untied: bool = False
    trained_on: str | None = None
    differing: tuple[str, ...] = ()
    kept: str | None = None
    alias: str | None = None

    @property
    def identity(self) -> str:
        """Identity of the model: `name@commit`, or `name@sha256:digest` for a folder."""
        return f"{self.name}@{self.commit or 'sha256:' + str(self.digest)}"

    @property
    def label(self) -> str:
        """Short form of the identity for tables and messages, behind the alias."""
        return f"{self.alias} ({short(self.identity)})" if self.alias is not None else short(self.identity)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. The fields from `unverified` on are left out if they are not set."""
        data = {
            "name": self.name, "commit": self.commit, "digest": self.digest, "kind": self.kind,
            "weight": stored(self.weight), "files": dict(self.files), "beneath": self.beneath,
            "squared_norm": self.squared_norm, "head": self.head, "labels": list(self.labels),
            "license": self.license,
        }  # fmt: skip
        if self.unverified:
            data["unverified"] = list(self.unverified)
        if self.ledger is not None:
            data["ledger"] = self.ledger
        if self.contains:
            data["contains"] = list(self.contains)
        if self.subtracted:
            data["subtracted"] = True
        if self.untied:
            data["untied"] = True
        if self.trained_on is not None:
            data["trained_on"] = self.trained_on
        if self.differing:
            data["differing"] = list(self.differing)
        if self.kept is not None:
            data["kept"] = self.kept
        if self.alias is not None:
            data["alias"] = self.alias
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Material:
        """Inverse of `to_dict`; see `ledger.schema.material` for what is checked before."""
        lists = {key: tuple(data.get(key, ())) for key in ("unverified", "contains", "differing")}
        material = cls(**{**data, **lists, "labels": tuple(data["labels"]), "weight": restored(data["weight"])})
        return material


@dataclass(frozen=True)
class MethodUsed:
    """The method of a step: its name, its version, its options in the order of their names, and `norm` (`Recipe`)."""

    name: str
    version: int
    options: Mapping[str, Any]
    norm: float | str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"name": self.name, "version": self.version, "options": dict(self.options), "norm": self.norm}


@dataclass(frozen=True)
class RunScalars:
    """Numbers of a step.

    Attributes:
        scale: what the read-out was multiplied with.
        merged_norm: Frobenius norm of the merged change.
        deviation: of a randomized run its greatest measured deviation.
        grid: the step of exact sums.
        gap_bound: of a subtraction a bound of its gap to the exact removal, relative to the merged change.
        gap: that gap, where it was measured.
    """

    scale: float
    merged_norm: float
    deviation: float | None = None
    grid: float | None = None
    gap_bound: float | None = None
    gap: float | None = None

    def to_dict(self) -> dict[str, float]:
        """JSON-able; without those that do not apply."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Entry:
    """One action.

    Attributes:
        step: 1 for the first.
        parent: SHA-256 of the previous file's bytes, None for the first.
        action: one of `ledger.schema.ACTIONS`.
        subjects: names of the models that the action added, removed or ordered. "replace" names the old and the new
            model, "rebase" the new base.
        how: one line on how the result was computed.
        base, models: materials, the models in order of arrival.
        method: that made the weights.
        settings: the keys of the recipe that are declared to be recorded, and what the card says of the base (`card`).
            Consents are true where the merge needed them, which allows nobody anything.
        scalars: numbers of the run.
        states: kept states.
        products: path -> SHA-256 of every file of the output but card, ledger and states.
        environment: versions, device and arithmetic the bytes depend on; its `fingerprint` (see `environment`) is None
            where arithmetic of several kinds took part, and missing from entries of older versions.
        restored: for "restore" the number of the step that was brought back; else None.
        learned: how the weights were found; None if they were not learned.
    """

    step: int
    parent: str | None
    action: str
    subjects: tuple[str, ...]
    how: str
    base: Material
    models: tuple[Material, ...]
    method: MethodUsed
    settings: Mapping[str, Any]
    scalars: RunScalars
    states: tuple[KeptState, ...]
    products: Mapping[str, str]
    environment: Mapping[str, Any]
    restored: int | None = None
    learned: LearnedWeights | None = None

    @property
    def file(self) -> str:
        """Its path in the repository."""
        return f"{LEDGER_FOLDER}/{self.step:04d}.json"

    @property
    def names(self) -> tuple[str, ...]:
        """What the models are called, in order: the alias, or the name, with a number where another has it."""
        return tuple(distinct_names(model.alias or model.name for model in self.models))

    @property
    def labels(self) -> tuple[str, ...]:
        """The models for a table: each one's label, behind what it is called where that says more."""
        pairs = zip(self.names, self.models, strict=True)
        return tuple(m.label if name in (m.name, m.alias) else f"{name} ({short(m.identity)})" for name, m in pairs)

    def hits(self, name: str) -> list[int]:
        """Indices of the models that a name means: what they are called, or see `named`."""
        found = named(name, [model.identity for model in self.models])
        return sorted({*found, *(i for i, called in enumerate(self.names) if called == name)})

    @property
    def is_untied(self) -> bool:
        """Whether the merge has a tensor for every end of what the base ties."""
        return any(model.untied for model in self.models)

    @property
    def ran_code(self) -> bool:
        """Whether the entry says that code from the models' repositories was run for it."""
        return bool(self.settings["trust_remote_code"])

    @property
    def beside(self) -> dict[str, str]:
        """Path -> SHA-256 of the files beside the weights: carried states, copies of sources, replay rows."""
        copies = {archive_file(one.kept): one.kept for one in (self.base, *self.models) if one.kept is not None}
        learned = {} if self.learned is None else self.learned.files
        return {state.file: state.sha256 for state in self.states} | copies | learned

    def holding(self, paths: Collection[str]) -> Entry:
        """A copy of the entry that lists only the states and copies of sources that are there."""

        def held(one: Material) -> Material:
            return one if one.kept is None or archive_file(one.kept) in paths else replace(one, kept=None)

        states = tuple(state for state in self.states if state.file in paths)
        learned = self.learned
        if learned is not None and not all(path in paths for path in learned.files):
            learned = learned.without_files()
        return replace(
            self, states=states, base=held(self.base), models=tuple(map(held, self.models)), learned=learned
        )

    def to_bytes(self) -> bytes:
        """The file's bytes; their SHA-256 is what the next entry names."""
        return self._bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256_bytes(self._bytes)

    @cached_property
    def _bytes(self) -> bytes:
        action: dict[str, Any] = {"type": self.action, "models": list(self.subjects), "how": self.how}
        if self.restored is not None:
            action["restored"] = self.restored
        return canonical_json(
            {
                "schema": SCHEMA,
                "step": self.step,
                "parent": self.parent,
                "action": action,
                "materials": {"base": self.base.to_dict(), "models": [model.to_dict() for model in self.models]},
                "method": self.method.to_dict(),
                "settings": dict(self.settings),
                "byproducts": {
                    "scalars": self.scalars.to_dict(),
                    "states": [{"count": s.count, "sha256": s.sha256, "nbytes": s.nbytes} for s in self.states],
                    **({} if self.learned is None else {"learned": self.learned.to_dict()}),
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
            raw = read_json(data, ENTRY_BYTES)
            if isinstance(raw, dict) and isinstance(raw.get("schema"), str) and raw["schema"] != SCHEMA:
                raise LedgerError(f"{where}: schema {raw['schema']!r}; this version reads {SCHEMA}.")
            check_entry(raw)
        except ValueError as error:
            raise LedgerError(f"{where}: not a ledger entry: {error}.") from error
        learned = raw["byproducts"].get("learned")
        entry = cls(
            step=raw["step"],
            parent=raw["parent"],
            action=raw["action"]["type"],
            subjects=tuple(raw["action"]["models"]),
            how=raw["action"]["how"],
            base=Material.from_dict(raw["materials"]["base"]),
            models=tuple(Material.from_dict(model) for model in raw["materials"]["models"]),
            method=MethodUsed(**raw["method"]),
            settings=raw["settings"],
            scalars=RunScalars(**raw["byproducts"]["scalars"]),
            states=tuple(KeptState(**state) for state in raw["byproducts"]["states"]),
            products=raw["products"],
            environment=raw["environment"],
            restored=raw["action"].get("restored"),
            learned=None if learned is None else LearnedWeights.from_dict(learned),
        )
        if entry.to_bytes() != data:
            raise LedgerError(f"{where} is not in canonical form; it was edited by hand.")
        return entry

    def find(self, name: str, *, guess: bool = False) -> int:
        """Index of the model called `name` (`org/name`, with or without `@revision`, or a folder's name or path).

        Args:
            guess: also take the only model whose name is this one but for its owner, its revision and the case of its
                letters. What deletes nothing may guess.

        Raises:
            LedgerError: not in the merge (nearest names suggested), named twice, or a part of another model.
        """
        import difflib

        hits = self.hits(name)
        if len(hits) == 1:
            return hits[0]
        if hits:
            marks = " or ".join(short(self.models[i].identity) for i in hits)
            if len({short(self.models[i].identity) for i in hits}) < len(hits):  # one model under several names
                marks = " or ".join(self.names[i] for i in hits)
            raise LedgerError(f"{name}: is in the merge {len(hits)} times; name its commit: {marks}.")
        for model in self.models:
            if model.beneath and named(name, [model.beneath]):
                raise LedgerError(f"{name}: lies beneath the adapter {model.label}; name that one.")
            if named(name, model.contains):
                raise LedgerError(f"{name}: is a part of the merge {model.label}, not a model of its own here.")
        alike = [i for i, model in enumerate(self.models) if _loosely(model.name) == _loosely(name)]
        if len(alike) == 1:
            if guess:
                return alike[0]
            raise LedgerError(f"{name}: not in this merge; did you mean {self.models[alike[0]].name}?")
        names = list(dict.fromkeys(self.names))
        wanted = name.rstrip("/").partition("@")[0]
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise LedgerError(f"{name}: not in this merge, which holds {', '.join(names)}.{hint}")


def _loosely(name: str) -> str:
    """A name without owner, revision and case."""
    return Path(name.rstrip("/").partition("@")[0]).name.lower()


def named(name: str, identities: Sequence[str]) -> list[int]:
    """Indices of those identities that a name means: `org/name`, `org/name@revision`, a folder's name or path."""
    parts = [identity.rpartition("@") for identity in identities]
    wanted, revision = name.rstrip("/"), ""
    if not any(part[0] in (wanted, Path(wanted).name) for part in parts):  # folders may have an @ in their name
        wanted, _, revision = wanted.partition("@")
        revision = revision.removeprefix("sha256:")
    exact = any(part[0] == wanted for part in parts)
    names = (wanted,) if exact else (wanted, Path(wanted).name)
    hits = [i for i, (own, _, _) in enumerate(parts) if own in names]
    return [i for i in hits if parts[i][2].removeprefix("sha256:").startswith(revision)]


def archive_file(digest: str) -> str:
    """Path in the repository of a kept copy of a source."""
    return f"{ARCHIVES}/{checked_digest(digest)}.zip"


def short(identity: str) -> str:
    """An identity with the first eight digits of its commit or digest."""
    name, _, pin = identity.rpartition("@")
    return f"{name}@{pin.removeprefix('sha256:')[:8]}"


def contained(entry: Entry) -> tuple[str, ...]:
    """Identities of everything in a merge: base, models, models beneath adapters, and all that merges among them hold.

    Each once, in the order of the ledger, a merge before its contents.
    """
    found: list[str] = []
    for material in (entry.base, *entry.models):
        found += [material.identity, *([material.beneath] if material.beneath else ()), *material.contains]
    return tuple(dict.fromkeys(found))


def ledger_files(names: Iterable[str]) -> list[str]:
    """Those of the names that lie in the ledger's folder, by their step: `9999.json` comes before `10000.json`."""
    return sorted((name for name in names if name.startswith(f"{LEDGER_FOLDER}/")), key=_by_step)


def _by_step(name: str) -> tuple[int, str]:
    number = re.fullmatch(r"([0-9]{4,9})\.json", name[len(LEDGER_FOLDER) + 1 :])
    return (int(number[1]) if number else 0, name)


def check_chain(files: Mapping[str, bytes], where: str) -> tuple[Entry, ...]:
    """All entries of a ledger, oldest first, after checking that each names its parent's digest.

    Args:
        files: path in the repository -> bytes.
        where: the merge's name, for errors.

    Raises:
        LedgerError: no ledger, one of too many entries, a gap, or a broken link; names the file.
    """
    names = ledger_files(files)
    if not names:
        raise NoLedgerError(f"{where}: no {LEDGER_FOLDER}/ there; not a merge made by hfmerge.")
    check_size(names, where)
    entries: list[Entry] = []
    parent: str | None = None
    for step, name in enumerate(names, 1):
        if name != f"{LEDGER_FOLDER}/{step:04d}.json":
            raise LedgerError(f"{where}: {LEDGER_FOLDER}/{step:04d}.json is missing; the chain is broken.")
        entry = Entry.from_bytes(files[name], f"{where}: {name}")
        if entry.step != step or entry.parent != parent:
            previous = f"{LEDGER_FOLDER}/{step - 1:04d}.json" if step > 1 else "nothing"
            raise LedgerError(
                f"{where}: {name} names another parent than {previous}; one of the two was changed after it was "
                "written."
            )
        known = entry.restored is None if entry.action != "restore" else 0 < (entry.restored or 0) < step
        if not known:
            raise LedgerError(f"{where}: {name}: restores step {entry.restored}, but there is no such step before it.")
        entries.append(entry)
        parent = entry.digest
    return tuple(entries)


def check_size(names: Sequence[str], where: str) -> None:
    """Refuse a ledger of more entries than the limit, before any is read. Raises LedgerError."""
    try:
        ENTRIES.check(len(names))
    except ValueError as error:
        raise LedgerError(f"{where}: {LEDGER_FOLDER}/ {error}.") from error


def settings_of(recipe: Recipe, card: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of an entry: the recorded keys of a recipe, and facts on the base for the card."""
    values = recipe.to_dict()
    kept = [
        key.name
        for key in keys_of(Recipe)
        if (recorded := key.declared.get("recorded")) == "always"
        or (recorded == "set" and getattr(recipe, key.name) != key.default)
    ]
    return {**{name: values[name] for name in kept}, "card": dict(card)}


def recipe_of(entry: Entry, refs: Mapping[str, str], consent: Consent, *, base: str | None = None) -> Recipe:
    """The recipe that replays an entry, as far as the caller allows it.

    Args:
        consent: the caller's consent. What the entry records of earlier consents does not count as one. Code is run
            only if the caller allows it and the entry says that code was run.
        refs: identity of a material -> reference to read it from (a folder's path); Hub materials need none.
        base: reference of another base to take instead.
    """
    settings = {
        key.name: key.stored(entry.settings[key.name]) for key in keys_of(Recipe) if key.name in entry.settings
    }
    recipe = Recipe(
        base=material_reference(entry.base, refs) if base is None else base,
        models=tuple(
            ModelEntry(material_reference(model, refs), model.weight, model.subtracted, alias=model.alias)
            for model in entry.models
        ),
        method=MethodChoice(entry.method.name, dict(entry.method.options), entry.method.norm),
        **settings,
    )
    ran_code = consent.trust_remote_code and entry.ran_code
    return replace(recipe, allow_pickle=consent.allow_pickle, trust_remote_code=ran_code)


def material_reference(material: Material, refs: Mapping[str, str]) -> str:
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
        todo = parameter("sources", {name: "FOLDER"})
        raise LedgerError(f"{name}: was merged from a folder; say where it is now with {todo}.")
    return identity


def same_prefix(entry: Entry, target: Sequence[Material], count: int) -> bool:
    """True when an entry's first `count` models, with their weights, are those of `target`."""
    if count > len(entry.models) or count > len(target):
        return False
    return all(map(same_model, entry.models[:count], target[:count]))


def same_model(a: Material, b: Material) -> bool:
    """True when two materials are one model with one weight: the same in a carried state."""
    return (a.identity, a.beneath, a.weight) == (b.identity, b.beneath, b.weight)
