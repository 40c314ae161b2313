"""The process: signals, and an end that breaks nobody's answer off.

Responsible for: running an application until it is told to stop.
Not responsible for: the application (app.py), the socket (web/listening.py).

On SIGTERM or SIGINT new requests get 503, those under way are finished, and the process ends; a second signal, or
the end of the patience, ends it at once.
"""

from __future__ import annotations

import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dovetail.errors import ConfigError
from dovetail.serving.gate import Drain
from dovetail.telemetry.log import say
from dovetail.web.listening import Listening


class DrainingServer(uvicorn.Server):
    """A uvicorn server that goes on listening, to say 503, while it finishes what it has."""

    def __init__(self, config: uvicorn.Config, drain: Drain, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the second is the end."""
        if self._until is not None:
            self.should_exit = self.force_exit = True
        self._until = time.monotonic() + self._drain_seconds
        self._drain.has_begun = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to leave the loop."""
        if self._until is not None:
            self.should_exit |= time.monotonic() > self._until or not self._drain.num_open
        return await super().on_tick(counter)


def run(app: FastAPI, listening: Listening, *, drain_seconds: float) -> None:
    """Serve until a signal. Raises ConfigError if the application cannot start."""
    config = listening.config(app, lifespan="on", timeout_graceful_shutdown=1)
    server = DrainingServer(config, app.state.drain, drain_seconds=drain_seconds)
    say(f"listening on {listening.url}  (Ctrl-C stops)")
    server.run(sockets=[listening.socket])
    if not server.started:
        raise ConfigError("the server did not start", hint="the lines above say why")
