"""The process: socket, signals, and an end that breaks nobody's answer off.

Responsible for: running an application until it is told to stop.
Not responsible for: the application (app.py).

On SIGTERM or SIGINT new requests get 503, those under way are finished, and the process ends; a second signal, or
the end of the patience, ends it at once.
"""

from __future__ import annotations

import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dovetail.errors import ConfigError
from dovetail.serving.gate import Drain
from dovetail.telemetry.log import say


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


def run(app: FastAPI, *, host: str, port: int, drain_seconds: float) -> None:
    """Serve until a signal. Raises ConfigError if the address cannot be had."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", lifespan="on", timeout_graceful_shutdown=1
    )
    server = DrainingServer(config, app.state.drain, drain_seconds=drain_seconds)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="choose another --port, or end what listens there",
        ) from error
    with listening:
        say(f"listening on http://{_shown(listening)}  (Ctrl-C stops)")
        server.run(sockets=[listening])
    if not server.started:
        raise ConfigError("the server did not start", hint="the lines above say why")


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
