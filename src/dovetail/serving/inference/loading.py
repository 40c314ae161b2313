"""Load a finished chat model from any place, ready to generate.

Responsible for: model, chat format and device together; adapters of one base sharing its weights.
Not responsible for: run folders (runs/run_models.py), generation (engine/).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dovetail.engine.hybrid import HybridEngine
from dovetail.errors import ModelError
from dovetail.model.adapter import with_adapter
from dovetail.model.forward import context_of, plain_model
from dovetail.model.load import expect_rows_for, load_causal_lm
from dovetail.model.placement import resolve_device, resolve_dtype
from dovetail.text.chat_format import ChatFormat
from dovetail.text.model_folder import adapter_in
from dovetail.text.tokenizer import load_tokenizer

_COMPARED_VALUES = 64
"""The approximate number of values of each tensor that enter a model's fingerprint."""


@dataclass(frozen=True, slots=True)
class LoadedChat:
    """A model that answers, with the chat format that turns conversations into its tokens and back."""

    path: str
    model: Any
    chat: ChatFormat
    device: torch.device

    @property
    def context(self) -> int | None:
        """The largest number of tokens of conversation and answer together; None if the model names no limit."""
        return context_of(plain_model(self.model))

    def fingerprint(self) -> str:
        """Compute a hash that changes with the weights, and with what decides the tokens of a conversation.

        It reads some values of every tensor, not all: training changes values everywhere.
        """
        digest = hashlib.sha256(self.chat.fingerprint.encode())
        plain = self.model.state_dict()
        for name in sorted(plain):
            values = plain[name].detach().flatten()
            some = values[:: max(1, len(values) // _COMPARED_VALUES)].float().cpu()
            digest.update(f"{name} {tuple(plain[name].shape)} {some.tolist()}".encode())
        return digest.hexdigest()

    def engine(self, **limits: Any) -> HybridEngine:
        """Return an engine that generates with its weights. limits: see `HybridEngine`."""
        return HybridEngine(self.model, device=self.device, **limits)


def load_chat(path: str, *, device: str = "auto", bases: dict[str, Any] | None = None) -> LoadedChat:
    """Load a model folder, a LoRA adapter, a .gguf file or a hub name.

    bases: base models loaded so far, by path and revision; adapters of one of them share its weights.
    Raises ModelError if it cannot be loaded, ConfigError if there is no such device.
    """
    where = resolve_device(device)
    place = Path(path).expanduser()
    adapter = adapter_in(place)
    if adapter is not None and adapter.is_scalar:
        raise ModelError(
            f"{path} is an adapter of a reward model, which scores answers and writes none",
            hint="give a chat model, or the adapter of one",
        )
    chat = ChatFormat(load_tokenizer(path))
    base, revision = (path, None) if adapter is None else (adapter.base, adapter.revision)
    bases = {} if bases is None else bases
    key = base if revision is None else f"{base}@{revision}"
    if key not in bases:
        bases[key] = load_causal_lm(base, dtype=resolve_dtype("auto", where), device=where, revision=revision)
    model = bases[key] if adapter is None else with_adapter(bases[key], place)
    expect_rows_for(chat.tokenizer, model, path)
    return LoadedChat(path, model, chat, where)
