"""Save final models as folders that transformers loads without Dovetail.

Responsible for: Hugging Face folders of models and tokenizers, written aside, read back and then renamed; merged
models and adapters of LoRA runs; what a reward model's folder needs for transformers to read scores at the right
token.
Not responsible for: checkpoints of running stages (runs/checkpoint.py), the comparison (read_back.py).
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.errors import CheckpointError, DovetailError
from dovetail.model.finite import first_not_finite
from dovetail.model.forward import plain_model
from dovetail.model.generation_defaults import declared_stop_ids
from dovetail.model.lora import merged_copy
from dovetail.model.padding import ScorePadding, num_rows, padding_for_scores, with_rows
from dovetail.model.read_back import expect_same_tokenizer, expect_same_weights
from dovetail.text.quiet import quiet


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> None:
    """Write `model` and `tokenizer` so that the Auto classes of transformers load them, and read the folder back.

    dtype: the precision of the weights on disk, by default as they are.
    stop_token_ids: the tokens that end an answer, for the generation config, beside those that the model declares; by
    default the tokenizer's eos.
    A model with LoRA adapters is saved merged, and its adapter in `<folder>_adapter`. An earlier folder of that
    name is replaced only when the new one is complete and gives the model in memory. Raises CheckpointError if it
    cannot be written or gives another model, ModelError if the adapters cannot be merged.
    """
    folder = Path(folder)
    plain: PreTrainedModel = model
    if hasattr(model, "peft_config"):
        plain = merged_copy(model, dtype=dtype)
        _written_aside(
            folder.with_name(f"{folder.name}_adapter"), lambda aside: _write_adapter(model, tokenizer, aside)
        )
    parts = _Parts.of(plain, tokenizer, stop_token_ids)
    _written_aside(folder, lambda aside: _write_model(parts, aside, dtype))


def expect_savable(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    stop_token_ids: Sequence[int] | None = None,
) -> None:
    """Raise what `save_model` would raise, as far as it shows without weights: all other files are written and removed.

    The weights of `model` are not read; they may be on the meta device.
    """
    parts = _Parts.of(plain_model(model), tokenizer, stop_token_ids)
    shutil.rmtree(_aside(Path(folder), lambda aside: _write_files(parts, aside, {})))


@dataclass(frozen=True, slots=True)
class _Parts:
    """A plain model and what goes into its folder beside the weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    padding: ScorePadding | None
    """The padding of a scalar model; None for a causal language model."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] | None
    ) -> _Parts:
        eos = tokenizer.eos_token_id
        given = stop_token_ids or ([] if eos is None else [eos])
        stops = tuple(dict.fromkeys((*given, *declared_stop_ids(model))))
        if not hasattr(model, "score"):
            return cls(model, tokenizer, stops, None)
        padding = padding_for_scores(tokenizer, num_rows(model), stops)
        return cls(model, padding.tokenizer, stops, padding)


def _write_model(parts: _Parts, folder: Path, dtype: torch.dtype | None) -> None:
    if parts.padding is not None and parts.padding.num_rows > num_rows(parts.model):
        parts = replace(parts, model=with_rows(parts.model, parts.padding.num_rows))
    state = parts.model.state_dict() if dtype is None else _cast_state(parts.model, dtype)
    if (name := first_not_finite(state.items())) is not None:
        precision = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise CheckpointError(
            f"{name} is not finite{precision}: such a model is not written",
            hint="choose bf16 or fp32, which hold larger numbers than fp16"
            if dtype == torch.float16
            else "the run has diverged: go on from an earlier checkpoint with a lower learning rate",
        )
    _write_files(parts, folder, state, dtype)
    expect_same_weights(folder, parts.model, state)


def _write_files(
    parts: _Parts, folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write the weights of `state`, the configs and the tokenizer."""
    model, tokenizer = parts.model, parts.tokenizer
    model.save_pretrained(folder, state_dict=dict(state))
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    if parts.padding is not None:
        changes["pad_token_id"] = parts.padding.token_id
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | changes
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if parts.padding is None:
        generation = copy.deepcopy(model.generation_config)
        assert generation is not None
        if parts.stops:
            generation.eos_token_id = parts.stops[0] if len(parts.stops) == 1 else list(parts.stops)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    expect_same_tokenizer(folder, tokenizer)


def _write_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # "auto" would ask the hub whether the vocabulary has grown; adapters here never touch embeddings.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    written = load_file(folder / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if written.keys() != wanted.keys():
        name = min(written.keys() ^ wanted.keys())
        raise CheckpointError(f"{folder} was written, and {name} is on one side only")
    for name, weight in wanted.items():
        if not torch.equal(written[name], weight.cpu()):
            raise CheckpointError(f"{folder} was written, and {name} has other values than in memory")


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state on the CPU in `dtype`; weights that share memory go on sharing it."""
    casts: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in casts:
            casts[key] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        state[name] = casts[key]
    return state


def _written_aside(folder: Path, write: Callable[[Path], None]) -> None:
    """Write to a folder aside, then rename it: whatever `write` does, `folder` is either as it was or complete."""
    aside, replaced = _aside(folder, write), folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _aside(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return a new folder beside `folder` with what `write` puts there; raise CheckpointError if that fails."""
    aside = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with quiet():
            write(aside)
        _follow_umask(aside)
    except DovetailError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise a dozen kinds
        shutil.rmtree(aside, ignore_errors=True)
        # The tokenizers library knows no kinds of errors: a full disk is a plain Exception with the system's words.
        is_full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
        what = "the disk is full" if is_full else " ".join(str(error).split()) or type(error).__name__
        hint = "what was there before, checkpoints too, is unharmed"
        if isinstance(error, PermissionError):
            hint = f"make {folder.parent} writable, then run the same command again: {hint}"
        elif is_full or isinstance(error, (OSError, SafetensorError)):
            hint = f"free some space, then run the same command again: {hint}"
        raise CheckpointError(f"the model could not be written to {folder}: {what}", hint=hint) from error
    return aside


def _follow_umask(folder: Path) -> None:
    """Give every file the mode that the process's umask asks for: safetensors makes files for their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
