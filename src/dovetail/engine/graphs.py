"""The decode step on a GPU as one captured graph per batch size: the host replays it and never waits for it.

Responsible for: the rows of the batch on the device, the row of each answer, which graph is replayed.
Not responsible for: the step that is captured (fused.py, modules.py), capturing (capture.py), the kernels (kernels/),
which answers run (scheduler.py).

What the host knows of each row (length, pages, sampling, random key) is one small int32 table, sent anew with
every step; only the token drawn last stays on the device, where the next step reads it. So a graph serves any
lengths and any answers, rows join and leave between two replays, and nothing is allocated while decoding. What is
captured is the fused step (fused.py) where it knows the model and agrees with its modules, else the modules.

Graphs hold the addresses of weights, but read that of the cache from the device: a later block, an optimiser step
later, replays the same graphs on any arena if the weights are still in the same place.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dovetail.engine.capture import captured
from dovetail.engine.forward import Draw, draw_next, to_device
from dovetail.engine.fused import fused_step
from dovetail.engine.kernels.paged_attention import AS_THEY_ARE, Turn, paged_attention
from dovetail.engine.kernels.sampling import draw_tokens
from dovetail.engine.kv_cache import KVArena
from dovetail.engine.modules import PackedModules
from dovetail.engine.sampling import MOST_TOP_LOGPROBS, Sampling, SamplingRows, random_keys, uniforms
from dovetail.engine.scheduler import Answer
from dovetail.model.attention import AttentionCall

_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The numbers of rows that graphs are captured for; a step of another number uses the next larger graph."""


class Column(IntEnum):
    """The columns of the table of rows; floats are stored as their bits. The pages of the row follow."""

    LENGTH = 0
    """The tokens stored so far; -1 for an empty row."""
    DRAW = 1
    KEY = 2
    TEMPERATURE = 3
    GREEDY = 4
    TOP_K = 5
    TOP_P = 6
    MIN_P = 7
    PENALTY = 8
    PAGES = 9


class Kind(NamedTuple):
    """The properties of one captured step; the graphs of a decoder differ in these alone."""

    size: int
    """The number of rows."""
    truncates: bool
    penalises: bool
    num_likeliest: int
    """The number of likeliest tokens reported for each row."""


class GraphLayout:
    """The attention of one decode step; registered attention calls `attend` in every layer."""

    def __init__(self, bases: Tensor, state: Tensor) -> None:
        """Keep `bases`, the result of `KVArena.bases` on the device, and `state`, the table of rows."""
        self._bases = bases
        self._state = state

    @classmethod
    def of(cls, arena: KVArena, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> GraphLayout:
        """Make the layout of rows with these pages, and so many tokens stored."""
        state = torch.zeros(len(tables), Column.PAGES + max(map(len, tables)), dtype=torch.int32)
        for line, table, length in zip(state, tables, lengths, strict=True):
            line[Column.LENGTH] = length
            line[Column.PAGES : Column.PAGES + len(table)] = torch.tensor(table)
        return cls(arena.bases().to(arena.device), state.to(arena.device))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, turn: Turn = AS_THEY_ARE
    ) -> Tensor:
        """Store key and value [1, kv heads, B, K], attend with query [1, H, B, K]; returns [1, B, H, K].

        turn: the change of queries and keys before anything else.
        """
        return paged_attention(
            _dense_rows(query),
            _dense_rows(key),
            _dense_rows(value),
            self._bases[call.layer],
            self._state,
            table=Column.PAGES,
            scale=call.scale(query.shape[-1]),
            softcap=call.softcap,
            window=call.window,
            turn=turn,
        )


