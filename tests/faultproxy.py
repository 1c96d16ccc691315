"""A proxy on loopback in front of the Hub on loopback, which fails as it is told to, and keeps a log."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit


class Gate:
    """Holds requests until it is opened.

    Attributes:
        reached: whether a request is held, or was.
        opened: whether requests go on.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def hold(self) -> None:
        """Called by the proxy for each request that is held; two minutes at most."""
        self.reached.set()
        self.opened.wait(120.0)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with which requests.

    Attributes:
        match: pattern searched in `METHOD /path?query`.
        skip: matching requests that pass first.
        every: of the following, each n-th is hit.
        times: at most so many are hit.
        status: answered instead of asking the Hub, with `headers`.
        delay: seconds before the Hub is asked.
        gate: holds the request before the Hub is asked.
        drop: the connection is closed without an answer, before the Hub is asked.
        lose: the same, after the Hub has answered.
        cut: bytes of the body after which the connection is closed.
        flip: byte of the file, one of whose bits is flipped on its way.
        shift: the answer names a range so many bytes further on.
        whole: the request reaches the Hub without its range.
    """

    match: str = ""
    skip: int = 0
    every: int = 1
    times: int | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    gate: Gate | None = None
    drop: bool = False
    lose: bool = False
    cut: int | None = None
    flip: int | None = None
    shift: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Record:
    """One request as the client saw it: `status` 0 where the connection was closed without an answer."""

    line: str
    range: str | None
    token: bool
    status: int
    sent: int
    hit: bool


class FaultProxy:
    """Forwards to `upstream` (`http://HOST:PORT`), on threads of this process, until the `with` block ends.

    Addresses that the Hub makes from the request's Host header lead back here. Redirects to the upstream of another
    proxy, `storage`, are changed to lead to that proxy.
    """

    def __init__(self, upstream: str, *, storage: FaultProxy | None = None):
        self._target = urlsplit(upstream).netloc
        self._storage = storage
        self._faults: list[Fault] = []
        self._seen: list[int] = []
        self._hit: list[int] = []
        self._lock = threading.Lock()
        self.log: list[Record] = []
        owner = self

        class Bound(_Handler):
            proxy = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def faults(self, *faults: Fault) -> None:
        """What goes wrong from now on, counted from now on; the log begins anew."""
        with self._lock:
            self._faults, self._seen, self._hit = list(faults), [0] * len(faults), [0] * len(faults)
            self.log = []

    def requests(self, match: str = "") -> list[Record]:
        """Logged requests whose line has a match of the pattern."""
        with self._lock:
            return [record for record in self.log if re.search(match, record.line)]

    def choose(self, line: str) -> Fault | None:
        """The first fault that hits this request."""
        chosen = None
        with self._lock:
            for i, fault in enumerate(self._faults):
                if not re.search(fault.match, line):
                    continue
                self._seen[i] += 1
                turn = self._seen[i] - fault.skip
                due = turn > 0 and turn % fault.every == 0 and (fault.times is None or self._hit[i] < fault.times)
                if due and chosen is None:
                    self._hit[i] += 1
                    chosen = fault
        return chosen

    def note(self, record: Record) -> None:
        """Add to the log."""
        with self._lock:
            self.log.append(record)

    def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> http.client.HTTPResponse:
        """The Hub's own answer, on a connection of its own."""
        connection = http.client.HTTPConnection(self._target, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        return connection.getresponse()

    def rewritten(self, location: str) -> str:
        """Where a redirect should lead so that the next proxy sees it."""
        parts = urlsplit(location)
        if self._storage is None or parts.netloc != self._storage._target:
            return location
        return parts._replace(netloc=urlsplit(self._storage.endpoint).netloc).geturl()


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultProxy]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        line = f"{self.command} {self.path}"
        body = self._body()
        fault = self.proxy.choose(line) or Fault()
        hit = fault != Fault()
        time.sleep(fault.delay)
        if fault.gate is not None:
            fault.gate.hold()
        if fault.drop:
            self._end(line, 0, 0, hit)
            return
        if fault.status is not None:
            headers = {"Content-Type": "text/plain", **fault.headers}
            self._send(line, fault.status, list(headers.items()), b"out of order", fault, hit)
            return
        skipped = ("connection", "transfer-encoding", "content-length", *(("range",) if fault.whole else ()))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        headers |= {"Connection": "close", "Content-Length": str(len(body))}
        answer = self.proxy.ask(self.command, self.path, headers, body)
        data = answer.read()
        length = answer.getheader("Content-Length")
        answer.close()
        if fault.lose:
            self._end(line, 0, 0, hit)
            return
        kept = [
            (name, self.proxy.rewritten(value) if name.lower() == "location" else value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server")
        ]
        self._send(line, answer.status, kept, data, fault, hit, length)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _send(
        self,
        line: str,
        status: int,
        headers: Sequence[tuple[str, str]],
        data: bytes,
        fault: Fault,
        hit: bool,
        length: str | None = None,
    ) -> None:
        named = re.search(
            r"bytes (\d+)-(\d+)/(\d+)", dict(headers).get("Content-Range", dict(headers).get("content-range", ""))
        )
        start = int(named[1]) if named else 0
        if fault.flip is not None:
            at = fault.flip - start
            hit = status in (200, 206) and 0 <= at < len(data)
            if hit:
                data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        if fault.cut is not None:
            hit = fault.cut < len(data)
        self.send_response(status)
        for name, value in headers:
            if fault.shift and name.lower() == "content-range" and named:
                value = f"bytes {start + fault.shift}-{int(named[2]) + fault.shift}/{named[3]}"
            self.send_header(name, value)
        if self.command == "HEAD":
            self.send_header("Content-Length", length or "0")
            data = b""
        elif status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        if fault.cut is not None and fault.cut < len(data):
            self.end_headers()
            self.wfile.write(data[: fault.cut])
            self._end(line, status, fault.cut, hit)
            return
        self.proxy.note(self._record(line, status, len(data), hit))
        self.end_headers()
        self.wfile.write(data)

    def _end(self, line: str, status: int, sent: int, hit: bool) -> None:
        self.proxy.note(self._record(line, status, sent, hit))
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _record(self, line: str, status: int, sent: int, hit: bool) -> Record:
        return Record(line, self.headers.get("Range"), "Authorization" in self.headers, status, sent, hit)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client left
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """The proxy keeps its own log."""
