"""The generation loop over pages: admit and read prompts, make room, decode a token for each answer, retire.

Responsible for: that loop, and the arena it runs in.
Not responsible for: which answer is next (scheduler.py), or the model's modes (hybrid.py).

On a GPU the host runs one draw ahead: while a step computes, the tokens of the one before are read, handed to
their answers, and the step after is prepared. An answer that turns out to have ended takes part in one step
more; that token is dropped.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dovetail.engine.forward import Draw, EagerDecoder, PackedModules, Prefill, draw_next, sampling_rows
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape, allocate_arena, pages_for
from dovetail.engine.scheduler import Answer, Chunk, Listener, Load, Scheduler


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of answers and tokens at once."""

    max_running: int
    """The most answers decoded together."""
    max_prefill_tokens: int
    """The most prompt tokens read in one forward; longer prompts are read in parts."""
    max_cache_tokens: int | None
    """The most tokens the arena may hold; None: as many as the answers need and memory holds."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The figures of one call to generate."""

    preempted: int
    """The number of times that an answer was preempted: it freed its pages and started again."""
    shared_tokens: int
    """The prompt tokens read once for several answers, the first reading not counted."""


class Decoder(Protocol):
    """One decode step; EagerDecoder or GraphDecoder."""

    lag: int

    def place(self, answers: Sequence[Answer], ids_S: Tensor) -> None: ...

    def forget(self, answers: Sequence[Answer]) -> None: ...

    def step(self, answers: Sequence[Answer], version: int) -> Draw: ...


class Source(Protocol):
    """The source of requests while others are being answered."""

    def poll(self, load: Load) -> Sequence[Answer] | None:
        """Return answers that join before the next step; None: no more will come, and running ones are abandoned.

        May block while `load` is idle. Between two polls the answers handed over have grown by what was drawn;
        one whose `finish_reason` is set in here ("cancelled") frees its pages before the next step.
        """
        ...