class GraphDecoder:
    """The decoding of all answers in rows of one static batch; the host may run one draw ahead."""

    lag = 1

    def __init__(
        self, modules: PackedModules, arena: KVArena, device: torch.device, *, places: int, pages: int
    ) -> None:
        """Allocate the rows for `places` answers that run together, the longest of `pages` pages.

        No sequence may use the arena yet.
        """
        self._modules = modules
        self._device = device
        self._next_logits = _step_of(modules, arena)
        self._recorded = modules.recorded_state()
        self._bases: Tensor | None = None
        num_rows = _size_for(places)
        width = 1 << (pages - 1).bit_length()  # the next block's longest answer may be a little longer
        self._table = numpy.zeros((num_rows, Column.PAGES + width), dtype=numpy.int32)
        self._floats = self._table.view(numpy.float32)
        self._state = torch.zeros(self._table.shape, dtype=torch.int32, device=device)
        self._ids_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._most_likeliest = min(MOST_TOP_LOGPROBS, modules.vocabulary)
        self._numbers = torch.zeros(
            2 + 2 * self._most_likeliest, num_rows, dtype=torch.float64, device=device
        )
        self._seen_BV: Tensor | None = None
        self._row_of: dict[Answer, int] = {}
        self._free = list(range(num_rows))
        self._graphs: dict[Kind, torch.cuda.CUDAGraph | None] = {}

    def serves(self, places: int, pages: int) -> bool:
        """Return whether there are enough rows, and the graphs were recorded from the model as it is now."""
        num_rows, width = self._table.shape
        enough = places <= num_rows and pages <= width - Column.PAGES
        return enough and self._recorded == self._modules.recorded_state()

    def use(self, arena: KVArena) -> None:
        """Decode in this arena from now on."""
        bases = arena.bases().pin_memory()
        if self._bases is None:
            self._bases = torch.empty_like(bases, device=self._device)
        self._bases.copy_(bases, non_blocking=True)

    def rest(self) -> None:
        """Keep what the next block can use, and no memory that grows with the vocabulary."""
        self._seen_BV = None
        self._graphs = {kind: graph for kind, graph in self._graphs.items() if not kind.penalises}

    def place(self, answers: Sequence[Answer], ids_S: Tensor) -> None:
        """Give each answer a row, with the token it drew."""
        rows = []
        keys = random_keys(torch.tensor([answer.seed & (2**63 - 1) for answer in answers])).tolist()
        for answer, key in zip(answers, keys, strict=True):
            row = heapq.heappop(self._free)
            self._row_of[answer] = row
            self._write_settings(row, answer.sampling, key)
            rows.append(row)
        rows_S = to_device(rows, self._device)
        self._ids_B.index_copy_(0, rows_S, ids_S)
        if any(answer.sampling.penalises for answer in answers):
            self._remember(answers, rows_S, ids_S)

    def forget(self, answers: Sequence[Answer]) -> None:
        """Free the rows of these answers."""
        for answer in answers:
            row = self._row_of.pop(answer, None)
            if row is not None:
                heapq.heappush(self._free, row)

    def step(self, answers: Sequence[Answer], version: int) -> Draw:
        """Feed every answer its last token and draw the next."""
        self._close_ranks()
        rows = [self._row_of[answer] for answer in answers]
        kind = Kind(
            _size_for(max(rows) + 1),
            any(answer.sampling.truncates for answer in answers),
            any(answer.sampling.penalises for answer in answers),
            self._most_likeliest if any(answer.sampling.top_logprobs for answer in answers) else 0,
        )
        graph = self._graph(kind)
        self._table[:, Column.LENGTH] = -1
        for answer, row in zip(answers, rows, strict=True):
            line = self._table[row]
            line[Column.LENGTH] = answer.num_tokens - 1
            line[Column.DRAW] = answer.num_drawn
            line[Column.PAGES : Column.PAGES + len(answer.pages)] = answer.pages
        # Newly pinned each time: the last copy may not have been sent yet.
        self._state.copy_(torch.from_numpy(self._table).pin_memory(), non_blocking=True)
        if graph is None:
            self._compute(kind)
        else:
            graph.replay()
        told = self._numbers[: 2 + 2 * kind.num_likeliest]
        return Draw.of(answers, told[:, to_device(rows, self._device)])

    def _write_settings(self, row: int, sampling: Sampling, key: int) -> None:
        line, floats = self._table[row], self._floats[row]
        line[Column.KEY] = key - 2**32 if key >= 2**31 else key
        line[Column.GREEDY] = sampling.temperature == 0
        floats[Column.TEMPERATURE] = sampling.temperature or 1.0
        line[Column.TOP_K] = min(sampling.top_k or 2**31 - 1, 2**31 - 1)
        floats[Column.TOP_P] = sampling.mass_limit
        floats[Column.MIN_P] = sampling.min_p or 0.0
        floats[Column.PENALTY] = sampling.repetition_penalty or 1.0

    def _remember(self, answers: Sequence[Answer], rows_S: Tensor, ids_S: Tensor) -> None:
        """Note the tokens already in each sequence, for the repetition penalty."""
        if self._seen_BV is None:
            size = (len(self._table), self._modules.vocabulary)
            self._seen_BV = torch.zeros(size, dtype=torch.bool, device=self._device)
        for answer, row, last in zip(answers, rows_S, ids_S, strict=True):
            self._seen_BV[row] = False
            self._seen_BV[row, to_device(answer.all_ids, self._device)] = True
            self._seen_BV[row, last] = True

    def _close_ranks(self) -> None:
        """Move the last rows into free ones, where that makes the batch fit a smaller graph."""
        highest = max(self._row_of.values())
        if _size_for(len(self._row_of)) == _size_for(highest + 1):
            return
        by_row = sorted(self._row_of.items(), key=lambda item: -item[1])
        sources, targets = [], []
        for answer, row in by_row:
            if self._free[0] > row:
                break
            target = heapq.heapreplace(self._free, row)
            self._table[target] = self._table[row]
            self._row_of[answer] = target
            sources.append(row)
            targets.append(target)
        sources_N, targets_N = to_device(sources, self._device), to_device(targets, self._device)
        self._ids_B[targets_N] = self._ids_B[sources_N]
        if self._seen_BV is not None:
            self._seen_BV[targets_N] = self._seen_BV[sources_N]

    def _compute(self, kind: Kind) -> None:
        """Compute the step, from static buffers to static buffers."""
        assert self._bases is not None
        size = kind.size
        state, ids_B = self._state[:size], self._ids_B[:size]
        numbers = self._numbers[: 2 + 2 * kind.num_likeliest, :size]
        positions_B = state[:, Column.LENGTH].clamp(min=0).long()
        logits_BV = self._next_logits(ids_B, positions_B, GraphLayout(self._bases, state))
        if not (kind.truncates or kind.penalises or kind.num_likeliest):
            draw_tokens(
                logits_BV.contiguous(), state, ids_B, numbers, draw=Column.DRAW, key=Column.KEY,
                temperature=Column.TEMPERATURE, greedy=Column.GREEDY,
            )  # fmt: skip
            if self._modules.group.size > 1:
                first = self._modules.group.from_first(numbers.contiguous())
                numbers.copy_(first)
                ids_B.copy_(first[0])
            return
        seen_BV = self._seen_BV[:size] if kind.penalises and self._seen_BV is not None else None
        drawn_B, told = self._modules.from_first(*draw_next(logits_BV, _RowsOfState(state, seen_BV, kind)))
        ids_B.copy_(drawn_B)
        numbers.copy_(told)
        if seen_BV is not None:
            seen_BV.scatter_(1, drawn_B[:, None], True)

    def _graph(self, kind: Kind) -> torch.cuda.CUDAGraph | None:
        """Return the graph, captured at its first use; None if the modules cannot be captured, with one warning."""
        if kind not in self._graphs:
            self._graphs[kind] = None if self._modules.cannot_be_captured else self._capture(kind)
        return self._graphs[kind]

    def _capture(self, kind: Kind) -> torch.cuda.CUDAGraph | None:
        before_B = self._ids_B.clone()
        seen_BV = None if self._seen_BV is None else self._seen_BV.clone()
        self._state[:, Column.LENGTH] = -1  # empty rows: nothing is stored
        graph, why_not = captured(self._device, lambda: self._compute(kind))
        if graph is None:
            self._modules.cannot_be_captured = True
            warnings.warn(
                f"{self._modules.name} cannot be captured as a CUDA graph ({why_not}): decoding runs module by "
                "module, which is right but slower",
                stacklevel=2,
            )
        self._ids_B.copy_(before_B)
        if seen_BV is not None and self._seen_BV is not None:
            self._seen_BV.copy_(seen_BV)
        return graph


