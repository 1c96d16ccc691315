"""What a certificate of removal states, and whether that holds for a merge.

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
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from hfmerge.digest import sha256_bytes
from hfmerge.dsse import IN_TOTO, Envelope
from hfmerge.errors import CertificateError
from hfmerge.ledger import Entry
from hfmerge.merged import Merged
from hfmerge.removal import Removal, find_removed
from hfmerge.signers import Trusted
from hfmerge.verifying import WEIGHTS, Check
from hfmerge.version import __version__


STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:x-hfmerge:removal:v1"
CLOCKS = timedelta(minutes=5)
"""How far apart the clocks of signer and reader may be."""
BASES = {
    "exact": "merged again from the materials, with the same bytes",
    "approximate": "merged again from the materials, with weights equal within the tolerance of other arithmetic, not "
    "byte for byte",
    None: "compared with the ledger, and not merged again",
}
"""How the subjects were compared before signing, by `recomputed`."""
NOT_PROVED = (
    "Earlier commits, tags, branches and pull requests of the repository may still hold weights that the model is in, "
    "until its history is purged.",
    "Copies of earlier weights, and models made from them, may exist elsewhere.",
    "The base and the other models may have been trained on the same data as the removed one.",
    "Materials are known by their digests; what is in them, and whether one is a copy of the removed model in another "
    "form, is not looked into.",
)


def statement_of(merged: Merged, removal: Removal, *, recomputed: str | None, days: float | None) -> dict[str, Any]:
    """The statement about a merge that has lost a model; see the module's docstring.

    Args:
        recomputed: how the materials, merged again, gave the weights: a key of `BASES`; None: they were not.
        days: validity from now on; None: for ever.
    """
    now = datetime.now(timezone.utc).replace(microsecond=0)
    base = merged.last.base.label
    names = ", ".join(model.label for model in merged.last.models)
    claim = (
        f"The subjects are the weights of a merge of {names} into {base}. {removal.part.label} is none of these "
        f"materials; it was taken out by step {removal.removed} of the ledger."
    )
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in _weights(merged.last).items()],
        "predicateType": PREDICATE,
        "predicate": {
            "claim": f"{claim} Before signing, the subjects were {BASES[recomputed]}.",
            "removed": {
                "identity": removal.part.identity,
                "role": removal.part.role,
                "files": dict(removal.part.files),
                "firstStep": removal.first,
                "lastStep": removal.last,
                "removedByStep": removal.removed,
            },
            "merge": {"name": merged.pinned.name, "commit": merged.pinned.commit},
            **_of_ledger(merged.last),
            "recomputed": recomputed or False,
            "issued": _written(now),
            "expires": None if days is None else _written(now + timedelta(days=days)),
            "tool": {"name": "hfmerge", "version": __version__},
            "notProved": list(NOT_PROVED),
        },
    }


def _weights(entry: Entry) -> dict[str, str]:
    return {name: digest for name, digest in entry.products.items() if name.endswith(WEIGHTS)}


def _of_ledger(entry: Entry) -> dict[str, Any]:
    """What of the predicate follows from the ledger's last entry."""
    recorded = json.loads(entry.to_bytes())
    return {
        "ledger": {"file": entry.file, "sha256": sha256_bytes(entry.to_bytes())},
        **{name: recorded[name] for name in ("materials", "method", "settings", "environment")},
    }


def check_signature(envelope: Envelope, trusted: Sequence[Trusted]) -> Check:
    """Whether one of the trusted keys signed the envelope."""
    if not envelope.signatures:
        return Check("signature", False, "the certificate is unsigned; ask for one made with --key")
    hints = ", ".join(_shown(one.keyid) or "a key it does not name" for one in envelope.signatures)
    if not trusted:
        todo = "say whose signature counts with --public-key or --allowed-signers"
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


