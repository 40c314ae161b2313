"""The forward over prompts, packed end to end, whole or in parts: attention, and keys and values stored in pages.

Responsible for: the places of each token's keys and values, and attention to what was stored before.
Not responsible for: cutting prompts into parts (scheduler.py).

A part of a sequence attends to its earlier tokens, which are in pages: they are gathered, with its own, into
packed keys and values. Where every sequence is read from its beginning nothing is gathered, and attention is
that of training.

Shapes: T packed tokens to read, S sequences, L longest part, M longest sequence so far, H heads (of keys and
values), K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import PackedBatch, cumulative, pack
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena
from dovetail.engine.scheduler import Chunk
from dovetail.engine.transfer import to_device
from dovetail.model.attention import PackedLayout, flash_attention, flash_can, padded_attention


class Prefill:
    """The inputs of the modules for one forward over some parts of sequences; also its attention layout."""

    def __init__(self, chunks: Sequence[Chunk], arena: KVArena, device: torch.device) -> None:
        self._arena = arena
        self._chunks = chunks
        ids = [chunk.answer.all_ids[chunk.start : chunk.end] for chunk in chunks]
        batch: PackedBatch = pack(ids, [[False] * len(part) for part in ids]).to(device)
        self.ids_T = batch.token_ids_T
        self._asking = PackedLayout.of(batch)
        starts = [chunk.start for chunk in chunks]
        self._reads_pages = any(starts)
        self._starts_S = to_device(starts, device)
        self.positions_T = batch.position_ids_T()
        if self._reads_pages:
            lengths_S = to_device(batch.lengths, device)
            self.positions_T += self._starts_S.repeat_interleave(lengths_S, output_size=batch.num_tokens)
        lengths = [chunk.answer.num_tokens for chunk in chunks]
        self.lengths_T = to_device(lengths, device).repeat_interleave(
            to_device(batch.lengths, device), output_size=batch.num_tokens
        )
        """The length of each token's sequence, with what is not read yet."""
        self._rows_HT = _rows(arena, chunks, batch.lengths, self.positions_T)
        ends = tuple(chunk.end for chunk in chunks)
        self._asked = self._asking
        if self._reads_pages:
            bounds_S1 = to_device(cumulative(ends), device, torch.int32)
            self._asked = PackedLayout(bounds_S1, ends)
            places_T = torch.cat([torch.arange(end) for end in ends]).to(device, non_blocking=True)
            self._past_HT = _rows(arena, chunks, ends, places_T)
        self._masks: dict[int | None, Tensor] = {}

    def last_index_S(self) -> Tensor:
        """Return the places in T, int64, of the last tokens of the parts that end their sequence."""
        bounds = cumulative([chunk.num_tokens for chunk in self._chunks])
        last = [bound - 1 for chunk, bound in zip(self._chunks, bounds[1:], strict=True) if chunk.is_last]
        return to_device(last, self.ids_T.device)

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
        """Store key and value [1, kv heads, T, K]; returns causal attention [1, T, H, K]."""
        self._arena.write(module.layer_idx, key, value, self._rows_HT)
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        if not self._reads_pages:
            return self._asking.attend(module, query, key, value, **options)  # type: ignore[arg-type]
        keys, values = self._arena.read(module.layer_idx, self._past_HT)
        window = sliding_window
        if softcap is None and flash_can(query, values):
            return flash_attention(
                query, keys, values, self._asking, self._asked, scaling=scaling, window=window
            )
        out_SHLK = padded_attention(
            self._asking.padded(query),
            self._asked.padded(keys),
            self._asked.padded(values),
            scaling=scaling,
            softcap=softcap,
            allowed=self._allowed(window),
        )
        return self._asking.packed(out_SHLK)

    def _allowed(self, window: int | None) -> Tensor:
        """Return bool [S, 1, L, M], True where a token may attend; padding attends as the last token does."""
        if window not in self._masks:
            device = self.ids_T.device
            lengths_S1 = to_device([chunk.num_tokens for chunk in self._chunks], device)[:, None]
            columns_L = torch.arange(self._asking.max_length, device=device)
            query_SL1 = (self._starts_S[:, None] + torch.minimum(columns_L, lengths_S1 - 1))[..., None]
            key_M = torch.arange(self._asked.max_length, device=device)
            allowed = key_M <= query_SL1
            if window is not None:
                allowed &= key_M > query_SL1 - window
            self._masks[window] = allowed[:, None]
        return self._masks[window]


def _rows(arena: KVArena, chunks: Sequence[Chunk], lengths: Sequence[int], places_T: Tensor) -> Tensor:
    """Return row numbers in the arena of tokens at these places, `lengths` of them for each sequence in turn."""
    device = places_T.device
    width = max(len(chunk.answer.pages) for chunk in chunks)
    table = [
        page for chunk in chunks for page in (*chunk.answer.pages, *[0] * (width - len(chunk.answer.pages)))
    ]
    table_SN = to_device(table, device).view(len(chunks), width)
    sequence_T = torch.arange(len(chunks), device=device).repeat_interleave(
        to_device(lengths, device), output_size=len(places_T)
    )
    return arena.rows_of(table_SN[sequence_T, places_T // PAGE_TOKENS], places_T % PAGE_TOKENS)
