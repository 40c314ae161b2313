"""A model by its name on the server: loaded, with its chat format and its thread.

Responsible for: loading what the paths on the command line mean, adapters of one base sharing its weights.
Not responsible for: HTTP (routes.py), the batch (engine_thread.py).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from dovetail.engine import HybridEngine
from dovetail.errors import ConfigError, ModelError
from dovetail.model.load import expect_rows_for, load_causal_lm
from dovetail.model.run_models import chat_models
from dovetail.serving.engine_thread import EngineThread
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.placement import resolve_device, resolve_dtype


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

    def __init__(self, name: str, model: Any, chat: ChatFormat, settings: EngineSettings) -> None:
        self.name = name
        self.chat = chat
        engine = HybridEngine(
            model,
            device=resolve_device(settings.device),
            max_running=settings.max_running,
            max_cache_tokens=settings.cache_tokens,
        )
        self.thread = EngineThread(
            engine, chat.decode, max_running=settings.max_running, max_waiting=settings.max_waiting
        )

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as the model reads it, ready for an answer."""
        return self.chat.prompt_ids(messages)

    def text_ids(self, text: str) -> list[int]:
        """Plain text, its special tokens recognised."""
        return [int(i) for i in self.chat.tokenizer(text)["input_ids"]]


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
    return [_load(name, place, settings, bases) for name, place in places.items()]


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


def _load(name: str, place: str, settings: EngineSettings, bases: dict[str, Any]) -> ServedModel:
    device = resolve_device(settings.device)
    dtype = resolve_dtype("auto", device)
    adapter = Path(place).expanduser() / "adapter_config.json"
    chat = ChatFormat(load_tokenizer(place))
    base = _base_of(adapter) if adapter.is_file() else place
    if base not in bases:
        bases[base] = load_causal_lm(base, dtype=dtype, device=device)
    model: Any = bases[base]
    if adapter.is_file():
        twin = _twin(model)
        model = PeftModel.from_pretrained(twin, str(adapter.parent), autocast_adapter_dtype=False).eval()
    expect_rows_for(chat.tokenizer, model, place)
    return ServedModel(name, model, chat, settings)


def _base_of(adapter: Path) -> str:
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{adapter} names no base model",
            hint="set base_model_name_or_path in it, or give the merged model's folder",
        )
    return str(base)


def _twin(model: Any) -> Any:
    """A second tree of modules over the very same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
