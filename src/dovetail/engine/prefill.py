"""Whole prompts, packed end to end: attention among them, their keys and values stored in pages.

Responsible for: where each prompt token's keys and values go; attention itself is that of training.
Not responsible for: cutting prompts into batches (scheduler.py).

Shapes: T packed tokens, S sequences, N pages of the longest, H heads (of keys and values), K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import PackedBatch, pack
from dovetail.engine.answers import Answer
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena
from dovetail.model.attention import PackedLayout


def packed_prompts(answers: Sequence[Answer]) -> PackedBatch:
    """All tokens the answers have so far (after a preemption also generated ones), end to end."""
    return pack([answer.all_ids for answer in answers], [[False] * answer.num_tokens for answer in answers])


class PrefillLayout:
    """The attention of one prefill: that of any packed batch, with keys and values kept."""

    def __init__(self, batch: PackedBatch, answers: Sequence[Answer], arena: KVArena) -> None:
        self._arena = arena
        self._packed = PackedLayout.of(batch)
        device = batch.token_ids_T.device
        width = max(len(answer.pages) for answer in answers)
        table = [[*answer.pages, *[0] * (width - len(answer.pages))] for answer in answers]
        lengths_S = torch.tensor(batch.lengths, device=device)
        sequence_T = torch.arange(len(answers), device=device).repeat_interleave(
            lengths_S, output_size=batch.num_tokens
        )
        positions_T = batch.position_ids_T()
        pages_T = torch.tensor(table, device=device)[sequence_T, positions_T // PAGE_TOKENS]
        self._rows_HT = arena.rows_of(pages_T, positions_T % PAGE_TOKENS)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store key and value [1, kv heads, T, K]; returns the packed attention [1, T, H, K]."""
        self._arena.write(module.layer_idx, key, value, self._rows_HT)
        return self._packed.attend(
            module, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap
        )
