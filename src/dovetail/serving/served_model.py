"""Load the models that the server offers, each with a name, a chat format and an engine thread.

Responsible for: the models that the paths on the command line stand for, and their names.
Not responsible for: loading (serving/inference/loading.py), HTTP (routes.py), the batch (engine_thread.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError
from dovetail.runs.run_models import chat_models
from dovetail.serving.engine_thread import EngineThread
from dovetail.serving.inference.loading import LoadedChat, load_chat
from dovetail.text.message import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The device of each model, and the limits of its engine."""

    device: str = "auto"
    max_running: int = 64
    """The most answers that are decoded together."""
    max_waiting: int = 256
    """The most answers that may wait in the queue."""
    cache_tokens: int = 32768
    """The number of tokens of prompts and answers that the KV cache holds."""


class ServedModel:
    """A model with its name, its chat format and its engine thread."""

    def __init__(self, name: str, loaded: LoadedChat, settings: EngineSettings) -> None:
        self.name = name
        self.path = loaded.path
        """The path or hub name that the model was loaded from."""
        self.chat = loaded.chat
        self.thread = EngineThread(
            loaded.engine(max_running=settings.max_running, max_cache_tokens=settings.cache_tokens),
            self.chat.decode,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
        )

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, ready for the model's answer."""
        return self.chat.prompt_ids(messages)

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of plain text, in which special tokens are recognised."""
        return self.chat.text_ids(text)


def load_models(paths: Sequence[str], settings: EngineSettings) -> list[ServedModel]:
    """Load every model that `paths` name, each as `PATH` or `NAME=PATH`.

    A run folder stands for all its finished chat models. Raises ConfigError if two models have the same name,
    ModelError for a model that cannot be loaded.
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
    """Return the names and places of the models that one argument stands for."""
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
