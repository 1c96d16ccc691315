"""Running the server in this process: sockets, the second port, the end when the parent ends."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hfmerge.errors import HfMergeError


if TYPE_CHECKING:
    from socket import socket as Socket


@dataclass(frozen=True)
class Options:
    """How to run a server.

    Args:
        root: folder of the store.
        host: address to listen on; one that is not loopback needs `public`.
        port: port to listen on, 0 for a free one.
        users: tokens that hold while the server runs, by user name.
        new_users: users to make with a kept token, if they do not exist.
        public: allow an address that other machines can reach.
        cdn_port: second port for large files, 0 for a free one, None for none.
        log: file for the request log.
        part_size: bytes of one part of a multipart LFS upload.
    """

    root: Path
    host: str
    port: int
    users: Mapping[str, str]
    new_users: Sequence[str] = ()
    public: bool = False
    cdn_port: int | None = None
    log: Path | None = None
    part_size: int | None = None


Announce = Callable[[str, Mapping[str, str], Sequence[str]], None]


def run(options: Options, announce: Announce, lifeline: BinaryIO | None = None) -> None:
    """Serve until interrupted, or until the lifeline ends.

    Args:
        options: how to run.
        announce: called once requests are answered, with the endpoint, the tokens made now, and all users.
        lifeline: a pipe from the parent process; its end means that the parent is gone.

    Raises:
        HfMergeError: the address is not allowed or in use, the folder is in use, or a package is missing.
    """
    try:
        import uvicorn

        from hfmerge.hubserver.app import HubApp, RequestLog
        from hfmerge.hubserver.connections import GuardedProtocol
        from hfmerge.hubserver.control import announce_control, forget_control
        from hfmerge.hubserver.hub import DEFAULT_PART_SIZE, Hub
    except ModuleNotFoundError as error:
        raise HfMergeError(f"the hub server needs {error.name}; run: pip install 'hfmerge[hub]'") from error
    if not options.public and not is_loopback(options.host):
        raise HfMergeError(f"--host {options.host}: other machines could reach it; add --public if they should")
    with ExitStack() as stack:
        main = stack.enter_context(_listen(options.host, options.port))
        sockets = [main]
        if options.cdn_port is not None:
            sockets.append(stack.enter_context(_listen(options.host, options.cdn_port)))
        hub = Hub(
            options.root,
            options.users,
            part_size=options.part_size or DEFAULT_PART_SIZE,
            cdn_port=sockets[1].getsockname()[1] if len(sockets) > 1 else None,
        )
        stack.callback(hub.close)
        made = hub.add_users(options.new_users)
        log = RequestLog(options.log) if options.log is not None else None
        if log is not None:
            stack.callback(log.close)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[Socket] | None = None) -> None:
                await super().startup(sockets)
                endpoint = _endpoint(options.host, main.getsockname()[1])
                announce_control(hub, endpoint)
                stack.callback(forget_control, options.root)
                announce(endpoint, made, hub.accounts.users())

        config = uvicorn.Config(
            HubApp(hub, log),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            http=GuardedProtocol,
            server_header=False,
            # Clients keep connections in a pool; closing them early makes their next request fail.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
        server = Server(config)
        if lifeline is not None:

            def wait_for_parent() -> None:
                lifeline.read()
                server.should_exit = True

            threading.Thread(target=wait_for_parent, daemon=True).start()
        server.run(sockets)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> Socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on and each answer waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise HfMergeError(f"{host}:{port}: cannot listen ({error.strerror}); choose another --port") from error
    return listener


def _endpoint(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
