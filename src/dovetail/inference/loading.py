"""A finished chat model from wherever it lies, ready to generate.

Responsible for: model, chat format and device together; adapters of one base sharing its weights.
Not responsible for: run folders (model/run_models.py), generation (engine/).
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.modules import context_of
from dovetail.errors import ModelError
from dovetail.model.forward import plain_model
from dovetail.model.load import expect_rows_for, explained, load_causal_lm
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.placement import resolve_device, resolve_dtype

_COMPARED_VALUES = 64
"""About so many of each tensor enter a model's fingerprint."""


@dataclass(frozen=True, slots=True)
class LoadedChat:
    """A model that answers, and what turns conversations into its tokens and back."""

    path: str
    model: Any
    chat: ChatFormat
    device: torch.device

    @property
    def context(self) -> int | None:
        """The most tokens of conversation and answer together; None: the model names no limit."""
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
        """Generation with its weights. limits: see `HybridEngine`."""
        return HybridEngine(self.model, device=self.device, **limits)


def load_chat(path: str, *, device: str = "auto", bases: dict[str, Any] | None = None) -> LoadedChat:
    """A model folder, a LoRA adapter, a .gguf file or a hub name.

    bases: base models loaded so far, by path; adapters of one of them share its weights.
    Raises ModelError if it cannot be loaded, ConfigError if there is no such device.
    """
    where = resolve_device(device)
    chat = ChatFormat(load_tokenizer(path))
    adapter = Path(path).expanduser() / "adapter_config.json"
    with explained(str(adapter.parent)):
        base = _base_of(adapter) if adapter.is_file() else path
    bases = {} if bases is None else bases
    if base not in bases:
        bases[base] = load_causal_lm(base, dtype=resolve_dtype("auto", where), device=where)
    model: Any = bases[base]
    if adapter.is_file():
        with explained(str(adapter.parent)):
            model = _adapted(model, adapter.parent)
    expect_rows_for(chat.tokenizer, model, path)
    return LoadedChat(path, model, chat, where)


def _base_of(adapter: Path) -> str:
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{adapter} names no base model",
            hint="set base_model_name_or_path in it, or give the merged model's folder",
        )
    return str(base)


def _adapted(base: Any, folder: Path) -> Any:
    if not any(folder.glob("adapter_model.*")):  # peft would ask the hub for them
        raise ModelError(
            f"{folder} has an adapter_config.json and no adapter_model.safetensors",
            hint="the folder is incomplete; save or download the adapter again",
        )
    return PeftModel.from_pretrained(_twin(base), str(folder), autocast_adapter_dtype=False).eval()


def _twin(model: Any) -> Any:
    """A second tree of modules over the very same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
