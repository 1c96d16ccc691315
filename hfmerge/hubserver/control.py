"""Work on a store by its owner: done here if no server runs on it, else by that server, which alone may change it."""

from __future__ import annotations

import http.client
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response

from hfmerge.errors import HfMergeError
from hfmerge.hubserver.fsck import check_store
from hfmerge.hubserver.hub import Hub
from hfmerge.hubserver.routing import route
from hfmerge.hubserver.transfer import export_repository, export_revision, import_any
from hfmerge.hubserver.wire import Call, HubFault, reply


_FILE = "control.json"
# As long as a server may run: the token ends with its process.
_SECONDS = 100 * 365 * 24 * 3600


class _Closed(Hub):
    """A store no server runs on: opened as it is, so that a check sees what was left, and closed as it was."""

    def _recover(self) -> None:
        pass

    def close(self) -> None:
        self.database.close()
        self.accounts.close()


def perform(root: Path, verb: str, request: dict[str, Any], *, new: bool = False) -> Any:
    """Do something with a store.

    Args:
        root: its folder.
        verb: `import`, `export` or `fsck`.
        request: what exactly; paths in it are absolute.
        new: a store that does not exist is made.

    Raises:
        HfMergeError: there is no such store, or it cannot be done.
    """
    if not new and not (root / "format").is_file():
        raise HfMergeError(f"{root}: no store of this server; name its folder with --root")
    answer = _ask(root / _FILE, verb, request)
    if answer is not None:
        return answer
    with closing(_Closed(root, {})) as hub:
        return _work(hub, verb, request, running=False)


def announce_control(hub: Hub, endpoint: str) -> None:
    """Leave in the store, for its owner only, how to ask the server that runs on it."""
    token, _ = hub.signer.sign("control", {}, seconds=_SECONDS)
    path = hub.root / f"{_FILE}.new"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump({"endpoint": endpoint, "token": token}, file)
    path.replace(hub.root / _FILE)


def forget_control(root: Path) -> None:
    """Take that away when the server ends."""
    (root / _FILE).unlink(missing_ok=True)


def work(hub: Hub, call: Call) -> Response:
    """The same work, asked for by somebody who can read the store's folder."""
    scheme, _, token = call.request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise HubFault(401, "The token of the store is needed")
    hub.signer.check("control", token.strip())
    try:
        return reply({"result": _work(hub, call.args["verb"], call.json(), running=True)})
    except HfMergeError as error:
        raise HubFault(400, str(error)) from error


def _work(hub: Hub, verb: str, request: dict[str, Any], *, running: bool) -> Any:
    try:
        if verb == "fsck":
            return check_store(hub, repair=bool(request["repair"]), running=running)
        if verb == "import":
            source, name, kind, owner = (request[key] for key in ("source", "as", "kind", "owner"))
            return import_any(hub, Path(source), name, kind, owner, private=bool(request["private"]))
        if verb == "export":
            kind, name, folder = request["kind"], request["repo"], Path(request["folder"])
            if request["revision"] is None:
                return export_repository(hub, kind, name, folder)
            return export_revision(hub, kind, name, request["revision"], folder)
    except HubFault as fault:
        raise HfMergeError(fault.message) from fault
    except OSError as error:
        raise HfMergeError(f"{error.filename or hub.root}: {error.strerror or error}") from error
    raise HubFault(404, f"No such work: {verb}")


def _ask(path: Path, verb: str, request: dict[str, Any]) -> Any:
    """What the running server answers; None if none runs, or none runs any more."""
    try:
        control = json.loads(path.read_text("utf-8"))
        parts = urlsplit(control["endpoint"])
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HfMergeError(f"{path}: cannot be read ({error}); delete it if no server runs on the store") from error
    with closing(connection):
        try:
            connection.connect()
        except OSError:
            return None  # it was killed, and left its file
        headers = {"Authorization": f"Bearer {control['token']}", "Content-Type": "application/json"}
        connection.request("POST", f"/_control/{verb}", json.dumps(request), headers)
        response = connection.getresponse()
        body = json.loads(response.read() or b"{}")
    if response.status == 401:
        return None  # another server took the port of the one that was killed
    if response.status != 200:
        raise HfMergeError(str(body.get("error")))
    return body["result"]


ROUTES = [route("POST", "/_control/{verb}", work, check=lambda hub, call: None, open=True)]
