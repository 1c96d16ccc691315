"""Who makes a request: the token of a program, or name and token as browsers and git send them."""

from __future__ import annotations

import base64
import binascii

from starlette.requests import Request

from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.wire import HubFault


# Bodies that a form on another site's page cannot send: those of git and of its large files.
_OF_GIT = ("application/x-git-upload-pack-request", "application/vnd.git-lfs+json")


def caller(hub: Hub, request: Request) -> tuple[str, str] | None:
    """The user of a request and what their token may do, None if it is anonymous.

    A browser sends a name and a token it knows by itself, also where another site's page makes it ask. So they count
    only where nothing is changed by asking, and for bodies that such a page cannot send.

    Raises:
        HubFault: 401 for a token nobody has, and for a name and a token where only a token counts.
    """
    authorization = request.headers.get("authorization")
    if authorization is None or authorization[:6].lower() != "basic ":
        return hub.token_of(authorization)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method not in ("GET", "HEAD") and kind not in _OF_GIT:
        raise HubFault(401, "A name and a token cannot change anything here; send the token as Bearer")
    try:
        return hub.token_of(f"Bearer {_token(authorization)}")
    except HubFault as fault:
        fault.headers.setdefault("WWW-Authenticate", 'Basic realm="Hub", charset="UTF-8"')
        raise


def _token(authorization: str) -> str:
    try:
        name, mark, token = base64.b64decode(authorization[6:].strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError) as error:
        raise HubFault(401, "Malformed Authorization header") from error
    # `https://TOKEN@host` is what some tools send: the token in the place of the name.
    return token if mark and token else name
