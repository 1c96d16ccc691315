"""Notices at once that another process of the run is gone, even while this one computes for hours.

Every rank has a TCP connection to rank 0. Nothing is sent on it until the end. The kernel closes a killed process's
connection at once; keep-alive probes find a machine without power or network within a minute. Rank 0 tells the
others which process is gone. Collective operations alone would notice it only when they next wait for that process,
and for a machine without power only after their timeout.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from hfmerge.errors import HfMergeError, LostProcessError
from hfmerge.validation.quoting import tell


BYE, LOST = b"B", b"L"
"""What is said: the sender ends in order; the process of the following four bytes is gone."""
SECONDS = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}
"""Socket options: probe after this silence, this often, and give up after so many (a count)."""
CONNECT = 120.0
"""Seconds for all processes to connect."""
GRACE = 60.0
"""Seconds from the news to the end of a process that does not stop by itself, such as one that waits for the lost."""


class Watch:
    """The watch of one process; start it on all processes of a run at the same time.

    Args:
        rank, hosts: this process, and the host name of every process in rank order.
        links: connections to the other processes: to all for rank 0, to rank 0 for the others.
    """

    def __init__(self, rank: int, hosts: Sequence[str], links: Mapping[int, socket.socket]):
        self._rank, self._hosts, self._links = rank, tuple(hosts), dict(links)
        self._lost: int | None = None
        self._known, self._stopped = threading.Event(), threading.Event()
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="hfmerge-watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Do nothing while all processes live.

        Raises:
            LostProcessError: one is gone.
        """
        if self._lost is not None:
            raise LostProcessError(self._text(self._lost), reported=True)

    def explain(self, error: Exception) -> LostProcessError:
        """Why a collective operation failed: who is gone, if the watch learns it within two seconds."""
        self._known.wait(2.0)
        if self._lost is not None:
            return LostProcessError(self._text(self._lost), reported=True)
        return lost_contact(self._rank, len(self._hosts), error)

    def close(self, *, orderly: bool) -> None:
        """End the watch.

        Args:
            orderly: all processes end, so that the others must not take this one for lost.
        """
        self._stopped.set()
        self._waker.close()
        self._thread.join()
        for link in self._links.values():
            if orderly:
                with contextlib.suppress(OSError):  # it had ended in order before
                    link.sendall(BYE)
            link.close()
        self._woken.close()

    def _text(self, rank: int) -> str:
        return (
            f"process {rank} of {len(self._hosts)} (on {self._hosts[rank]}) was killed or lost its connection, so the "
            "others stop; run the same command again."
        )

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while self._lost is None:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    told = _told(self._links[key.data])
                    if told == BYE:
                        selector.unregister(key.fileobj)
                    else:
                        gone = int.from_bytes(told[1:], "big") if told else key.data
                        self._take_note(gone, first_hand=not told)
                        break
        if not self._stopped.wait(GRACE):
            # the main thread waits for the lost process, or is deep in one matrix; what it leaves a new run clears
            tell(f"hfmerge (process {self._rank}): stopped.")
            os._exit(1)

    def _take_note(self, lost_rank: int, *, first_hand: bool) -> None:
        if first_hand:
            tell(f"hfmerge: {self._text(lost_rank)}")
            for rank, link in self._links.items():
                if rank != lost_rank:
                    with contextlib.suppress(OSError):  # that process is lost as well
                        link.sendall(LOST + lost_rank.to_bytes(4, "big"))
        self._lost = lost_rank
        self._known.set()


def lost_contact(rank: int, world: int, error: Exception) -> LostProcessError:
    """A collective operation failed, and nobody knows whose fault it is."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LostProcessError(
        f"process {rank} of {world}: another process of this run ended ({text}); run the same command again."
    )


def listen(everywhere: bool) -> socket.socket:
    """Where rank 0 waits for the others; on loopback if they all run on this machine."""
    if not everywhere:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def accept(server: socket.socket, token: bytes, world: int) -> dict[int, socket.socket]:
    """The connections of all other ranks; strangers, who do not know the token, are turned away.

    Raises:
        HfMergeError: not all came in time.
    """
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + CONNECT
    with server:
        while len(links) < world - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                link, _ = server.accept()
            except TimeoutError as error:
                absent = [str(rank) for rank in range(1, world) if rank not in links]
                raise HfMergeError(
                    f"process 0 of {world}: no connection from process {', '.join(absent)}; the machines of a run "
                    "must reach one another on any port."
                ) from error
            link.settimeout(5.0)
            try:
                said = _exactly(link, len(token) + 4)
            except OSError:
                said = b""
            if said[: len(token)] == token:
                links[int.from_bytes(said[len(token) :], "big")] = _kept_alive(link)
            else:
                link.close()
    return links


def connect(host: str, port: int, token: bytes, rank: int) -> dict[int, socket.socket]:
    """The connection to rank 0.

    Raises:
        HfMergeError: it cannot be reached.
    """
    try:
        link = socket.create_connection((host, port), timeout=CONNECT)
        link.sendall(token + rank.to_bytes(4, "big"))
    except OSError as error:
        raise HfMergeError(
            f"process {rank}: cannot reach process 0 at {host}, port {port} ({error}); the machines of a run must "
            "reach one another on any port."
        ) from error
    return {0: _kept_alive(link)}


def _kept_alive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SECONDS.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _told(link: socket.socket) -> bytes:
    """`BYE`, `LOST` with a rank, or nothing: the other end is gone."""
    try:
        said = _exactly(link, 1)
        return said + _exactly(link, 4) if said == LOST else said
    except OSError:
        return b""


def _exactly(link: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the connection ends."""
    data = b""
    while len(data) < count:
        part = link.recv(count - len(data))
        if not part:
            break
        data += part
    return data
