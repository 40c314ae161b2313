"""A model by its name on the server: loaded, with its chat format and its thread.

Responsible for: what the paths on the command line stand for, and what the models are called.
Not responsible for: loading (inference/loading.py), HTTP (routes.py), the batch (engine_thread.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError
from dovetail.inference.loading import LoadedChat, load_chat
from dovetail.model.run_models import chat_models
from dovetail.serving.engine_thread import EngineThread
from dovetail.text.message import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How much of the machine each model may take."""

    device: str = "auto"
    max_running: int = 64
    """Answers decoded together."""
    max_waiting: int = 256
    """Answers that may wait for a place."""
    cache_tokens: int = 32768
    """Tokens of prompts and answers that the KV cache holds."""


class ServedModel:
    """What the routes need of a model."""

    def __init__(self, name: str, loaded: LoadedChat, settings: EngineSettings) -> None:
        self.name = name
        self.path = loaded.path
        """Where it is from."""
        self.chat = loaded.chat
        self.thread = EngineThread(
            loaded.engine(max_running=settings.max_running, max_cache_tokens=settings.cache_tokens),
            self.chat.decode,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
        )

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as the model reads it, ready for an answer."""
        return self.chat.prompt_ids(messages)

    def text_ids(self, text: str) -> list[int]:
        """Plain text, its special tokens recognised."""
        return self.chat.text_ids(text)


def load_models(paths: Sequence[str], settings: EngineSettings) -> list[ServedModel]:
    """Every model that `paths` name, each path once: `PATH`, or `NAME=PATH`. A run folder stands for all its finished
    chat models. Raises ConfigError for a name taken twice, ModelError for what cannot be loaded.
    """
    places: dict[str, str] = {}
    for given in paths:
        for name, place in _named(given, is_alone=len(paths) == 1):
            if name in places:
                raise ConfigError(
                    f"two models are called {name!r}: {places[name]} and {place}",
                    hint=f"name one yourself: dovetail serve other={place}",
                )
            places[name] = place
    bases: dict[str, Any] = {}
    return [
        ServedModel(name, load_chat(place, device=settings.device, bases=bases), settings)
        for name, place in places.items()
    ]


def _named(given: str, *, is_alone: bool) -> list[tuple[str, str]]:
    """Names and places of what one argument stands for."""
    name, equals, path = given.partition("=")
    if equals and not Path(given).exists():
        found = chat_models(path)
        return [
            (name if place == next(iter(found.values())) else f"{name}-{own}", place)
            for own, place in found.items()
        ]
    found = chat_models(given)
    if is_alone or len(found) == 1:
        return list(found.items())
    run = Path(given).absolute().name
    return [(f"{run}-{own}", place) for own, place in found.items()]
