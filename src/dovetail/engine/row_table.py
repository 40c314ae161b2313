"""The rows of a static batch: the row of each answer, and what a decode step must know of each row.

Responsible for: one small int32 table on the host, rows that are taken and given up, and keeping them close together.
Not responsible for: the step that reads the table on the device (graphs.py), which answers run (scheduler.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from enum import IntEnum

import numpy
import torch
from torch import Tensor

from dovetail.engine.sampling import Sampling, SamplingRows, random_keys
from dovetail.engine.scheduler import Answer

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


class RowTable:
    """The table of rows on the host."""

    def __init__(self, places: int, pages: int) -> None:
        """Make room for `places` answers that run together, the longest of `pages` pages."""
        num_rows = size_for(places)
        width = 1 << (pages - 1).bit_length()  # the next block's longest answer may be a little longer
        self.numbers = numpy.zeros((num_rows, Column.PAGES + width), dtype=numpy.int32)
        self._floats = self.numbers.view(numpy.float32)
        self._row_of: dict[Answer, int] = {}
        self._free = list(range(num_rows))

    def __len__(self) -> int:
        return len(self.numbers)

    def has_room(self, places: int, pages: int) -> bool:
        """Return whether so many answers of so many pages fit."""
        return places <= len(self.numbers) and pages <= self.numbers.shape[1] - Column.PAGES

    def add(self, answers: Sequence[Answer]) -> list[int]:
        """Give each answer the lowest free row, and return the rows."""
        keys = random_keys(torch.tensor([answer.seed & (2**63 - 1) for answer in answers])).tolist()
        rows = [heapq.heappop(self._free) for _ in answers]
        for answer, row, key in zip(answers, rows, keys, strict=True):
            self._row_of[answer] = row
            self._write_settings(row, answer.sampling, key)
        return rows

    def remove(self, answers: Sequence[Answer]) -> None:
        """Free the rows of these answers, where they have any."""
        for answer in answers:
            row = self._row_of.pop(answer, None)
            if row is not None:
                heapq.heappush(self._free, row)

    def rows_of(self, answers: Sequence[Answer]) -> list[int]:
        """Return the row of each answer."""
        return [self._row_of[answer] for answer in answers]

    def fill(self, answers: Sequence[Answer], rows: Sequence[int]) -> Tensor:
        """Write the lengths, draws and pages of a step, all other rows empty; returns int32 [rows, columns]."""
        self.numbers[:, Column.LENGTH] = -1
        for answer, row in zip(answers, rows, strict=True):
            line = self.numbers[row]
            line[Column.LENGTH] = answer.num_tokens - 1
            line[Column.DRAW] = answer.num_drawn
            line[Column.PAGES : Column.PAGES + len(answer.pages)] = answer.pages
        return torch.from_numpy(self.numbers)

    def close_ranks(self) -> tuple[list[int], list[int]]:
        """Move the last rows into free ones where a smaller batch then does; returns (rows moved, their new rows)."""
        sources: list[int] = []
        targets: list[int] = []
        highest = max(self._row_of.values())
        if size_for(len(self._row_of)) == size_for(highest + 1):
            return sources, targets
        for answer, row in sorted(self._row_of.items(), key=lambda item: -item[1]):
            if self._free[0] > row:
                break
            target = heapq.heapreplace(self._free, row)
            self.numbers[target] = self.numbers[row]
            self._row_of[answer] = target
            sources.append(row)
            targets.append(target)
        return sources, targets

    def _write_settings(self, row: int, sampling: Sampling, key: int) -> None:
        line, floats = self.numbers[row], self._floats[row]
        line[Column.KEY] = key - 2**32 if key >= 2**31 else key
        line[Column.GREEDY] = sampling.temperature == 0
        floats[Column.TEMPERATURE] = sampling.temperature or 1.0
        line[Column.TOP_K] = min(sampling.top_k or 2**31 - 1, 2**31 - 1)
        floats[Column.TOP_P] = sampling.mass_limit
        floats[Column.MIN_P] = sampling.min_p or 0.0
        floats[Column.PENALTY] = sampling.repetition_penalty or 1.0


def sampling_columns(
    state: Tensor, seen_SV: Tensor | None, *, truncates: bool, num_likeliest: int
) -> SamplingRows:
    """Return the table's columns on the device in the form of `sample_next`; no flag depends on what the rows hold."""
    floats = state.view(torch.float32)
    return SamplingRows(
        keys_S=state[:, Column.KEY].long() & 0xFFFFFFFF,
        positions_S=state[:, Column.DRAW].long(),
        temperature_S=floats[:, Column.TEMPERATURE],
        greedy_S=state[:, Column.GREEDY] != 0,
        top_k_S=state[:, Column.TOP_K].long(),
        top_p_S=floats[:, Column.TOP_P],
        min_p_S=floats[:, Column.MIN_P],
        penalty_S=floats[:, Column.PENALTY],
        all_greedy=False,
        some_greedy=True,
        all_at_one=False,
        truncates=truncates,
        penalises=seen_SV is not None,
        num_likeliest=num_likeliest,
        seen_SV=seen_SV,
        draws_ahead=1,
    )


def size_for(num_rows: int) -> int:
    """Return the smallest size for so many rows."""
    return next((size for size in _SIZES if size >= num_rows), -(-num_rows // 256) * 256)
