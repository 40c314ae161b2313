"""A real server on loopback over tiny models, for as long as a block lasts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from fastapi import FastAPI

from dovetail.serving.app import create_app
from dovetail.serving.http.listening import server_config
from dovetail.serving.inference.loading import LoadedChat
from dovetail.serving.served_model import EngineSettings, ServedModel
from dovetail.serving.server import DrainingServer
from dovetail.text.chat_format import ChatFormat
from tests.fakes import byte_tokenizer, tiny_model

CPU = EngineSettings(device="cpu", max_running=8, max_waiting=4, cache_tokens=4096)


def tiny_served(name: str = "tiny", *, seed: int = 0, settings: EngineSettings = CPU) -> ServedModel:
    """A random llama over bytes, 512 tokens of context."""
    loaded = LoadedChat(name, tiny_model(seed=seed), ChatFormat(byte_tokenizer()), torch.device("cpu"))
    return ServedModel(name, loaded, settings)


@dataclass(frozen=True)
class Live:
    """A server that answers."""

    url: str
    app: FastAPI
    models: Sequence[ServedModel]
    server: DrainingServer

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        """A request, by default of one short answer."""
        return httpx.post(self.url + path, json=body, timeout=60)

    def chat(self, content: str = "hello", **more: Any) -> httpx.Response:
        """One question."""
        return self.post(
            **{"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}
        )


@contextmanager
def live(models: Sequence[ServedModel] | None = None, **options: Any) -> Iterator[Live]:
    """The server over these models."""
    models = [tiny_served()] if models is None else models
    app = create_app(models, **options)
    config = server_config(app, lifespan="on", timeout_graceful_shutdown=1)
    server = DrainingServer(config, app.state.drain, drain_seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", app, models, server)
        finally:
            server.should_exit = True
            thread.join()


def until(holds: Any, *, seconds: float = 30) -> None:
    """Wait for something that is to happen soon."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
