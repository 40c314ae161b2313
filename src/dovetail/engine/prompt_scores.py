"""The probability that a model gives to the tokens of a prompt.

Responsible for: log-probability and rank of each token of a given sequence, and the likeliest tokens at its place.
Not responsible for: the tokens that are drawn (sampling.py).

They are those of the model itself, at temperature 1 and without truncation or penalty.

Shapes: T tokens, C tokens of one chunk, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import pack
from dovetail.engine.scheduler import TopLogprobs
from dovetail.model.forward import hidden_states
from dovetail.model.linear_logprobs import head_of

_CHUNK_BYTES = 256 * 2**20
"""The size of the logits that are held at once."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The judgement of a model on one token of a sequence, from those before it."""

    logprob: float
    rank: int
    """The rank of the token at its place; 1 for the likeliest."""
    top_logprobs: TopLogprobs
    """The likeliest tokens at its place, as many as were asked for."""


@torch.no_grad()
def prompt_scores(
    model: Any, token_ids: Sequence[int], *, count: int, device: torch.device
) -> list[TokenScore]:
    """Score every token but the first, which follows nothing. count: how many likeliest tokens to list at each."""
    batch = pack([token_ids], [[False] * len(token_ids)]).to(device)
    before_TD, head = hidden_states(model, batch)[:-1], head_of(model)
    chunk = max(1, _CHUNK_BYTES // (4 * head.weight_VD.shape[0]))
    scores: list[TokenScore] = []
    for start in range(0, len(before_TD), chunk):
        logits_CV = head.logits(before_TD[start : start + chunk])
        scores += _scores(logits_CV, batch.token_ids_T[start + 1 : start + 1 + chunk], count)
    return scores


def _scores(logits_CV: Tensor, ids_C: Tensor, count: int) -> list[TokenScore]:
    logprobs_CV = logits_CV.log_softmax(dim=-1)
    own_C1 = logprobs_CV.gather(1, ids_C[:, None])
    ranks_C = (logprobs_CV > own_C1).sum(dim=-1) + 1
    top = logprobs_CV.topk(count, dim=-1)
    rows = zip(
        own_C1.squeeze(1).tolist(), ranks_C.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
    )
    return [
        TokenScore(logprob, rank, list(zip(ids, values, strict=True))) for logprob, rank, ids, values in rows
    ]
