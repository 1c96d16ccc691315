"""Short-lived signed tokens: they carry what a URL or an upload session may do, so nothing is kept about them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import Any

from hfmerge.hubserver.wire import HubFault


class Signer:
    """Signs and checks tokens with a secret that lives as long as the process."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def sign(self, scope: str, claims: dict[str, Any], *, seconds: int) -> tuple[str, int]:
        """A token for `scope` and the Unix time at which it expires."""
        expires = int(time.time()) + seconds
        document = json.dumps({**claims, "scope": scope, "exp": expires}, sort_keys=True).encode()
        body = base64.urlsafe_b64encode(document).rstrip(b"=").decode()
        return f"{body}.{self._mac(body)}", expires

    def check(self, scope: str, token: str) -> dict[str, Any]:
        """The claims of a token.

        Raises:
            HubFault: 401 if it is forged, expired or meant for something else.
        """
        body, _, mac = token.partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(body).encode()):
            raise HubFault(401, "Invalid signature")
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if claims["scope"] != scope:
            raise HubFault(403, "This token was issued for something else")
        if claims["exp"] < time.time():
            raise HubFault(401, "This token has expired")
        return claims

    def name(self, scope: str, text: str) -> str:
        """A name for a text that nobody can guess, and that ends with the process."""
        return self._mac(f"{scope}:{text}")[:32]

    def _mac(self, body: str) -> str:
        return hmac.new(self._secret, body.encode(), hashlib.sha256).hexdigest()
