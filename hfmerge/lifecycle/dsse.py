"""DSSE envelopes: a payload with its type, and signatures over both (secure-systems-lab/dsse, version 1.0).

A signature covers the encoding `PAE(type, payload)`, never the JSON around it, so the payload is kept as the bytes
that were signed and is not parsed before it is trusted.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from hfmerge.errors import CertificateError
from hfmerge.hashing import canonical_json
from hfmerge.validation.limits import CERTIFICATE_BYTES
from hfmerge.validation.strict_json import read_json


IN_TOTO = "application/vnd.in-toto+json"
"""Payload type of every in-toto statement."""


@dataclass(frozen=True)
class Signature:
    """One signature; `keyid` is a hint that nothing vouches for."""

    keyid: str
    sig: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload and who signed it; nobody yet if `signatures` is empty."""

    payload: bytes
    payload_type: str = IN_TOTO
    signatures: tuple[Signature, ...] = ()

    @property
    def signed_bytes(self) -> bytes:
        """What a signature covers: the pre-authentication encoding of type and payload."""
        kind = self.payload_type.encode()
        return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(self.payload), self.payload)

    def to_bytes(self) -> bytes:
        """The envelope as a JSON file."""
        return canonical_json(
            {
                "payloadType": self.payload_type,
                "payload": base64.b64encode(self.payload).decode(),
                "signatures": [{"keyid": s.keyid, "sig": base64.b64encode(s.sig).decode()} for s in self.signatures],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Envelope:
        """Read an envelope.

        Raises:
            CertificateError: not a DSSE envelope.
        """
        try:
            raw = read_json(data, CERTIFICATE_BYTES)
            given = [Signature(_text(one.get("keyid") or ""), _decoded(one["sig"])) for one in raw["signatures"]]
            return cls(_decoded(raw["payload"]), _text(raw["payloadType"]), tuple(given))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CertificateError(
                f"{where}: not a DSSE envelope ({type(error).__name__}: {error}); give the file that "
                "`hfmerge certify` wrote."
            ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {type(value).__name__}")
    return value


def _decoded(value: Any) -> bytes:
    """Base64 in the standard or the URL-safe alphabet; a reader has to take both."""
    try:
        return base64.b64decode(_text(value).translate({ord("-"): "+", ord("_"): "/"}), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
