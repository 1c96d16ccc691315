"""How long a connection may take: requests that come in too slowly, answers that nobody reads, too many at once."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


# From the first byte of a request, or from the opening of a connection, to the end of the headers.
_HEADER_SECONDS = 5.0
# A body comes at this rate at least, after a time of grace; an answer waits as long for its reader.
_GRACE_SECONDS = 30.0
_LEAST_BYTES_PER_SECOND = 1024
_MOST_CONNECTIONS = 500
_LOOK_SECONDS = 1.0


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP, which itself has no limit but on idle connections between two requests."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._look: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._received = 0
        self._phase = ""
        self._paused: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn serves TCP only
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
            return
        self._enter("header")
        self._look = self.loop.call_later(_LOOK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop looking."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first ones after a pause begin a request."""
        if self._phase == "idle":
            self._enter("header")
        super().data_received(data)
        self._received += len(data)
        self._follow()

    def on_response_complete(self) -> None:
        """Wait for the next request, as long as uvicorn keeps connections that rest."""
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        """The reader is slower than the answer."""
        super().pause_writing()
        self._paused = self.loop.time()

    def resume_writing(self) -> None:
        """The reader goes on."""
        super().resume_writing()
        self._paused = None

    def _enter(self, phase: str) -> None:
        self._phase, self._since, self._received = phase, self.loop.time(), 0

    def _follow(self) -> None:
        """Which part of a request is being waited for."""
        if self.conn.their_state is h11.SEND_BODY:
            # What still comes of a request that has its answer is thrown away by uvicorn.
            phase = "rest" if self.conn.our_state is h11.DONE else "body"
        elif self.conn.their_state is h11.IDLE:
            phase = "header" if self.conn.trailing_data[0] else "idle"
        else:
            phase = "answer"
        if phase != self._phase:
            self._enter(phase)

    def _check(self) -> None:
        now = self.loop.time()
        late = False
        if self._phase == "header":
            late = now - self._since > _HEADER_SECONDS
        elif self._phase == "rest":
            late = now - self._since > _GRACE_SECONDS
        elif self._phase == "body":
            if self.flow.read_paused:
                self._enter("body")  # it is the server that is slow
            late = now - self._since > _GRACE_SECONDS + self._received / _LEAST_BYTES_PER_SECOND
        if late or (self._paused is not None and now - self._paused > _GRACE_SECONDS):
            self.transport.abort()
            return
        self._look = self.loop.call_later(_LOOK_SECONDS, self._check)