class _RowsOfState(SamplingRows):
    """The columns of the table in the form of sample_next; no flag depends on what the rows hold."""

    def __init__(self, state: Tensor, seen_BV: Tensor | None, kind: Kind) -> None:
        floats = state.view(torch.float32)
        self.keys_S = state[:, Column.KEY].long() & 0xFFFFFFFF
        self.positions_S = state[:, Column.DRAW].long()
        self.all_greedy = False
        self.some_greedy = True
        self.all_at_one = False
        self.temperature_S = floats[:, Column.TEMPERATURE]
        self.greedy_S = state[:, Column.GREEDY] != 0
        self.truncates = kind.truncates
        self.num_likeliest = kind.num_likeliest
        self.top_k_S = state[:, Column.TOP_K].long()
        self.top_p_S = floats[:, Column.TOP_P]
        self.min_p_S = floats[:, Column.MIN_P]
        self.penalises = seen_BV is not None
        self.penalty_S = floats[:, Column.PENALTY]
        self.seen_SV = seen_BV

    def uniforms_S(self) -> Tensor:
        """Return the random numbers of the one draw that the table is for."""
        return uniforms(self.keys_S, self.positions_S)


def _size_for(num_rows: int) -> int:
    """Return the smallest size for so many rows."""
    return next((size for size in _SIZES if size >= num_rows), -(-num_rows // 256) * 256)


def _dense_rows(x: Tensor) -> Tensor:
    """Make each head's own numbers neighbours, as the kernel requires; heads and rows may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _step_of(modules: PackedModules, arena: KVArena) -> Callable[..., Tensor]:
    """Choose what computes a decode step's logits: the fused step, or the modules with the reason said once."""
    step, why_not = fused_step(modules, arena, GraphLayout.of)
    if step is not None:
        return step.next_logits
    if why_not != modules.why_not_fused and modules.group.size == 1:
        warnings.warn(
            f"{modules.name} decodes module by module, which is right but slower: {why_not}", stacklevel=2
        )
    modules.why_not_fused = why_not
    return modules.next_logits
