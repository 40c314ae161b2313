"""The slow, plain way to generate, for models whose attention cannot be replaced.

Responsible for: left-padded batches over the model's own cache; same requests, draws and endings as the fast
way.
Not responsible for: speed: batches wait for their longest answer.

Shapes: S sequences of one batch, L padded length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.engine.answers import Answer, Listener
from dovetail.engine.decode import sampling_rows
from dovetail.engine.modules import vocabulary_of
from dovetail.engine.transfer import Draw, draw_next
from dovetail.errors import GenerationError


def generate_padded(
    model: PreTrainedModel, answers: Sequence[Answer], listener: Listener, *, batch_size: int
) -> None:
    """Run the answers to their end, at most `batch_size` at a time, similar prompt lengths together."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise GenerationError(
            f"{type(model).__name__} has no cache of keys and values, so it cannot generate here",
            hint="choose a model with attention layers",
        )
    by_length = sorted(answers, key=lambda answer: len(answer.prompt))
    groups = [by_length] if _may_pad(model) else _equal_lengths(by_length)
    for group in groups:
        for start in range(0, len(group), batch_size):
            _generate_batch(model, group[start : start + batch_size], listener)


def _may_pad(model: PreTrainedModel) -> bool:
    """Whether left padding is harmless.

    A state carried from token to token would carry the padding. In float64, the float32 softmax that
    transformers takes turns the mask of padding into -inf, hence its rows into NaN.
    """
    return not getattr(model, "_is_stateful", False) and model.dtype != torch.float64


def _equal_lengths(by_length: Sequence[Answer]) -> list[list[Answer]]:
    return [list(group) for _, group in groupby(by_length, key=lambda answer: len(answer.prompt))]


def _generate_batch(model: PreTrainedModel, answers: Sequence[Answer], listener: Listener) -> None:
    device = next(model.parameters()).device
    length = max(len(answer.prompt) for answer in answers)
    padded = [[0] * (length - len(answer.prompt)) + list(answer.prompt) for answer in answers]
    ids_SL = torch.tensor(padded, device=device)
    starts_S = torch.tensor([length - len(answer.prompt) for answer in answers], device=device)
    mask_SL = (torch.arange(length, device=device) >= starts_S[:, None]).long()
    rows = sampling_rows(answers, vocabulary_of(model), device)
    cache: Any = None
    while any(answer.finish_reason is None for answer in answers):
        logits_SV, cache = _forward(model, ids_SL, mask_SL, cache)
        ids_S, numbers = draw_next(logits_SV, rows)
        rows.advance(ids_S)
        Draw.of(answers, numbers).deliver(listener)  # finished rows run on unheard
        ids_SL = ids_S[:, None]
        mask_SL = torch.cat([mask_SL, mask_SL.new_ones(len(answers), 1)], dim=1)


def _forward(model: PreTrainedModel, ids_SL: Tensor, mask_SL: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits of each row's next token, and the cache with these tokens in it."""
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in known:
        extra["position_ids"] = (mask_SL.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids_SL.shape[1] :]
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = 1
    output = model(input_ids=ids_SL, attention_mask=mask_SL, past_key_values=cache, use_cache=True, **extra)
    return output.logits[:, -1], output.past_key_values
