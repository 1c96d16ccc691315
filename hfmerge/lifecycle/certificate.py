"""The statement of a certificate of removal: how it is written, and how it is checked against a merge.

A certificate is an in-toto Statement v1 in a DSSE envelope, signed with an ed25519 key:

    _type          https://in-toto.io/Statement/v1
    subject        the weight files of the merge: path in the repository, SHA-256
    predicateType  urn:x-hfmerge:removal:v1
    predicate
      claim        the statement in words
      removed      the model: identity (name and commit, or name and digest of a folder), role, digests of its
                   files, the first and the last step that held it, and the step that took it out
      merge        name and commit; null for a folder
      ledger       file and SHA-256 of the last entry
      materials    base and models, as that entry records them: name, commit or digest, weight, SHA-256 of every file
      method, settings, environment      as that entry records them: what a recomputation needs
      recomputed   "exact": the signer merged the materials again and got the subjects, byte for byte; "approximate":
                   within the tolerance of other arithmetic; false: the signer only compared digests
      issued, expires                    UTC; `expires` is null if it does not
      tool         name and version
      notProved    what this does not say

The chain of proof: the signature covers the statement; the statement names the weights and the ledger's head by
digest; the ledger names what they were made of; and merging that again gives the weights. All of it but the signature
can be checked by anybody, without trust in the signer, by `hfmerge verify MERGED --certificate FILE --replay`.

To check a certificate, hfmerge writes the statement again from the merge and compares every byte. Only the fields of
`Told` are taken from the signer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from hfmerge.errors import CertificateError
from hfmerge.hashing import canonical_json
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.removal import RemovedModel, find_removed
from hfmerge.ledger.repository import Merged
from hfmerge.lifecycle.dsse import IN_TOTO, Envelope
from hfmerge.lifecycle.keys import Trusted
from hfmerge.lifecycle.verify import WEIGHTS, Check
from hfmerge.validation.limits import CERTIFICATE_BYTES, TEXT
from hfmerge.validation.quoting import plain
from hfmerge.validation.strict_json import read_json
from hfmerge.validation.wording import parameter
from hfmerge.version import __version__


STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:x-hfmerge:removal:v1"
CLOCKS = timedelta(minutes=5)
"""Largest accepted difference between the clocks of signer and reader."""
BASES: Sequence[tuple[Any, str]] = (
    ("exact", "merged again from the materials, with the same bytes"),
    (
        "approximate",
        "merged again from the materials, with weights equal within the tolerance of other arithmetic, not byte for "
        "byte",
    ),
    (False, "compared with the ledger, and not merged again"),
    (True, "merged again from the materials"),  # written by versions that did not distinguish exact from approximate
)
"""Values of `recomputed` -> words of the claim: what the signer did with the subjects before signing."""
NOT_PROVED = (
    "Earlier commits, tags, branches and pull requests of the repository may still hold weights that the model is in, "
    "until its history is purged.",
    "Copies of earlier weights, and models made from them, may exist elsewhere.",
    "The base and the other models may have been trained on the same data as the removed one.",
    "Materials are known by their digests; what is in them, and whether one is a copy of the removed model in another "
    "form, is not looked into.",
)


@dataclass(frozen=True)
class Told:
    """The fields of a statement that do not follow from the merge: the signer's own claims.

    Attributes:
        recomputed: one of `BASES`.
        issued, expires: UTC as the statement writes it; `expires` is None if it does not.
        name, commit: of the merge that the signer looked at. It may lie elsewhere now, with the same content.
        version: of the hfmerge that wrote the statement.
    """

    recomputed: Any
    issued: str
    expires: str | None
    name: str
    commit: str | None
    version: str

    @property
    def origin(self) -> str:
        """The merge that the signer looked at, for messages."""
        return plain(f"{self.name}@{self.commit[:8]}" if self.commit else self.name)

    @classmethod
    def of(cls, predicate: Mapping[str, Any]) -> Told:
        """What the signer of a predicate says.

        Raises:
            KeyError, TypeError, ValueError: missing, of another type, or not in the form that `statement_of` writes.
        """
        merge, tool = predicate["merge"], predicate["tool"]
        told = cls(
            predicate["recomputed"], predicate["issued"], predicate["expires"], merge["name"], merge["commit"],
            tool["version"],
        )  # fmt: skip
        _basis(told.recomputed)
        for moment in (told.issued, *(() if told.expires is None else (told.expires,))):
            if _written(_read(moment)) != moment:
                raise ValueError(f"{moment!r} is not written as YYYY-MM-DDTHH:MM:SSZ")
        if not isinstance(told.name, str) or not told.name:
            raise ValueError("the merge has no name")
        TEXT.check(len(told.name))
        if told.commit is not None and not re.fullmatch("[0-9a-f]{40}", told.commit):
            raise ValueError(f"{told.commit!r} is no commit")
        if not re.fullmatch(r"[0-9A-Za-z.+-]{1,64}", told.version):
            raise ValueError(f"{told.version!r} is no version")
        return told


def statement_of(
    merged: Merged, removal: RemovedModel, *, recomputed: str | None, days: float | None
) -> dict[str, Any]:
    """The statement about a merge that has lost a model; see the module's docstring.

    Args:
        recomputed: how the materials, merged again, gave the weights: "exact" or "approximate"; None: they were not.
        days: validity from now on; None: for ever.
    """
    now = datetime.now(timezone.utc).replace(microsecond=0)
    expires = None if days is None else _written(now + timedelta(days=days))
    here = merged.snapshot
    told = Told(recomputed or False, _written(now), expires, here.name, here.commit, __version__)
    return _statement(merged, removal, told)


def _statement(merged: Merged, removal: RemovedModel, told: Told) -> dict[str, Any]:
    """The one statement that is true of a merge, a removal, and what the signer says."""
    base = merged.last.base.label
    names = ", ".join(model.label for model in merged.last.models)
    claim = (
        f"The subjects are the weights of a merge of {names} into {base}. {removal.model.label} is neither one of "
        f"these models nor the base; it was taken out by step {removal.removed} of the ledger."
    )
    return {
        "_type": STATEMENT,
        "subject": _subjects_of(merged.last),
        "predicateType": PREDICATE,
        "predicate": {
            "claim": f"{claim} Before signing, the subjects were {_basis(told.recomputed)}.",
            "removed": _removed_of(removal),
            "merge": {"name": told.name, "commit": told.commit},
            **_of_ledger(merged.last),
            "recomputed": told.recomputed,
            "issued": told.issued,
            "expires": told.expires,
            "tool": {"name": "hfmerge", "version": told.version},
            "notProved": list(NOT_PROVED),
        },
    }


def _basis(recomputed: object) -> str:
    """What a signer did with the subjects, in words.

    Raises:
        ValueError: none of `BASES`.
    """
    # in Python 1 equals True, and in a certificate it does not
    for value, words in BASES:
        if type(value) is type(recomputed) and value == recomputed:
            return words
    raise ValueError(f"recomputed is {recomputed!r}")


def _subjects_of(entry: Entry) -> list[dict[str, Any]]:
    return [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in _weights(entry).items()]


def _removed_of(removal: RemovedModel) -> dict[str, Any]:
    return {
        "identity": removal.model.identity,
        "role": removal.model.role,
        "files": dict(removal.model.files),
        "firstStep": removal.first,
        "lastStep": removal.last,
        "removedByStep": removal.removed,
    }


def _weights(entry: Entry) -> dict[str, str]:
    return {name: digest for name, digest in entry.products.items() if name.endswith(WEIGHTS)}


def _of_ledger(entry: Entry) -> dict[str, Any]:
    """The fields of the predicate that follow from the ledger's last entry."""
    recorded = json.loads(entry.to_bytes())
    return {
        "ledger": {"file": entry.file, "sha256": entry.digest},
        **{name: recorded[name] for name in ("materials", "method", "settings", "environment")},
    }