def check_statement(envelope: Envelope, merged: Merged, now: datetime) -> list[Check]:
    """Whether a statement holds for a merge at this time; its signature is somebody else's matter."""
    try:
        statement = json.loads(envelope.payload)
        if envelope.payload_type != IN_TOTO or statement["_type"] != STATEMENT:
            return [Check("certificate", False, "not an in-toto statement of version 1")]
        if statement["predicateType"] != PREDICATE:
            kind = statement["predicateType"]
            return [Check("certificate", False, f"states {kind!r}; this version reads {PREDICATE}")]
        predicate = statement["predicate"]
        return [
            _validity(predicate["issued"], predicate["expires"], now),
            _subjects(statement["subject"], merged),
            _ledger(predicate, merged),
            _removed(predicate["removed"], merged),
            _recomputed(predicate),
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [Check("certificate", False, f"not a whole certificate ({type(error).__name__}: {error})")]


def _recomputed(predicate: Mapping[str, Any]) -> Check:
    """Whether the claim tells of the comparison before signing what `recomputed` does."""
    how = predicate["recomputed"]
    if how is True:  # of a version that did not tell exact from approximate
        return Check("recomputed", True, "the signer merged again; the certificate does not say whether byte for byte")
    basis = BASES.get(None if how is False else str(how))
    if basis is None or not str(predicate["claim"]).endswith(f"the subjects were {basis}."):
        return Check("recomputed", False, f"the claim does not say what recomputed: {_shown(how)} means")
    return Check("recomputed", True, f"before signing, the subjects were {basis}")


def _validity(issued: str, expires: str | None, now: datetime) -> Check:
    end = None if expires is None else _read(expires)
    if _read(issued) > now + CLOCKS:
        return Check("validity", False, f"issued on {issued}, which is in the future; check the clocks")
    if end is not None and now >= end:
        return Check("validity", False, f"the certificate expired on {expires}; ask for a new one")
    return Check("validity", True, f"issued on {issued}, {'does not expire' if end is None else f'until {expires}'}")


def _subjects(subjects: Sequence[Mapping[str, Any]], merged: Merged) -> Check:
    """The files themselves are compared with the ledger by `verify`; here the ledger with the certificate."""
    named = {str(one["name"]): str(one["digest"]["sha256"]) for one in subjects}
    here = _weights(merged.last)
    for name in sorted({*named, *here}):
        if named.get(name) != here.get(name):
            ours, theirs = (side.get(name, "none")[:12] for side in (here, named))
            what = f"{_shown(name)} is {ours} here, {_shown(theirs)} there"
            return Check("subjects", False, f"the certificate is for other weights: {what}")
    return Check("subjects", bool(named), f"{len(named)} weight files are those of the certificate")


def _ledger(predicate: Mapping[str, Any], merged: Merged) -> Check:
    given, here = predicate["merge"], merged.pinned
    wanted = _of_ledger(merged.last)
    if predicate["ledger"] != wanted["ledger"]:
        there = _shown(predicate["ledger"]["sha256"])[:12]
        mine = wanted["ledger"]["sha256"][:12]
        return Check("ledger head", False, f"the certificate is for another history: {mine} here, {there} there")
    for name, value in wanted.items():
        if predicate[name] != value:
            return Check("ledger head", False, f"the certificate's {name} are not those of {merged.last.file}")
    moved = (given["name"], given["commit"]) != (here.name, here.commit)
    origin = f"{_shown(given['name'])}@{_shown(given['commit'])[:8]}"
    made = f"; made for {origin}, equal to {here.label}" if moved else ""
    return Check("ledger head", True, f"{merged.last.file} is the one of the certificate{made}")


def _removed(removed: Mapping[str, Any], merged: Merged) -> Check:
    try:
        found = find_removed(merged.entries, removed["identity"], merged.pinned.label)
    except CertificateError as error:
        return Check("removed", False, _shown(error))
    steps = (removed["firstStep"], removed["lastStep"], removed["removedByStep"])
    if steps != (found.first, found.last, found.removed) or dict(found.part.files) != removed["files"]:
        return Check("removed", False, f"the ledger tells {found.part.label} otherwise than the certificate")
    return Check("removed", True, f"{found.part.label} was taken out by step {found.removed} and is not in the merge")


def _shown(value: object) -> str:
    """Text from a certificate on one line, so that it cannot pass for lines of the report."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def _written(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
