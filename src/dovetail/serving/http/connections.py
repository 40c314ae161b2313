"""Close connections whose clients are slow, silent or do not speak HTTP.

Responsible for: closing what a client leaves unfinished, and protocol errors in the same form as the servers' errors.
Not responsible for: complete requests (serving/, serving/labelling/).

uvicorn itself waits forever for the rest of a request, and for a client that does not read.
"""

from __future__ import annotations

import asyncio
import json
import logging
from asyncio import TimerHandle, Transport

import h11
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

PATIENCE_SECONDS = 30.0
"""Longest wait for a complete request, from its connection or the response before it, or for a client to read on."""


class PatientProtocol(H11Protocol):
    """A connection that closes when its client does not go on."""

    _patience: TimerHandle | None = None
    _has_begun = False
    """True if the client has sent a part of its next request."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting for the client."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request; stop waiting for the client once it is complete."""
        self._has_begun = True
        super().data_received(data)
        if not self._is_unfinished():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._has_begun = False
        super().on_response_complete()
        if self._is_unfinished():
            self._wait()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._stop_waiting()
        self._patience = self.loop.call_later(PATIENCE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting for the client."""
        super().resume_writing()
        self._stop_waiting()

    def shutdown(self) -> None:
        """Close the connection after the response under way; refuse a request whose body is not complete."""
        if self.cycle is not None and not self.cycle.response_started and self._is_unfinished():
            self._end_with(503, "the server is stopping", "stopping")
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._end_with(400, f"this is not an HTTP request: {msg}", "invalid_http")

    def _is_unfinished(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _wait(self) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self._patience = self.loop.call_later(PATIENCE_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        if self._has_begun:
            message = f"the request was not complete after {PATIENCE_SECONDS:g} s"
            self._end_with(408, message, "request_timeout")
        else:
            self.transport.close()

    def _end_with(self, status: int, message: str, code: str) -> None:
        """Answer if nothing was answered yet, let the application know that its client has gone, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(self._response(status, message, code))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _response(self, status: int, message: str, code: str) -> bytes:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        detail = {"message": message, "hint": None, "type": kind, "param": None, "code": code}
        body = json.dumps({"error": detail}).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        return b"".join(self.conn.send(event) or b"" for event in events)


def is_worth_telling(record: logging.LogRecord) -> bool:
    """Return whether a line of uvicorn's log is about this server, and not about a client that left or never spoke."""
    if record.exc_info and isinstance(record.exc_info[1], ClientDisconnect | asyncio.CancelledError):
        return False
    message = record.getMessage()
    if message.rstrip().endswith(asyncio.CancelledError.__name__):  # a second signal, logged as text
        return False
    return not message.startswith(("Invalid HTTP request", "Unsupported upgrade", "No supported WebSocket"))
