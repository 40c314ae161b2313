"""Load LoRA adapters from folders, from any trainer, over the weights of their base.

Responsible for: putting an adapter on a base model that others may share, with rows for tokens of its own, and
refusing one that does not fit.
Not responsible for: new adapters and merging (lora.py), the folder's other files (text/model_folder.py), loading
the base (load.py).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dovetail.errors import ModelError
from dovetail.model.load import explained
from dovetail.text.model_folder import expect_downloaded
from dovetail.text.quiet import quiet


def with_adapter(base: PreTrainedModel, folder: Path) -> Any:
    """Return the base model with the adapter in `folder`, over the very same weights; the base stays as it was.

    Weights that the adapter brings whole, such as an embedding with rows for new tokens, are its own. Raises
    ModelError if the adapter is incomplete, of a kind that adds tokens instead of changing layers, or belongs to
    another model.
    """
    expect_downloaded(folder)
    saved = _read(folder)
    # peft only warns of what `_expect_all_used` refuses.
    with explained(str(folder)), quiet(), warnings.catch_warnings(action="ignore"):
        kind = PeftConfig.from_pretrained(str(folder))
        if kind.is_prompt_learning:
            raise ModelError(
                f"{folder} is an adapter of the kind {kind.peft_type}, which puts tokens before the text",
                hint="only adapters that change layers, such as LoRA, are supported",
            )
        model = _twin(base, {name for name in map(_leaf, saved) if name is not None})
        _resize(model, saved)
        adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).eval()
    _expect_all_used(folder, adapted, saved)
    return adapted


def _read(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not safe.is_file() and not pickled.is_file():  # peft would ask the hub for them
        raise ModelError(
            f"{folder} has an adapter_config.json and no adapter_model.safetensors",
            hint="the folder is incomplete; save or download the adapter again",
        )
    with explained(str(folder)):
        if safe.is_file():
            return load_file(safe)
        tensors: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
        return tensors


def _leaf(key: str) -> str | None:
    """Return the name of the module whose whole weight an adapter brings, such as lm_head; None for a LoRA factor."""
    parts = _without_wrapper(key).split(".")
    return None if "lora_" in key or len(parts) < 2 else parts[-2]


def _without_wrapper(key: str) -> str:
    """Return the name of a weight without what peft adds where it keeps a module twice."""
    return ".".join(part for part in key.split(".") if part not in ("modules_to_save", "original_module"))


def _twin(model: PreTrainedModel, own: Collection[str]) -> PreTrainedModel:
    """Return a second tree of modules over the same parameters and buffers, but for those of modules named `own`."""
    copied = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.split(".")[-2:-1] and name.split(".")[-2] in own
    }
    shared = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in copied]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _resize(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> None:
    """Give the embedding as many rows as the adapter's own embedding or head has."""
    embeddings: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings}
    rows = {tensor.shape[0] for key, tensor in saved.items() if tensor.ndim == 2 and _leaf(key) in leaves}
    if len(rows) == 1 and rows != {embeddings[0].num_embeddings}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _expect_all_used(folder: Path, adapted: Any, saved: Mapping[str, Tensor]) -> None:
    """Raise ModelError where peft would only warn: of weights without a place, or absent from the file and drawn."""
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    whole: nn.Module = adapted.get_base_model()
    known = {*own, *(f"base_model.model.{name}" for name in whole.state_dict())}
    lost = sorted(key for key in saved if _without_wrapper(key) not in known)
    absent = sorted(key for key in own.keys() - saved.keys() if "lora_" in key)
    if lost or absent:
        what = f"no place for its {lost[0]}" if lost else f"a layer that it says nothing about: {absent[0]}"
        raise ModelError(
            f"the adapter {folder} does not belong to its base: {type(whole).__name__} has {what}",
            hint="set base_model_name_or_path in its adapter_config.json to the model that it was trained on",
        )
