"""Run the server process, and stop it on a signal without breaking off answers.

Responsible for: running an application until a signal stops it.
Not responsible for: the application (app.py), the socket (serving/http/listening.py).

On SIGTERM or SIGINT new requests get 503, open requests are finished, and then the process ends. A second signal, or
the end of `drain_seconds`, ends it at once.
"""

from __future__ import annotations

import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dovetail.errors import ConfigError
from dovetail.serving.gate import Drain
from dovetail.serving.http.listening import Listening
from dovetail.telemetry.log import say


class DrainingServer(uvicorn.Server):
    """A uvicorn server that keeps listening while it finishes open requests, and answers new ones with 503."""

    def __init__(self, config: uvicorn.Config, drain: Drain, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on the first signal, and end at once on the second."""
        if self._until is not None:
            self.should_exit = self.force_exit = True
        self._until = time.monotonic() + self._drain_seconds
        self._drain.has_begun = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to leave the main loop; uvicorn calls this ten times a second."""
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
