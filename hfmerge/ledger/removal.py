"""Finds a model that was removed from a merge, and checks that no copy of it is left under another name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hfmerge.errors import CertificateError
from hfmerge.ledger.entry import Entry, named, short
from hfmerge.validation.wording import call


SUBTRACTED = "only approximately subtracted"
INSIDE = "part of "


@dataclass(frozen=True)
class ContainedModel:
    """A model in a merge.

    Attributes:
        identity: name and commit, or name and digest, as the ledger writes them.
        role: how the model takes part: "base", "model", "only approximately subtracted" (as the ledger's
            `subtracted`), "beneath ORG/ADAPTER" or "part of ORG/MERGE".
        files: path -> SHA-256 of the files that were read; empty for a model inside an inner merge.
    """

    identity: str
    role: str
    files: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        """Repository ID or folder name."""
        return self.identity.rpartition("@")[0]

    @property
    def label(self) -> str:
        """Short form of the identity for messages."""
        return short(self.identity)

    @property
    def read(self) -> bool:
        """Whether files of the model were read. False for a model inside an inner merge, whose files are not known."""
        return not self.role.startswith(INSIDE)

    @property
    def weights(self) -> frozenset[str]:
        """Digests of its weight files."""
        return frozenset(digest for name, digest in self.files.items() if name.endswith((".safetensors", ".bin")))


@dataclass(frozen=True)
class RemovedModel:
    """A model that was in a merge and is no longer.

    Attributes:
        part: the model, as the last step that held it records it.
        first, last: numbers of the first and the last step that held the model.
        removed: number of the step that took it out.
    """

    model: ContainedModel
    first: int
    last: int
    removed: int


def contained_models(entry: Entry) -> tuple[ContainedModel, ...]:
    """Every model that is in the weights of a step, models inside merged merges included; see `entry.contained`."""
    found = []
    for role, material in (("base", entry.base), *(("model", model) for model in entry.models)):
        own = {name: digest for name, digest in material.files.items() if not name.startswith("+")}
        found.append(ContainedModel(material.identity, SUBTRACTED if material.subtracted else role, own))
        if material.beneath is not None:
            under = {name[1:]: digest for name, digest in material.files.items() if name.startswith("+")}
            found.append(ContainedModel(material.beneath, f"beneath {material.name}", under))
        found.extend(ContainedModel(identity, f"{INSIDE}{material.name}", {}) for identity in material.contains)
    return tuple(found)


def find_removed(entries: Sequence[Entry], model: str, where: str) -> RemovedModel:
    """The model that a merge has lost.

    Args:
        entries: its ledger, oldest first.
        model: name as the ledger has it, with or without `@` and the beginning of its commit or digest.
        where: the merge's name, for errors.

    Raises:
        CertificateError: the model was never in the merge (the error suggests near names), the model is still in it
            under this name or another, or the name fits several models.
    """
    steps = [contained_models(entry) for entry in entries]
    known: dict[str, ContainedModel] = {}
    for part in (part for step in steps for part in step):
        # a model inside an inner merge has no files here; prefer the record in which it was read itself
        if part.read or part.identity not in known:
            known[part.identity] = part
    now = {part.identity: part for part in reversed(steps[-1])}  # if a model has several roles, the first counts
    identities = list(known)
    hits = [model] if model in known else [identities[i] for i in named(model, identities)]
    if not hits:  # what a step called the model
        hits = list(dict.fromkeys(entry.models[i].identity for entry in entries for i in entry.hits(model)))
    if not hits:
        names = list(dict.fromkeys(part.name for part in known.values()))
        near = difflib.get_close_matches(model.partition("@")[0], names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise CertificateError(f"{model}: never was in {where}, whose ledger knows {', '.join(names)}.{hint}")
    absent = [identity for identity in hits if identity not in now]
    if not absent:
        part = now[hits[0]]
        todo = "to be without it, merge on another base, or merge models that do not contain it"
        if part.role in ("model", SUBTRACTED):
            todo = f"{call('unmerge', where.partition('@')[0], remove=part.name)} takes it out"
        raise CertificateError(f"{model}: still in {where} ({part.label}, {part.role}); {todo}.")
    if len(hits) > 1:
        states = ", ".join(f"{short(one)} ({'still there' if one in now else 'removed'})" for one in hits)
        raise CertificateError(f"{model}: {where} has had it in {len(hits)} states: {states}; name the commit.")
    part = known[absent[0]]
    check_no_copy(part, steps[-1], model, where)
    held = [entry.step for entry, step in zip(entries, steps, strict=True) if part.identity in _identities(step)]
    return RemovedModel(part, held[0], held[-1], held[-1] + 1)


def check_no_copy(removed: ContainedModel, present: Sequence[ContainedModel], model: str, where: str) -> None:
    """Check that no file of the merge's models has the digest of a weight file of a removed model.

    Args:
        model, where: the model and the merge, for the error.

    Raises:
        CertificateError: a file has such a digest.
    """
    for other in present:
        if not removed.weights.isdisjoint(other.files.values()):
            raise CertificateError(
                f"{model}: left {where} under this name, but the same weights are still in it as {other.label} "
                f"({other.role})."
            )


def _identities(step: Sequence[ContainedModel]) -> list[str]:
    return [part.identity for part in step]
