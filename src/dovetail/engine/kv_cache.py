"""Keys and values of the tokens seen so far, in pages.

Responsible for: an arena as large as wanted or as large as fits, which page belongs to which sequence, and keeping the
used pages together.
Not responsible for: which sequence may have pages (scheduler.py), or attention over them (forward.py).

A page holds 64 tokens of one sequence: [kv heads, 64, head width] for keys and the same for values, so the
block of one head is contiguous. Sequences that begin alike may share full pages of their beginning. Where
attention has a kernel that walks page tables, pages lie anywhere. Elsewhere the arena is `dense`: the used
pages are always the first ones, 0 to n - 1; when sequences leave, the last pages move into the holes. That
costs at most one copied page for each freed page and lets attention read all used pages as one tensor, in
place. An arena for one sequence at a time is `lone`: heads come before pages, so the keys of a head lie in one
piece and any attention can read them in place.

Shapes: T tokens, H heads (here: of keys and values), K head width.
"""

from __future__ import annotations

import heapq
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dovetail.errors import GenerationError
from dovetail.model.placement import is_out_of_memory
from dovetail.planning.memory import ARENA_SHARE
from dovetail.planning.memory import PAGE_TOKENS as PAGE_TOKENS


def free_bytes(device: torch.device) -> int:
    """Return how much memory is still free on the device, the allocator's own reserve included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def allocate_arena(
    shape: KVShape, wanted_pages: int, device: torch.device, *, dense: bool = True, lone: bool = False
) -> KVArena:
    """Return an arena of `wanted_pages`, or of what fits, down to a single page; sequences then take turns."""
    planned = num_pages = max(1, min(wanted_pages, int(ARENA_SHARE * free_bytes(device)) // shape.page_bytes))
    while True:
        try:
            arena = KVArena(shape, num_pages, device, dense=dense, lone=lone)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if num_pages == 1:
                raise GenerationError(
                    f"no memory for one page of the KV cache ({shape.page_bytes} bytes) on {device}",
                    hint="free memory on the device, or use a smaller model or precision",
                ) from error
            num_pages = num_pages * 3 // 4
            continue
        if num_pages < planned:
            warnings.warn(
                f"KV cache: memory for {num_pages} pages in place of {planned}; fewer answers run at once",
                stacklevel=2,
            )
        return arena


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class KVShape:
    """The sizes and precision of one token's keys and values in a model."""

    num_layers: int
    num_heads: int
    head_width: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return self.num_layers * 2 * self.num_heads * PAGE_TOKENS * self.head_width * self.dtype.itemsize


