"""The decode step on a GPU as one captured graph per batch size: the host replays it and never waits for it.

Responsible for: the rows of the batch on the device, and which graph is replayed.
Not responsible for: which answer has which row (row_table.py), the step that is captured (fused.py, forward.py),
capturing (capture.py), the kernels (kernels/), which answers run (scheduler.py).

What the host knows of each row (length, pages, sampling, random key) is one small int32 table, sent anew with
every step; only the token drawn last stays on the device, where the next step reads it. So a graph serves any
lengths and any answers, rows join and leave between two replays, and nothing is allocated while decoding. What is
captured is the fused step (fused.py) where it knows the model and agrees with its modules, else the modules.

Graphs hold the addresses of weights, but read that of the cache from the device: a later block, an optimiser step
later, replays the same graphs on any arena if the weights are still in the same place.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.engine.capture import captured
from dovetail.engine.forward import Draw, PackedModules, draw_next, to_device
from dovetail.engine.fused import fused_step
from dovetail.engine.kernels.paged_attention import AS_THEY_ARE, Turn, paged_attention
from dovetail.engine.kernels.sampling import draw_tokens
from dovetail.engine.kv_cache import KVArena
from dovetail.engine.row_table import Column, RowTable, sampling_columns, size_for
from dovetail.engine.sampling import MOST_TOP_LOGPROBS
from dovetail.engine.scheduler import Answer
from dovetail.model.attention import AttentionCall


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
        self._table = RowTable(places, pages)
        num_rows = len(self._table)
        self._state = torch.zeros(self._table.numbers.shape, dtype=torch.int32, device=device)
        self._ids_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._most_likeliest = min(MOST_TOP_LOGPROBS, modules.vocabulary)
        self._numbers = torch.zeros(
            2 + 2 * self._most_likeliest, num_rows, dtype=torch.float64, device=device
        )
        self._seen_BV: Tensor | None = None
        self._graphs: dict[Kind, torch.cuda.CUDAGraph | None] = {}

    def serves(self, places: int, pages: int) -> bool:
        """Return whether there are enough rows, and the graphs were recorded from the model as it is now."""
        return self._table.has_room(places, pages) and self._recorded == self._modules.recorded_state()

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
        rows_S = to_device(self._table.add(answers), self._device)
        self._ids_B.index_copy_(0, rows_S, ids_S)
        if any(answer.sampling.penalises for answer in answers):
            self._remember(answers, rows_S, ids_S)

    def forget(self, answers: Sequence[Answer]) -> None:
        """Free the rows of these answers."""
        self._table.remove(answers)

    def step(self, answers: Sequence[Answer], version: int) -> Draw:
        """Feed every answer its last token and draw the next."""
        self._move(*self._table.close_ranks())
        rows = self._table.rows_of(answers)
        kind = Kind(
            size_for(max(rows) + 1),
            any(answer.sampling.truncates for answer in answers),
            any(answer.sampling.penalises for answer in answers),
            self._most_likeliest if any(answer.sampling.top_logprobs for answer in answers) else 0,
        )
        graph = self._graph(kind)
        # Newly pinned each time: the last copy may not have been sent yet.
        self._state.copy_(self._table.fill(answers, rows).pin_memory(), non_blocking=True)
        if graph is None:
            self._compute(kind)
        else:
            graph.replay()
        numbers = self._numbers[: 2 + 2 * kind.num_likeliest]
        return Draw.of(answers, numbers[:, to_device(rows, self._device)])

    def _remember(self, answers: Sequence[Answer], rows_S: Tensor, ids_S: Tensor) -> None:
        """Note the tokens already in each sequence, for the repetition penalty."""
        if self._seen_BV is None:
            size = (len(self._table), self._modules.vocabulary)
            self._seen_BV = torch.zeros(size, dtype=torch.bool, device=self._device)
        for answer, row, last in zip(answers, rows_S, ids_S, strict=True):
            self._seen_BV[row] = False
            self._seen_BV[row, to_device(answer.all_ids, self._device)] = True
            self._seen_BV[row, last] = True

    def _move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let what the device keeps of a row follow it to its new row."""
        if not sources:
            return
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
        columns = sampling_columns(state, seen_BV, truncates=kind.truncates, num_likeliest=kind.num_likeliest)
        drawn_B, drawn_numbers = self._modules.from_first(*draw_next(logits_BV, columns))
        ids_B.copy_(drawn_B)
        numbers.copy_(drawn_numbers)
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