class PagedGeneration:
    """Generation with one KV arena, which lives as long as this object."""

    def __init__(
        self,
        modules: PackedModules,
        shape: KVShape,
        device: torch.device,
        limits: Limits,
        *,
        may_capture: bool = True,
    ) -> None:
        """Keep the settings; may_capture: decode with captured graphs where the device has them."""
        self._modules = modules
        self._shape = shape
        self._device = device
        self._limits = limits
        self._has_kernel = may_capture and _has_kernel(shape, device)
        self._arena: KVArena | None = None
        self._decoder: Decoder | None = None

    @property
    def capacity(self) -> int:
        """The tokens that the arena holds; 0 before there is one."""
        return 0 if self._arena is None else self._arena.num_pages * PAGE_TOKENS

    def reserve(self, answers: Sequence[Answer]) -> int:
        """Make the arena as large as these answers can use; returns how many tokens it holds."""
        return self._reserve([pages_for(answer.max_tokens) for answer in answers])

    def reserve_for(self, longest: Sequence[int]) -> int:
        """Reserve for answers of up to so many tokens each, prompts included."""
        return self._reserve([pages_for(num_tokens) for num_tokens in longest])

    def _reserve(self, pages: Sequence[int]) -> int:
        """Make the arena and the decoder for answers that can use so many pages each; returns its tokens."""
        wanted = sum(heapq.nlargest(self._limits.max_running, pages))
        if self._limits.max_cache_tokens is not None:
            wanted = min(wanted, max(1, self._limits.max_cache_tokens // PAGE_TOKENS))
        places = min(len(pages), self._limits.max_running)
        lone = places == 1 and not self._has_kernel
        if self._arena is None or self._arena.num_pages < wanted or self._arena.lone != lone:
            self._arena = self._decoder = None  # the old one is freed first
            self._arena = self._allocate(wanted, lone=lone)
        self._decoder = self._decoder_for(
            self._arena, places=places, pages=min(max(pages), self._arena.num_pages)
        )
        return self._arena.num_pages * PAGE_TOKENS

    def _allocate(self, wanted: int, *, lone: bool) -> KVArena:
        """Allocate as many pages as every process of the group has room for: all admit and preempt the same answers."""
        dense = not self._has_kernel
        arena = allocate_arena(self._shape, wanted, self._device, dense=dense, lone=lone)
        fewest = self._modules.group.least(arena.num_pages, self._device)
        if fewest < arena.num_pages:
            del arena  # before the smaller one takes its place
            arena = allocate_arena(self._shape, fewest, self._device, dense=dense, lone=lone)
        return arena

    def _decoder_for(self, arena: KVArena, *, places: int, pages: int) -> Decoder:
        """Return a decoder for `places` answers that run together, the longest of `pages` pages."""
        if not self._has_kernel:
            return EagerDecoder(self._modules, arena, self._device)
        from dovetail.engine.graphs import GraphDecoder  # Triton is there on GPUs only

        kept = self._modules.captured
        fits = isinstance(kept, GraphDecoder) and kept.serves(places, pages)
        # Recording runs the step once, with what it sends: all processes of a group do it, or none.
        if not self._modules.group.least(int(fits), self._device):
            kept = self._modules.captured = None  # what it holds is freed first
            kept = GraphDecoder(self._modules, arena, self._device, places=places, pages=pages)
            self._modules.captured = kept
        assert isinstance(kept, GraphDecoder)
        kept.use(arena)
        return kept

    def close(self) -> None:
        """Free the arena, and everything else that no later block could use."""
        self._arena = self._decoder = None
        if self._modules.captured is not None:
            self._modules.captured.rest()

    @torch.no_grad()
    def run(self, answers: Sequence[Answer], listener: Listener) -> Counts:
        """Bring every answer to its end."""
        scheduler, decoder = self._start(answers)
        draws = _Draws(scheduler, decoder, listener)
        try:
            while scheduler.waiting or scheduler.running:
                self._step(scheduler, decoder, draws)
        finally:
            decoder.forget(answers)  # a listener may have raised; the rows serve the next call
        return Counts(scheduler.num_preempted, scheduler.num_shared_tokens)

    @torch.no_grad()
    def serve(self, source: Source, listener: Listener) -> None:
        """Answer what the source hands over, each beside the others, until it signals that no more will come."""
        scheduler, decoder = self._start(())
        draws = _Draws(scheduler, decoder, listener)
        try:
            while (arrived := source.poll(scheduler.load())) is not None:
                decoder.forget(scheduler.drop_ended())
                scheduler.waiting.extend(arrived)
                if scheduler.waiting or scheduler.running:
                    self._step(scheduler, decoder, draws)
        finally:
            decoder.forget(scheduler.running)

    def _start(self, answers: Sequence[Answer]) -> tuple[Scheduler, Decoder]:
        assert self._arena is not None
        assert self._decoder is not None
        limits = self._limits
        scheduler = Scheduler(
            answers,
            self._arena,
            max_running=limits.max_running,
            max_prefill_tokens=limits.max_prefill_tokens,
            shares_beginnings=self._modules.rope_limit is None,
        )
        return scheduler, self._decoder

    def _step(self, scheduler: Scheduler, decoder: Decoder, draws: _Draws) -> None:
        chunks = scheduler.admit()
        if chunks:
            draws.add(self._read(chunks))
        if scheduler.is_short_of_pages() or self._outgrown(scheduler):
            draws.read(keep=0)
        outgrown = self._outgrown(scheduler)
        scheduler.send_back(outgrown)
        decoder.forget([*outgrown, *scheduler.make_room()])
        ready = scheduler.ready()
        if ready:
            draws.add(self._decode(ready, scheduler.version))
        elif not chunks:
            draws.read(keep=0)

    def _outgrown(self, scheduler: Scheduler) -> list[Answer]:
        """Return the answers whose next token is read with other rope frequencies than the keys that are stored."""
        return [answer for answer in scheduler.ready() if self._modules.rereads_at(answer.num_tokens)]

    def _read(self, chunks: Sequence[Chunk]) -> Draw | None:
        """Read parts of prompts; draw the next token of those that are complete."""
        assert self._arena is not None
        assert self._decoder is not None
        prefill = Prefill(chunks, self._arena, self._device)
        complete = [chunk.answer for chunk in chunks if chunk.is_last]
        logits_SV = self._modules.next_logits(
            prefill.ids_T, prefill.positions_T, prefill, prefill.last_index_S()
        )
        if not complete:
            return None
        rows = sampling_rows(complete, self._modules.vocabulary, self._device)
        ids_S, numbers = self._modules.from_first(*draw_next(logits_SV, rows))
        self._decoder.place(complete, ids_S)
        return Draw.of(complete, numbers)

    def _decode(self, answers: Sequence[Answer], version: int) -> Draw:
        """Feed every answer its last token and draw the next."""
        assert self._decoder is not None
        draw = self._decoder.step(answers, version)
        for answer in answers:
            answer.num_cached += 1
        return draw


class _Draws:
    """The tokens under way from the device to their answers, in order."""

    def __init__(self, scheduler: Scheduler, decoder: Decoder, listener: Listener) -> None:
        self._scheduler = scheduler
        self._decoder = decoder
        self._listener = listener
        self._under_way: deque[Draw] = deque()

    def add(self, draw: Draw | None) -> None:
        """Add a draw, and read those that may not lag behind for this decoder."""
        if draw is not None:
            self._under_way.append(draw)
        self.read(keep=self._decoder.lag)

    def read(self, *, keep: int) -> None:
        """Read all but the newest `keep`, and retire answers that have ended."""
        while len(self._under_way) > keep:
            self._under_way.popleft().deliver(self._listener)
        self._decoder.forget(self._scheduler.retire())


def _has_kernel(shape: KVShape, device: torch.device) -> bool:
    """Return whether the kernels of the captured decode step can serve this cache."""
    if device.type != "cuda" or shape.head_width > 256:
        return False
    return shape.dtype in (torch.float32, torch.bfloat16, torch.float16)
