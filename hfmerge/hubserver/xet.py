"""Routes of Xet uploads: a token for one repository, xorbs checked against their hash, shards made into files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import Response

from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.wire import Call, HubFault, not_implemented, reply
from hfmerge.hubserver.xorb import (
    MOST_SHARD_BODY,
    MOST_XORB_BODY,
    Chunk,
    FileRecipe,
    Term,
    check_xorb,
    chunk_data,
    chunk_hash,
    range_hash,
    read_chunks,
    read_shard,
)


_HASH = re.compile(r"[0-9a-f]{64}")
# The client asks for another a minute before this one ends.
_TOKEN_SECONDS = 3600


def write_token(hub: Hub, call: Call) -> Response:
    """A token to upload to one repository, in the body for the Rust client and in headers for the Python one."""
    revision = call.args["rev"]
    # `None` stands for a pull request that does not exist yet.
    row = hub.pushable(call, revision, opens_pull=call.flag("create_pr") or revision == "None")
    store = hub.xet_store(hub.require_user(call))
    token, expires = hub.signer.sign("xet", {"rid": row.rid, "store": store}, seconds=_TOKEN_SECONDS)
    url = f"{call.origin}/cas/{store}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return reply({"accessToken": token, "exp": expires, "casUrl": url}, headers=headers)


def read_token(hub: Hub, call: Call) -> Response:
    """Files are served by plain HTTP: nothing ever tells a client to come here."""
    hub.repo(call)
    raise not_implemented("Xet downloads")


def put_xorb(hub: Hub, call: Call) -> Response:
    """Store a xorb whose chunks make its hash."""
    _, folder = _claims(hub, call)
    name = call.args["hash"]
    if not _HASH.fullmatch(name):
        raise HubFault(400, "Malformed hash")
    path = folder / name
    if path.exists():
        return reply({"was_inserted": False})
    try:
        check_xorb(call.body, name)
    except ValueError as error:
        raise HubFault(400, f"Bad xorb: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    hub.blobs.put(path, call.body)
    return reply({"was_inserted": True})


def find_chunk(hub: Hub, call: Call) -> Response:
    """No deduplication across clients."""
    _claims(hub, call)
    raise HubFault(404, "Chunk not found")


def put_shard(hub: Hub, call: Call) -> Response:
    """Put the files of a shard together, check each against its sha256, and give them to the token's repository."""
    rid, folder = _claims(hub, call)
    try:
        recipes = read_shard(call.body)
        xorbs = _Xorbs(folder)
        for recipe in recipes:
            # A shard of few bytes can name one chunk a million times: its sum is looked at before it is written out.
            hub.blobs.require_room(sum(term.size for term in recipe.terms))
            _store(hub, rid, recipe, xorbs)
    except ValueError as error:
        raise HubFault(400, f"Bad shard: {error}") from error
    return reply({"result": 1})


def _claims(hub: Hub, call: Call) -> tuple[str, Path]:
    """The repository a Xet token was issued for, and the folder of the xorbs its user has sent."""
    scheme, _, token = call.request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise HubFault(401, "A Xet token is needed")
    claims = hub.signer.check("xet", token.strip())
    if call.args["store"] != claims["store"]:
        raise HubFault(400, "This Xet store is gone; ask for a new token")
    return str(claims["rid"]), hub.xorbs / str(claims["store"])


class _Xorbs:
    """Xorbs of one shard; the last one stays in memory, as files use them one after the other."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last: tuple[str, bytes, list[Chunk]] | None = None

    def chunks(self, term: Term) -> Iterator[bytes]:
        """The contents of a term's chunks.

        Raises:
            ValueError: the xorb is not here, or has not so many chunks.
        """
        if self._last is None or self._last[0] != term.xorb:
            try:
                data = (self._folder / term.xorb).read_bytes()
            except FileNotFoundError as error:
                raise ValueError(f"xorb {term.xorb} was not uploaded") from error
            self._last = (term.xorb, data, read_chunks(data))
        _, data, chunks = self._last
        if not term.first < term.end <= len(chunks):
            raise ValueError(f"xorb {term.xorb} has no chunks {term.first} to {term.end}")
        for chunk in chunks[term.first : term.end]:
            yield chunk_data(data, chunk)


def _store(hub: Hub, rid: str, recipe: FileRecipe, xorbs: _Xorbs) -> None:
    with hub.blobs.receive() as incoming:
        for term in recipe.terms:
            before = incoming.size
            hashes = []
            for data in xorbs.chunks(term):
                if incoming.size - before + len(data) > term.size:
                    raise ValueError(f"a run of chunks has more than {term.size} bytes")
                incoming.write(data)
                if term.check is not None:
                    hashes.append(chunk_hash(data))
            if incoming.size - before != term.size:
                raise ValueError(f"a run of chunks has {incoming.size - before} bytes instead of {term.size}")
            if term.check is not None and range_hash(hashes) != term.check:
                raise ValueError("a run of chunks has another hash than the shard says")
        incoming.keep(recipe.sha256, None)
    hub.link(rid, recipe.sha256)


_CAS = "/cas/{store}/v1"

ROUTES = [
    route("GET", "/api/{kind}/{repo}/xet-write-token/{rev}", write_token),
    route("GET", "/api/{kind}/{repo}/xet-read-token/{rev}", read_token),
    route("POST", f"{_CAS}/xorbs/{{prefix}}/{{hash}}", put_xorb, check=_claims, most=MOST_XORB_BODY, open=True),
    route("GET", f"{_CAS}/chunks/{{prefix}}/{{hash}}", find_chunk, open=True),
    route("POST", f"{_CAS}/shards", put_shard, check=_claims, most=MOST_SHARD_BODY, open=True),
]
