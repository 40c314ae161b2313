"""Inspect model folders before their weights or vocabulary are read.

Responsible for: whether a folder is a LoRA adapter and of which base, which files of a vocabulary it has, and files
that were never downloaded.
Not responsible for: loading (text/tokenizer.py, model/load.py, model/adapter.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dovetail.errors import ModelError

_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tokenization_*.py")
_WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_LFS_HEADER = b"version https://git-lfs"
_LFS_BYTES = 1024
"""The largest size of a git-lfs pointer, as git-lfs itself has it; a pointer has about 130 bytes."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """The facts in adapter_config.json about the model that an adapter belongs to."""

    folder: Path
    base: str
    """The hub name or folder of the base model."""
    revision: str | None
    is_scalar: bool
    """True if it belongs to a reward model."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter.

    Raises ModelError if whole weights lie beside it, since either may be meant.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return False
    whole = sorted(found.name for pattern in _WHOLE_WEIGHTS for found in folder.glob(pattern))
    if whole:
        raise ModelError(
            f"{folder} holds both a whole model ({whole[0]}) and a LoRA adapter ({file.name}); which one is meant?",
            hint="move the files of one of them, adapter_config.json and adapter_model.safetensors or the rest, to "
            "another folder",
        )
    return True


def adapter_in(folder: Path) -> AdapterFolder | None:
    """Return the facts about the adapter in a folder; None for anything that is no adapter.

    Raises ModelError if it names no base, or if `is_adapter` does.
    """
    if not is_adapter(folder):
        return None
    file = folder / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file} cannot be loaded: {error}", hint="save or download the adapter again"
        ) from error
    if not base:
        raise ModelError(
            f"{file} names no base model",
            hint="set base_model_name_or_path in it to the model that the adapter was trained on, or give the "
            "merged model's folder",
        )
    return AdapterFolder(folder, str(base), settings.get("revision"), settings.get("task_type") == "SEQ_CLS")


def has_vocabulary(folder: Path) -> bool:
    """Return whether a tokenizer can be made from the folder's own files."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _VOCABULARIES)


def expect_downloaded(place: Path) -> None:
    """Raise ModelError if a file of a model is a git-lfs pointer, a few lines of text in place of the file."""
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if not file.is_file() or file.stat().st_size > _LFS_BYTES:
            continue
        with file.open("rb") as content:
            if content.read(len(_LFS_HEADER)) == _LFS_HEADER:
                raise ModelError(
                    f"{file} is a git-lfs pointer, not the file itself",
                    hint="run `git lfs pull` in its folder, or download the model with `hf download`",
                )
