"""The generation loop over pages: admit and prefill, make room, decode a token for everybody, retire.

Responsible for: that loop, and the arena it runs in.
Not responsible for: who is next (scheduler.py), or the model's modes (hybrid.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.engine.answers import Answer, Listener
from dovetail.engine.decode import DecodeBatch, sampling_rows
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape, pages_for
from dovetail.engine.memory import allocate_arena
from dovetail.engine.modules import PackedModules
from dovetail.engine.prefill import PrefillLayout, packed_prompts
from dovetail.engine.sampling import sample_next
from dovetail.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may happen at once."""

    max_running: int
    """Answers decoded together."""
    max_prefill_tokens: int
    """Prompt tokens read in one forward; a single longer prompt is still read whole."""
    max_cache_tokens: int | None
    """Tokens the arena may hold; None: what is asked for and fits in memory."""


class PagedGeneration:
    """Generation with one KV arena, which lives as long as this object."""

    def __init__(
        self,
        modules: PackedModules,
        shape: KVShape,
        device: torch.device,
        limits: Limits,
    ) -> None:
        self._modules = modules
        self._shape = shape
        self._device = device
        self._limits = limits
        self._arena: KVArena | None = None
        self._vocabulary = 0

    def reserve(self, answers: Sequence[Answer]) -> int:
        """Make the arena as large as these answers can use; returns how many tokens it holds."""
        wanted = sum(
            heapq.nlargest(self._limits.max_running, (pages_for(answer.max_tokens) for answer in answers))
        )
        if self._limits.max_cache_tokens is not None:
            wanted = min(wanted, max(1, self._limits.max_cache_tokens // PAGE_TOKENS))
        if self._arena is None or self._arena.num_pages < wanted:
            self._arena = None  # the smaller one is freed first
            self._arena = allocate_arena(self._shape, wanted, self._device)
        return self._arena.num_pages * PAGE_TOKENS

    @torch.no_grad()
    def run(self, answers: Sequence[Answer], listener: Listener) -> int:
        """Bring every answer to its end; returns how many preemptions that took."""
        assert self._arena is not None
        scheduler = Scheduler(
            answers,
            self._arena,
            max_running=self._limits.max_running,
            max_prefill_tokens=self._limits.max_prefill_tokens,
        )
        batch: DecodeBatch | None = None
        while scheduler.waiting or scheduler.running:
            admitted = scheduler.admit()
            if admitted:
                self._prefill(admitted, listener)
                scheduler.retire()
            tables_changed = scheduler.make_room()
            if not scheduler.running:
                continue
            if batch is None or batch.answers != scheduler.running:
                batch = DecodeBatch(scheduler.running, self._arena, self._vocabulary, self._device)
            elif tables_changed:
                batch.remap()
            self._decode(batch, listener)
            scheduler.retire()
        return scheduler.num_preempted

    def _prefill(self, answers: Sequence[Answer], listener: Listener) -> None:
        """Read the prompts and draw each one's next token."""
        assert self._arena is not None
        packed = packed_prompts(answers).to(self._device)
        layout = PrefillLayout(packed, answers, self._arena)
        logits_SV = self._modules.next_logits(
            packed.token_ids_T, packed.position_ids_T(), layout, packed.last_index_S()
        )
        self._vocabulary = logits_SV.shape[-1]
        rows = sampling_rows(answers, self._vocabulary, self._device)
        _accept(answers, *sample_next(logits_SV, rows), listener)

    def _decode(self, batch: DecodeBatch, listener: Listener) -> None:
        """Feed every running answer its last token and draw the next."""
        logits_BV = self._modules.next_logits(batch.ids_B, batch.positions_B, batch.layout())
        ids_B, logprobs_B = sample_next(logits_BV, batch.sampling)
        batch.advance(ids_B)
        _accept(batch.answers, ids_B, logprobs_B, listener)


def _accept(answers: Sequence[Answer], ids_S: Tensor, logprobs_S: Tensor, listener: Listener) -> None:
    for answer, token_id, logprob in zip(answers, ids_S.tolist(), logprobs_S.tolist(), strict=True):
        answer.accept(token_id, logprob, listener)
