"""Reward models that DeepSpeed-Chat saved, read under the names that transformers gives their weights.

Responsible for: recognising such a folder, and the new names. Not responsible for: loading (load.py), loops written
for DeepSpeed-Chat (rlhf/compat/).

There a reward model is the backbone beside a linear head, `v_head`; its score is that of the last token, as here.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open

_BACKBONE = r"^rwtran\w*former\."
"""Its first versions wrote rwtranrsformer, later ones rwtransformer."""
_HEAD = "v_head.weight"


def is_deepspeed_chat_reward(folder: Path) -> bool:
    """Return whether the folder's weights are those of a reward model of DeepSpeed-Chat."""
    names = _weight_names(folder)
    return _HEAD in names and any(name.startswith("rwtran") for name in names)


def new_names(prefix: str) -> dict[str, str]:
    """Return patterns of the old names and their replacements; prefix: the backbone's in the new class."""
    return {_BACKBONE: f"{prefix}.", r"^v_head\.": "score."}


def _weight_names(folder: Path) -> Collection[str]:
    """Return the names of the weights in a local folder, none if it has no readable file of them."""
    try:
        for index in folder.glob("*.index.json"):
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return names
        if (file := folder / "model.safetensors").is_file():
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        if (file := folder / "pytorch_model.bin").is_file():
            state: dict[str, torch.Tensor] = torch.load(file, map_location="meta", weights_only=True)
            return state
    except Exception:  # loading the model tells what is wrong with the file
        return ()
    return ()
