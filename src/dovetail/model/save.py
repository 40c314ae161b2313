"""Final models as folders that anybody can load without us.

Responsible for: Hugging Face folders of models and tokenizers, written aside and then renamed; merged models
and adapters of LoRA runs; what a reward model's folder needs for transformers to read scores at the right token.
Not responsible for: checkpoints of running stages (training/checkpoint.py).
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.errors import CheckpointError
from dovetail.model.lora import merged_copy
from dovetail.model.padding import ScorePadding, padding_for_scores, with_rows
from dovetail.text.quiet import quiet


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> None:
    """Write `model` and `tokenizer` so that the Auto classes of transformers load them.

    dtype: of the weights on disk, by default as they are.
    stop_token_ids: what ends an answer, for the generation config; by default the tokenizer's eos.
    A model with LoRA adapters is saved merged, and its adapter in `<folder>_adapter`. An earlier folder of that
    name is replaced only when the new one is complete.
    """
    folder = Path(folder)
    stops = tuple(stop_token_ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))
    is_adapted = hasattr(model, "peft_config")
    if is_adapted:
        _written_aside(
            folder.with_name(f"{folder.name}_adapter"), lambda aside: _write_adapter(model, tokenizer, aside)
        )
    plain: PreTrainedModel = merged_copy(model, dtype=dtype) if is_adapted else model
    if hasattr(plain, "score"):
        _written_aside(folder, lambda aside: _write_scalar_model(plain, tokenizer, aside, dtype, stops))
    else:
        _written_aside(folder, lambda aside: _write_causal_lm(plain, tokenizer, aside, dtype, stops))


def _write_causal_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None,
    stops: tuple[int, ...],
) -> None:
    _write_weights(model, folder, dtype)
    generation = copy.deepcopy(model.generation_config)
    assert generation is not None
    if stops:
        generation.eos_token_id = stops[0] if len(stops) == 1 else list(stops)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_scalar_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None,
    stops: tuple[int, ...],
) -> None:
    padding: ScorePadding = padding_for_scores(tokenizer, _num_rows(model), stops)
    if padding.num_rows > _num_rows(model):
        model = with_rows(model, padding.num_rows)
    _write_weights(model, folder, dtype, pad_token_id=padding.token_id)
    padding.tokenizer.save_pretrained(folder)


def _write_weights(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype | None, **config_changes: Any
) -> None:
    state = None if dtype is None else _cast_state(model, dtype)
    model.save_pretrained(folder, state_dict=state)
    if dtype is not None:
        config_changes["dtype"] = str(dtype).removeprefix("torch.")
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.update(config_changes)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # "auto" would ask the hub whether the vocabulary has grown; adapters here never touch embeddings.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state on the CPU in `dtype`; weights that share memory go on sharing it."""
    casts: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in casts:
            casts[key] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        state[name] = casts[key]
    return state


def _num_rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


def _written_aside(folder: Path, write: Callable[[Path], None]) -> None:
    """Whatever `write` does, `folder` is either as it was or complete; a full disk is told as such."""
    aside, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "replaced"))
    try:
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        with quiet():
            write(aside)
        if folder.exists():
            folder.rename(replaced)
        aside.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        is_full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
        # The tokenizers library knows no kinds of errors: a full disk is a plain Exception with the system's words.
        if not is_full and not isinstance(error, (OSError, SafetensorError)):
            raise
        what = "the disk is full" if is_full else str(error)
        raise CheckpointError(
            f"the model could not be written to {folder}: {what}",
            hint="free some space, then run the same command again: what was there before, checkpoints too, is "
            "unharmed",
        ) from error
