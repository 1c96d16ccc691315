"""Reads ed25519 keys: OpenSSH and PEM files, public keys, and OpenSSH's lists of allowed signers."""

from __future__ import annotations

import base64
import getpass
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hfmerge.errors import CertificateError


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSPHRASE = "HFMERGE_KEY_PASSPHRASE"
"""Environment variable with the passphrase of a private key."""
NAMESPACE = "hfmerge"
"""Namespace that a list of allowed signers must allow for a key that it restricts (`namespaces="hfmerge"`)."""
_KIND = "ssh-ed25519"


@dataclass(frozen=True)
class Trusted:
    """A trusted public key and the name of its owner."""

    name: str
    key: Ed25519PublicKey

    @property
    def keyid(self) -> str:
        """Fingerprint, as `ssh-keygen -l` prints it."""
        return key_fingerprint(self.key)


def key_fingerprint(key: Ed25519PublicKey) -> str:
    """OpenSSH's SHA-256 fingerprint of a key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    blob = base64.b64decode(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def private_key(path: str | Path, ask: Callable[[str], str | None] | None = None) -> Ed25519PrivateKey:
    """An ed25519 private key from a PEM (PKCS8) or OpenSSH file.

    Args:
        ask: called with the path of the key; gives its passphrase, or None if there is none. Default: the passphrase
            comes from the environment or from the terminal.

    Raises:
        CertificateError: the file is no ed25519 key, the passphrase is missing or wrong, or `cryptography` is not
            installed.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _read(path)
    try:
        key = _loaded(data, None, path)
    except TypeError:  # the library's word for "it has a passphrase"
        given = (ask or _passphrase)(str(path))
        if not given:
            raise CertificateError(f"{path}: has a passphrase; set {PASSPHRASE}, or run at a terminal.") from None
        key = _loaded(data, given.encode(), path)
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificateError(f"{path}: not an ed25519 key; make one with `ssh-keygen -t ed25519`.")
    return key


def public_keys(path: str | Path) -> tuple[Trusted, ...]:
    """The ed25519 keys of a file: one in PEM, or lines as in `id_ed25519.pub`; keys of other kinds are passed over.

    Raises:
        CertificateError: no such key in it.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise CertificateError(f"{path}: is a private key; give the public one ({path}.pub).")
    if data.lstrip().startswith(b"-----BEGIN"):
        try:
            key = load_pem_public_key(data.lstrip())
        except ValueError as error:
            raise CertificateError(f"{path}: not a public key ({error}).") from error
        keys = [Trusted(Path(path).name, key)] if isinstance(key, Ed25519PublicKey) else []
    else:
        fields = [line.split(None, 2) for line in _lines(data, path)]
        own = [field for field in fields if len(field) > 1 and field[0] == _KIND]
        keys = [Trusted(field[2] if len(field) > 2 else Path(path).name, _ssh_key(field[1], path)) for field in own]
    if not keys:
        raise CertificateError(f"{path}: no ed25519 public key in it; give a `.pub` file or one in PEM.")
    return tuple(keys)


def allowed_signers(path: str | Path, now: datetime) -> tuple[Trusted, ...]:
    """The ed25519 keys that OpenSSH's ALLOWED SIGNERS file (ssh-keygen(1)) trusts now.

    Lines for certificate authorities, for other namespaces than `hfmerge`, and outside their dates do not count.

    Raises:
        CertificateError: unreadable, or it trusts nobody now.
    """
    _need_cryptography()
    found = []
    for line in _lines(_read(path), path):
        principals, options, kind, key = _fields(line, path)
        if kind == _KIND and _counts(options, now, path):
            found.append(Trusted(principals, _ssh_key(key, path)))
    if not found:
        raise CertificateError(f"{path}: allows no ed25519 key now; lines read `NAME ssh-ed25519 AAAA...`.")
    return tuple(found)


def _fields(line: str, path: str | Path) -> tuple[str, Sequence[str], str, str]:
    """Principals, options, kind of key and key of one line."""
    # quotes stand within options, which have commas but no blanks outside of quotes
    words = re.findall(r'(?:"[^"]*"|[^\s"])+', line)
    at = next((i for i, word in enumerate(words[1:3], 1) if re.fullmatch(r"(sk-)?(ssh|ecdsa)-[\w@.-]+", word)), None)
    if at is None or len(words) <= at + 1:
        raise CertificateError(f"{path}: {line[:40]!r} is not a line of allowed signers (`NAME [options] KIND KEY`).")
    options = re.findall(r'(?:"[^"]*"|[^,"])+', words[1]) if at == 2 else []
    return words[0].strip('"'), options, words[at], words[at + 1]


def _counts(options: Sequence[str], now: datetime, path: str | Path) -> bool:
    for option in options:
        name, _, value = option.partition("=")
        value = "".join(shlex.split(value))
        if name == "cert-authority":
            return False
        elif name == "namespaces":
            if NAMESPACE not in value.split(","):
                return False
        elif name in ("valid-after", "valid-before"):
            moment = _moment(value, path)
            if (now < moment) if name == "valid-after" else (now >= moment):
                return False
        else:
            raise CertificateError(f"{path}: the option {name!r} is not known; correct the line.")
    return True


def _moment(text: str, path: str | Path) -> datetime:
    """A time as OpenSSH writes it, YYYYMMDD[HHMM[SS]][Z]; local without the Z."""
    digits = text.removesuffix("Z")
    form = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(digits))
    try:
        moment = datetime.strptime(digits, form or "")
    except ValueError as error:
        raise CertificateError(f"{path}: {text!r} is not a time; write YYYYMMDD or YYYYMMDDHHMM[SS][Z].") from error
    return moment.replace(tzinfo=timezone.utc) if text.endswith("Z") else moment.astimezone()


def _loaded(data: bytes, password: bytes | None, path: str | Path) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    load = load_ssh_private_key if b"BEGIN OPENSSH PRIVATE KEY" in data else load_pem_private_key
    try:
        return load(data, password)
    except UnsupportedAlgorithm as error:
        raise CertificateError(
            f"{path}: {error}; `pip install 'hfmerge[certify]'` brings all that is needed."
        ) from error
    except ValueError as error:
        what = "cannot be read as a private key" if password is None else "does not open with this passphrase"
        raise CertificateError(f"{path}: {what} ({str(error).splitlines()[0]}).") from error


def _ssh_key(text: str, path: str | Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(f"{_KIND} {text}".encode())
    except ValueError as error:
        raise CertificateError(f"{path}: {text[:16]}... is not a key ({error}).") from error
    assert isinstance(key, Ed25519PublicKey)
    return key


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read ({error.strerror}).") from error


def _lines(data: bytes, path: str | Path) -> list[str]:
    try:
        lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise CertificateError(f"{path}: not a text file of keys.") from error
    return [line for line in lines if line and not line.startswith("#")]


def _passphrase(path: str) -> str | None:
    if PASSPHRASE in os.environ:
        return os.environ[PASSPHRASE]
    try:
        return getpass.getpass(f"Passphrase of {path}: ") if sys.stdin.isatty() else None
    except EOFError:
        return None


def _need_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise CertificateError("signatures need the library cryptography: `pip install 'hfmerge[certify]'`.")
