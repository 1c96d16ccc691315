"""Makes and checks certificates of removal. `certificate` describes their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfmerge.engine.options import NO_CONSENT, Consent
from hfmerge.engine.workspace import recover
from hfmerge.errors import CertificateError, HfMergeError, VerificationError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.ledger.entry import short
from hfmerge.ledger.removal import ContainedModel, RemovedModel, check_no_copy, contained_models, find_removed
from hfmerge.ledger.repository import Merged, open_merged
from hfmerge.ledger.seen import acceptance, refuse_rewritten, remember
from hfmerge.lifecycle.certificate import check_signature, check_statement, statement_of
from hfmerge.lifecycle.dsse import Envelope, Signature
from hfmerge.lifecycle.keys import Trusted, allowed_signers, key_fingerprint, private_key, public_keys
from hfmerge.lifecycle.verify import Check, FurtherChecks, check_merged
from hfmerge.lifecycle.witness import append, read_log
from hfmerge.validation.limits import CERTIFICATE_BYTES
from hfmerge.validation.strict_json import read_limited
from hfmerge.validation.wording import parameter


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class Certificate:
    """A certificate of removal that was just made.

    Attributes:
        envelope: the file's content.
        statement: the statement in the envelope, see `certificate`.
        removal: the model and its steps.
        keyid: fingerprint of the key, None if nobody signed.
        warnings: what the user should know.
    """

    envelope: Envelope = field(repr=False)
    statement: Mapping[str, Any] = field(repr=False)
    removal: RemovedModel
    keyid: str | None
    warnings: tuple[str, ...]


def make_certificate(
    ref: str,
    model: str,
    *,
    key: str | Path | None = None,
    days: float | None = None,
    replay: bool = False,
    accept_approximate: bool = False,
    device: str | None = None,
    sources: Mapping[str, str] | None = None,
    log: str | Path | None = None,
    consent: Consent = NO_CONSENT,
) -> Certificate:
    """Certify that a merge no longer holds a model, after checking it against its ledger.

    Args:
        ref: `org/name[@revision]` or a folder.
        model: name of the removed model (see `find_removed`).
        key: file of an ed25519 private key; None: unsigned, with a warning.
        days: validity from now on; None: for ever.
        replay: also merge the materials again first, and state that.
        accept_approximate: certify also weights that come out equal only within the tolerance of other arithmetic;
            the certificate says so.
        device: where a replay computes, see `RunOptions.device`.
        sources: name of a folder material -> where it lies now.
        log: see `witness`; checked first, and a record is added.
        consent: what a replay may do with the sources.

    Raises:
        CertificateError: the model was never in the merge or still is, or the key cannot be used.
        VerificationError: the merge is not what its ledger says. LedgerError: the log is broken.
        SourceError: not found or not readable. OutputError: the log cannot be written.
    """
    if accept_approximate and not replay:
        raise CertificateError(
            f"{parameter('accept_approximate', True)}: only a replay can be approximate; pass "
            f"{parameter('replay', True)} too."
        )
    if days is not None and not 0 < days <= 36500:
        raise CertificateError(f"{parameter('days', days)}: write a number of days, above 0 and up to 36500.")
    signer = private_key(key) if key is not None else None
    recover(ref)
    merged = open_merged(ref, sources, consent)
    refuse_rewritten(merged)
    if log is not None and (problem := read_log(log).problem(merged)) is not None:
        raise VerificationError(f"{merged.snapshot.label}: not certified; {problem}; {acceptance(merged, log)}.")
    removal = find_removed(merged.entries, model, merged.snapshot.label)
    warnings = copies_inside(merged, removal.model, model)
    report = check_merged(merged, FurtherChecks(replay, device))
    if report.verdict != "ok" and not (accept_approximate and report.verdict == "approximate"):
        todo = f"; certify where it was made, or pass {parameter('accept_approximate', True)}"
        todo = "" if report.verdict == "failed" else todo
        raise VerificationError(f"{merged.snapshot.label}: not certified; {report.culprits[0]}{todo}")
    recomputed = {"ok": "exact"}.get(report.verdict, "approximate") if replay else None
    statement = statement_of(merged, removal, recomputed=recomputed, days=days)
    envelope, keyid = _signed(Envelope(canonical_json(statement)), signer)
    if keyid is None:
        warnings.append(
            f"the certificate is unsigned: nobody vouches for it. Sign with {parameter('key', 'FILE')} "
            "(`ssh-keygen -t ed25519` makes one), or vouch for the file by other means, such as `sigstore sign`."
        )
    if (note := remember(merged)) is not None:
        warnings.append(note)
    if log is not None:
        append(log, merged, "certified", certificate=sha256_bytes(envelope.to_bytes()))
    return Certificate(envelope, statement, removal, keyid, tuple(warnings))


def copies_inside(merged: Merged, removed: ContainedModel, model: str, seen: set[str] | None = None) -> list[str]:
    """Look into the ledgers of merges that were merged for the weights of a model that has left, under any name.

    Args:
        model: as it was asked for.
        seen: identities of merges that were looked into.

    Returns:
        Warnings: merges that cannot be read.

    Raises:
        CertificateError: there is one.
    """
    seen, notes = set() if seen is None else seen, []
    for material in (merged.last.base, *merged.last.models):
        inner = material.identity if material.ledger is not None else material.beneath if material.contains else None
        if inner is None or inner in seen:
            continue
        seen.add(inner)
        try:
            opened = open_merged(merged.refs.get(inner, inner))
        except HfMergeError as error:
            notes.append(f"copies of {removed.name} were not looked for in {short(inner)}, a merge itself: {error}")
            continue
        inside = [replace(part, role=f"{part.role} of {short(inner)}") for part in contained_models(opened.last)]
        check_no_copy(removed, inside, model, merged.snapshot.label)
        notes += copies_inside(opened, removed, model, seen)
    return notes


@dataclass(frozen=True)
class Given:
    """A certificate to check, and the keys that are trusted.

    Attributes:
        envelope: the certificate.
        sha256: SHA-256 of its file.
        trusted: keys whose signature counts; None: no signature is asked for.
    """

    envelope: Envelope = field(repr=False)
    sha256: str
    trusted: tuple[Trusted, ...] | None

    def checks(self, merged: Merged, *, replay: bool) -> list[Check]:
        """Whether the certificate is signed and holds for a merge; `replay`: the caller also makes a replay."""
        if self.trusted is None:
            signature = Check("signature", True, "not looked at, as asked; nobody vouches for the certificate")
        else:
            signature = check_signature(self.envelope, self.trusted)
        if not signature.ok:
            return [signature]
        return [signature, *check_statement(self.envelope, merged, datetime.now(timezone.utc), replay=replay)]


def given_certificate(
    certificate: str | Path,
    *,
    public_key: str | Path | None = None,
    signers: str | Path | None = None,
    unsigned: bool = False,
) -> Given:
    """Read a certificate of removal, and the keys that are trusted.

    Args:
        certificate: file that `make_certificate` gave.
        public_key: file of the key, or keys, that are trusted.
        signers: file of allowed signers, in OpenSSH's form.
        unsigned: look into the certificate though no signature is checked.

    Raises:
        CertificateError: the certificate or a key cannot be read.
    """
    try:
        data = read_limited(Path(certificate).expanduser(), CERTIFICATE_BYTES)
    except OSError as error:
        raise CertificateError(f"{certificate}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CertificateError(f"{certificate}: {error}; give the file that `hfmerge certify` wrote.") from error
    now = datetime.now(timezone.utc)
    trusted = (*(public_keys(public_key) if public_key else ()), *(allowed_signers(signers, now) if signers else ()))
    return Given(Envelope.from_bytes(data, str(certificate)), sha256_bytes(data), None if unsigned else trusted)


def _signed(envelope: Envelope, key: Ed25519PrivateKey | None) -> tuple[Envelope, str | None]:
    if key is None:
        return envelope, None
    keyid = key_fingerprint(key.public_key())
    signature = Signature(keyid, key.sign(envelope.signed_bytes))
    return Envelope(envelope.payload, envelope.payload_type, (signature,)), keyid
