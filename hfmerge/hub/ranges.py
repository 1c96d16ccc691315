"""Reads exact byte ranges of one file on the Hub by Range requests, and repeats requests that fail.

The address at the pinned commit usually redirects to another host with a signed address, which is used again until it
no longer holds. The token goes to the Hub alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from hfmerge.errors import CorruptFileError, OfflineError, SourceError
from hfmerge.hub.client import PASSING, Patience, asked_wait, hub_errors
from hfmerge.validation.wording import parameter
from hfmerge.version import __version__


PROGRESS = 1 << 20
"""Bytes received that earn one further try."""
SHORT = 1 << 16
"""Bytes of a redirect's own body that are worth reading."""
HOPS = 5
"""Redirects followed for one request."""


@dataclass
class Traffic:
    """State that the ranged reads of one run share: counters, and the time before which a Hub wants no request.

    Attributes:
        requests: GETs sent, those after redirects included.
        failures: those that had to be repeated, in whole or in part.
        received: bytes of file content.
        stopped: set to end all waiting and reading.
    """

    requests: int = 0
    failures: int = 0
    received: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _not_before: float = 0.0

    def count(self, *, requests: int = 0, failures: int = 0, received: int = 0) -> None:
        """Add to the counters."""
        with self._lock:
            self.requests += requests
            self.failures += failures
            self.received += received

    def hold(self, seconds: float) -> None:
        """Let no reader begin a request for so long."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def wait(self, seconds: float = 0.0) -> None:
        """Wait so long, and until the Hub wants requests again.

        Raises:
            CancelledError: the run ends.
        """
        until = time.monotonic() + seconds
        while True:
            left = max(until, self._not_before) - time.monotonic()
            if self.stopped.wait(max(0.0, left)):
                raise CancelledError
            if left <= 0.0:
                return


class _Fault(Exception):
    """A try that failed; `retry_after`: seconds for which the Hub wants no request, 0.0 if another may follow."""

    def __init__(self, what: str, retry_after: float | None = None):
        super().__init__(what)
        self.retry_after = retry_after


class RangedFile:
    """One file at a pinned commit. Safe to read from several threads at once.

    Args:
        where: names the file in errors.
        url: its address on the Hub, where the token may go.
        size: bytes, as the Hub lists it.
        sha256: of its content, as the Hub lists it; None if unknown.
        otherwise: advice in errors on how to run without range requests; None: to run without streaming.
    """

    def __init__(
        self,
        where: str,
        url: str,
        size: int,
        sha256: str | None,
        traffic: Traffic,
        patience: Patience | None = None,
        *,
        otherwise: str | None = None,
    ):
        self.where, self.size = where, size
        self._otherwise = otherwise or f"without {parameter('stream', True)} (a download goes on where it stopped)"
        self._url, self._sha256 = url, sha256
        self._traffic, self._patience = traffic, patience or Patience()
        self._direct: str | None = None

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from `start` up to `stop`; goes on from the byte reached when a connection is cut.

        Raises:
            OfflineError: all tries failed. CorruptFileError: the Hub now serves another file.
            SourceError: the Hub refuses, or does not serve ranges.
        """
        data = bytearray(stop - start)
        view = memoryview(data)
        done = failures = since = 0
        while done < len(data):
            before = done
            try:
                self._traffic.wait()
                with self._answer(start + done, stop) as body:
                    for chunk in body:
                        if len(chunk) > len(data) - done:
                            raise _Fault("more bytes than asked for")
                        view[done : done + len(chunk)] = chunk
                        done += len(chunk)
                if done < len(data):
                    raise _Fault("fewer bytes than asked for")
            except _Fault as fault:
                failures, since = failures + 1, 1 if done > before else since + 1
                self._traffic.count(failures=1, received=done - before)
                if failures >= self._patience.tries + done // PROGRESS:
                    raise OfflineError(
                        f"{self.where}: bytes {start + done}-{stop - 1} could not be read from the Hub in {failures} "
                        f"tries (the last: {fault}); run again later, or {self._otherwise}."
                    ) from fault
                if since > 1:
                    self._direct = None
                if fault.retry_after:
                    self._traffic.hold(self._patience.wait(since, fault.retry_after))
                self._traffic.wait(0.0 if fault.retry_after == 0.0 else self._patience.wait(since))
            else:
                self._traffic.count(received=done - before)
        return data

    @contextlib.contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """One request for a range; the body of an answer that is exactly that range."""
        import httpx2
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        signed = self._direct
        url = signed or self._url
        client = get_session()
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(HOPS):
                    self._traffic.count(requests=1)
                    response = stack.enter_context(
                        client.stream(
                            "GET", url, headers=self._headers(url, start, stop), follow_redirects=False,
                            timeout=float(constants.HF_HUB_DOWNLOAD_TIMEOUT),
                        )
                    )  # fmt: skip
                    if not response.has_redirect_location:
                        break
                    url = self._followed(url, response)
                    if int(response.headers.get("Content-Length", SHORT)) < SHORT:
                        response.read()  # so that the connection can be used again
                    stack.close()
                else:
                    raise SourceError(f"{self.where}: the Hub redirects without end; run again {self._otherwise}.")
                if self._foreign(url) and response.status_code in (401, 403, 404, 410):
                    self._direct = None
                    raise _Fault(f"HTTP {response.status_code} from the storage", 0.0 if signed is not None else None)
                self._check(response, start, stop)
                if self._foreign(url):
                    self._direct = url
                yield self._body(response)
        except httpx2.TransportError as error:
            self._direct = None
            raise _Fault(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except RuntimeError as error:
            # the Hub client closes its connections for all threads when one of them cannot connect
            if not client.is_closed:
                raise
            raise _Fault("the connection was closed") from error

    def _headers(self, url: str, start: int, stop: int) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        headers: dict[str, str] = dict(build_hf_headers(library_name="hfmerge", library_version=__version__))
        if self._foreign(url):
            headers.pop("authorization", None)
        return {**headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}

    def _foreign(self, url: str) -> bool:
        return _origin(url) != _origin(self._url)

    def _followed(self, url: str, response: Any) -> str:
        """Where a redirect leads, after a look at what the Hub says of the file on this occasion."""
        linked = response.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
        if len(linked) == 64 and self._sha256 is not None and linked != self._sha256:
            raise CorruptFileError(f"{self.where}: the Hub now has other content under this commit; run again.")
        target = urljoin(url, response.headers["Location"])
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
            raise SourceError(f"{self.where}: the Hub redirects to {target.partition('?')[0]}, which is not secure.")
        return target

    def _check(self, response: Any, start: int, stop: int) -> None:
        """Raise unless the answer is the very range that was asked for."""
        status, headers = response.status_code, response.headers
        if status in PASSING or (500 <= status < 600 and status != 501):
            retry_after = asked_wait(headers)
            if retry_after is not None and retry_after > self._patience.longest_retry_after:
                raise OfflineError(
                    f"{self.where}: the Hub answered HTTP {status} and asks to wait {retry_after:.0f} s; run "
                    f"again after that, or {self._otherwise}."
                )
            raise _Fault(f"HTTP {status}", retry_after or None)
        if status == 416:
            raise CorruptFileError(f"{self.where}: ends before byte {stop}, though the Hub lists {self.size} bytes.")
        if status == 200 and (start, stop) != (0, self.size):
            raise SourceError(
                f"{self.where}: this Hub sends the whole file instead of a part; run again {self._otherwise}."
            )
        if status not in (200, 206):
            from huggingface_hub.utils import hf_raise_for_status

            with hub_errors(self.where):
                hf_raise_for_status(response)
            raise SourceError(f"{self.where}: the Hub answered HTTP {status}; run again {self._otherwise}.")
        told = headers.get("Content-Range", "").strip()
        wanted = f"bytes {start}-{stop - 1}/"
        if status == 206 and told not in (f"{wanted}{self.size}", f"{wanted}*"):
            raise _Fault(f"another range, {told or 'not named'}")
        if headers.get("Content-Length", str(stop - start)) != str(stop - start):
            raise _Fault(f"{headers['Content-Length']} bytes")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(
                f"{self.where}: the Hub sends {headers['Content-Encoding']}, which was not asked for; run "
                f"again {self._otherwise}."
            )

    def _body(self, response: Any) -> Iterator[bytes]:
        for chunk in response.iter_raw():
            if self._traffic.stopped.is_set():
                raise CancelledError
            yield chunk


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)