def check_signature(envelope: Envelope, trusted: Sequence[Trusted]) -> Check:
    """Whether one of the trusted keys signed the envelope."""
    if not envelope.signatures:
        return Check("signature", False, f"the certificate is unsigned; ask for one made with {parameter('key')}")
    hints = ", ".join(plain(one.keyid) or "a key it does not name" for one in envelope.signatures)
    if not trusted:
        todo = f"say whose signature counts with {parameter('public_key')} or {parameter('allowed_signers')}"
        return Check("signature", False, f"signed with {hints}; {todo}")
    from cryptography.exceptions import InvalidSignature

    for one in envelope.signatures:
        for owner in trusted:
            try:
                owner.key.verify(one.sig, envelope.signed_bytes)
            except InvalidSignature:
                continue
            return Check("signature", True, f"made by {owner.name} ({owner.keyid})")
    keyids = [owner.keyid for owner in trusted]
    if any(one.keyid in keyids for one in envelope.signatures):
        return Check("signature", False, f"the statement was changed after it was signed with {hints}")
    return Check("signature", False, f"made with another key: signed with {hints}, trusted: {', '.join(keyids)}")


def check_statement(envelope: Envelope, merged: Merged, now: datetime, *, replay: bool = False) -> list[Check]:
    """Whether a statement holds for a merge at this time; `check_signature` checks its signature.

    Args:
        replay: the caller also merges the materials again.
    """
    try:
        statement = read_json(envelope.payload, CERTIFICATE_BYTES)
        if envelope.payload_type != IN_TOTO or statement["_type"] != STATEMENT:
            return [Check("certificate", False, "not an in-toto statement of version 1")]
        if statement["predicateType"] != PREDICATE:
            kind = plain(repr(statement["predicateType"]))
            return [Check("certificate", False, f"states {kind}; this version reads {PREDICATE}")]
        predicate = statement["predicate"]
        told = Told.of(predicate)
        return [
            _validity(told, now),
            _subjects(statement["subject"], merged),
            _ledger(predicate, told, merged),
            *_removed(envelope.payload, statement, told, merged),
            _recomputed(told, replay),
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [Check("certificate", False, f"not a whole certificate ({type(error).__name__}: {plain(error)})")]


def _validity(told: Told, now: datetime) -> Check:
    issued, expires = told.issued, told.expires
    if _read(issued) > now + CLOCKS:
        return Check("validity", False, f"issued on {issued}, which is in the future; check the clocks")
    if expires is not None and now >= _read(expires):
        return Check("validity", False, f"the certificate expired on {expires}; ask for a new one")
    return Check(
        "validity", True, f"issued on {issued}, {'does not expire' if expires is None else f'until {expires}'}"
    )


def _subjects(subjects: Sequence[Mapping[str, Any]], merged: Merged) -> Check:
    """Compare the ledger's digests with the certificate; `verify` compares the files with the ledger."""
    names = [str(one["name"]) for one in subjects]
    named = {str(one["name"]): str(one["digest"]["sha256"]) for one in subjects}
    here = _weights(merged.last)
    if len(named) < len(names):
        return Check("subjects", False, "the certificate names a file twice, so that readers may differ on its digest")
    for name in sorted({*named, *here}):
        if named.get(name) != here.get(name):
            ours, theirs = (side.get(name, "none")[:12] for side in (here, named))
            what = f"{plain(name)} is {ours} here, {plain(theirs)} there"
            return Check("subjects", False, f"the certificate is for other weights: {what}")
    return Check("subjects", bool(named), f"{len(named)} weight files are those of the certificate")


def _ledger(predicate: Mapping[str, Any], told: Told, merged: Merged) -> Check:
    here, wanted = merged.snapshot, _of_ledger(merged.last)
    if not _same(predicate["ledger"], wanted["ledger"]):
        there = plain(predicate["ledger"]["sha256"])[:12]
        mine = wanted["ledger"]["sha256"][:12]
        return Check("ledger head", False, f"the certificate is for another history: {mine} here, {there} there")
    for name, value in wanted.items():
        if not _same(predicate[name], value):
            return Check("ledger head", False, f"the certificate's {name} are not those of {merged.last.file}")
    moved = (told.name, told.commit) != (here.name, here.commit)
    made = f"; made for {told.origin}, equal to {here.label}" if moved else ""
    return Check("ledger head", True, f"{merged.last.file} is the one of the certificate{made}")


def _removed(payload: bytes, statement: Mapping[str, Any], told: Told, merged: Merged) -> list[Check]:
    """Whether the model is gone, and whether all that the certificate says of it follows from the ledger."""
    removed = statement["predicate"]["removed"]
    TEXT.check(len(removed["identity"]))  # it is compared with all names of the ledger
    try:
        found = find_removed(merged.entries, removed["identity"], merged.snapshot.label)
    except CertificateError as error:
        return [Check("removed", False, plain(error))]
    label = found.model.label
    if not _same(removed, _removed_of(found)):
        return [Check("removed", False, f"the ledger records {label} differently from the certificate")]
    gone = f"{label} was taken out by step {found.removed} and is not in the merge"
    return [Check("removed", True, gone), _words(payload, statement, _statement(merged, found, told))]


def _words(payload: bytes, statement: Mapping[str, Any], wanted: Mapping[str, Any]) -> Check:
    """Whether a statement is, byte for byte, the one that follows from the merge."""
    theirs, ours = _flat(statement), _flat(wanted)
    for name in sorted({*theirs, *ours}):
        if name not in theirs:
            return Check("statement", False, f"the certificate lacks {name}")
        if name not in ours:
            return Check("statement", False, f"the certificate says {plain(name)}, which no certificate has")
        if not _same(theirs[name], ours[name]):
            return Check("statement", False, f"the certificate's {name} is not what follows from the ledger")
    if payload != canonical_json(wanted):
        return Check("statement", False, "the certificate is not written as hfmerge writes one")
    return Check("statement", True, "every field is the one that follows from the ledger")


def _flat(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a statement, and those of its predicate under `predicate.`."""
    own = {key: value for key, value in statement.items() if key != "predicate"}
    return own | {f"predicate.{key}": value for key, value in statement["predicate"].items()}


def _recomputed(told: Told, replay: bool) -> Check:
    """What the signer says of a replay is not checked; only a replay by the reader shows its result."""
    here = "the check `replay` of this run shows the result"
    shows = here if replay else f"not checked here; {parameter('replay', True)} checks it"
    return Check("recomputed", True, f"the signer says that the subjects were {_basis(told.recomputed)}; {shows}")


def _same(one: object, other: object) -> bool:
    """Equal as JSON; in Python 1 equals True and 1.0."""
    return canonical_json(one) == canonical_json(other)


def _written(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