class KVArena:
    """The pages' storage: a tensor [2, pages, heads, 64, width] a layer, allocated once.

    There is one tensor a layer, because free memory between training's tensors is seldom in one piece.

    For a lone sequence it is [2, heads, pages, 64, width]: the sequence holds pages 0, 1, 2, ... in this order.
    """

    def __init__(
        self, shape: KVShape, num_pages: int, device: torch.device, *, dense: bool = True, lone: bool = False
    ) -> None:
        self.shape = shape
        self.num_pages = num_pages
        self.device = device
        self.lone = lone
        """True if it serves one sequence at a time."""
        self.dense = dense and not lone
        """True if used pages are kept together, and cleared when taken: attention reads them whole."""
        size = (2, num_pages, shape.num_heads, PAGE_TOKENS, shape.head_width)
        self._storage = [torch.empty(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        # Views made once, because making them for each token and layer would show on the CPU.
        self._rows = [tuple(kind.view(-1, shape.head_width) for kind in layer) for layer in self._storage]
        self._tiles = [
            tuple(kind.view(-1, PAGE_TOKENS, shape.head_width) for kind in layer) for layer in self._storage
        ]

    def write(self, layer: int, key_1HTK: Tensor, value_1HTK: Tensor, rows_HT: Tensor) -> None:
        """Store the keys and values of some tokens in the given rows (see `rows_of`)."""
        for rows, new in zip(self._rows[layer], (key_1HTK, value_1HTK), strict=True):
            rows.index_copy_(0, rows_HT, new.reshape(-1, self.shape.head_width))

    def tiles(self, layer: int, num_pages: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first pages: [pages x heads, 64, K] each, without a copy."""
        count = num_pages * self.shape.num_heads
        keys, values = self._tiles[layer]
        return keys[:count], values[:count]

    def sequence(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """View keys and values of the lone sequence's tokens `start` to `end` - 1: [1, heads, T, K] each, no copy."""
        size = (1, self.shape.num_heads, -1, self.shape.head_width)
        keys, values = self._rows[layer]
        return keys.view(size)[:, :, start:end], values.view(size)[:, :, start:end]

    def bases(self) -> Tensor:
        """Return int64 [layers, 2] on the host: the addresses where each layer's keys and its values begin."""
        return torch.tensor([[kind.data_ptr() for kind in layer] for layer in self._storage])

    def read(self, layer: int, rows_HT: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values in some rows, [1, heads, T, K] each."""
        size = (1, self.shape.num_heads, -1, self.shape.head_width)
        keys, values = (rows.index_select(0, rows_HT).view(size) for rows in self._rows[layer])
        return keys, values

    def rows_of(self, pages_T: Tensor, offsets_T: Tensor) -> Tensor:
        """Return row numbers [heads x T], heads first, of the tokens at these places in these pages."""
        head_H1 = torch.arange(self.shape.num_heads, device=pages_T.device)[:, None]
        if self.lone:
            return ((head_H1 * self.num_pages + pages_T) * PAGE_TOKENS + offsets_T).view(-1)
        return ((pages_T * self.shape.num_heads + head_H1) * PAGE_TOKENS + offsets_T).view(-1)

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages that will be filled token by token.

        Attention reads whole pages and gives what lies beyond the last token the weight 0. That must be
        finite, because 0 times the infinity left behind by another sequence would be NaN.
        """
        if pages:
            index = torch.tensor(pages, device=self._storage[0].device)
            for layer in self._storage:
                layer.index_fill_(1, index, 0)

    def fill_randomly(self, num_pages: int) -> None:
        """Fill the first pages with normal random numbers, the same each time."""
        generator = torch.Generator(self.device).manual_seed(0)
        for layer in self._storage:
            layer[:, :num_pages].normal_(generator=generator)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to)."""
        if moves:
            source, target = torch.tensor(moves, device=self._storage[0].device).unbind(1)
            for layer in self._storage:
                layer[:, target] = layer[:, source]


class PagePool:
    """The used pages and the sequences that hold them, whose page lists (`table`) are edited in place."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap: the lowest page goes first
        self._holders: dict[int, list[list[int]]] = {}

    @property
    def num_used(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, table: list[int], count: int) -> None:
        """Append `count` free pages to a sequence's table."""
        assert count <= self.num_free
        for _ in range(count):
            page = heapq.heappop(self._free)
            self._holders[page] = [table]
            table.append(page)

    def share(self, table: list[int], pages: Sequence[int]) -> None:
        """Append full pages that other sequences hold and that are not written any more."""
        for page in pages:
            self._holders[page].append(table)
        table.extend(pages)

    def free(self, tables: Iterable[list[int]]) -> None:
        """Empty these tables, and free the pages that no other table holds."""
        for table in tables:
            for page in table:
                holders = self._holders[page]
                holders[:] = [holder for holder in holders if holder is not table]
                if not holders:
                    del self._holders[page]
                    heapq.heappush(self._free, page)
            table.clear()

    def close_ranks(self) -> list[tuple[int, int]]:
        """Renumber the used pages 0 to n - 1; returns the moves (from, to) that the storage has to follow."""
        used = self.num_used
        movers = sorted(page for page in self._holders if page >= used)
        holes = sorted(page for page in self._free if page < used)
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            holders = self._holders.pop(source)
            for holder in holders:
                holder[holder.index(source)] = target
            self._holders[target] = holders
        if moves:
            self._free = list(range(used, self.num_pages))
        return moves
