"""The draw of the next token in two small kernels: statistics of each slice of the vocabulary, then the choice.

Responsible for: what `engine/sampling.py`'s sample_next computes without truncation and penalty: temperature or
greedy, by the same random numbers, and the log-probability of the token drawn.
Not responsible for: top-k, top-p, min-p and repetition penalty, which need sorted logits or the tokens so far.

Inverting the cumulative distribution in two levels reads the logits once and a single slice twice. Sums inside a
slice are small numbers of similar size, so float32 keeps rare tokens apart.

Shapes: B rows, V vocabulary, C slices of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLICE = 2048


@triton.jit
def _mixed(x):
    """Mix x as `_mixed` of engine/sampling.py does."""
    x = x ^ (x >> 15)
    x = (x * 0x2C1B3C6D) & 0xFFFFFFFF
    x = x ^ (x >> 12)
    x = (x * 0x297A2D39) & 0xFFFFFFFF
    return x ^ (x >> 15)


@triton.jit
def _survey(logits_ptr, temperature_ptr, stats_ptr, best_ptr, vocabulary, state_row, SLICE: tl.constexpr):
    piece, row = tl.program_id(0), tl.program_id(1)
    place = piece * SLICE + tl.arange(0, SLICE)
    logits = tl.load(
        logits_ptr + row.to(tl.int64) * vocabulary + place, mask=place < vocabulary, other=-float("inf")
    )
    logits = logits / tl.load(temperature_ptr + row * state_row)
    top = tl.max(logits, 0)
    total = tl.sum(tl.where(logits == -float("inf"), 0.0, tl.exp(logits - top)), 0)
    at = row * tl.num_programs(0) + piece
    tl.store(stats_ptr + at * 2, top)
    tl.store(stats_ptr + at * 2 + 1, total)
    tl.store(best_ptr + at, piece * SLICE + tl.argmax(logits, 0))


@triton.jit
def _choose(
    logits_ptr, temperature_ptr, state_ptr, stats_ptr, best_ptr, ids_ptr, numbers_ptr, vocabulary, num_slices,
    state_row, numbers_row, DRAW: tl.constexpr, KEY: tl.constexpr, GREEDY: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    state_ptr += row * state_row
    temperature = tl.load(temperature_ptr + row * state_row)
    place_C = tl.arange(0, SLICES)
    at = row * num_slices + place_C
    tops = tl.load(stats_ptr + at * 2, mask=place_C < num_slices, other=-float("inf"))
    totals = tl.load(stats_ptr + at * 2 + 1, mask=place_C < num_slices, other=0.0)
    top = tl.max(tops, 0)
    masses = tl.where(totals > 0.0, totals * tl.exp(tops - top), 0.0)
    whole = tl.sum(masses, 0)
    key = tl.load(state_ptr + KEY).to(tl.int64) & 0xFFFFFFFF
    draw = tl.load(state_ptr + DRAW).to(tl.int64)
    uniform = (_mixed(_mixed(draw ^ 0x3C6EF372) ^ key).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    target = (uniform * whole).to(tl.float32)
    below = tl.cumsum(masses, 0)
    has_mass = masses > 0.0
    last = tl.max(tl.where(has_mass, place_C, 0), 0)
    piece = tl.minimum(tl.sum((below <= target).to(tl.int32), 0), last)
    before = tl.sum(tl.where(place_C < piece, masses, 0.0), 0)
    place = tl.arange(0, SLICE)
    token = piece * SLICE + place
    row_ptr = logits_ptr + row.to(tl.int64) * vocabulary
    logits = tl.load(row_ptr + token, mask=token < vocabulary, other=-float("inf")) / temperature
    chances = tl.where(logits == -float("inf"), 0.0, tl.exp(logits - top))
    reached = before + tl.cumsum(chances, 0)
    last = tl.max(tl.where(chances > 0.0, place, 0), 0)
    inside = tl.minimum(tl.sum((reached <= target).to(tl.int32), 0), last)
    chosen = piece * SLICE + inside
    if tl.load(state_ptr + GREEDY) != 0:
        leader = tl.argmax(tops, 0)
        chosen = tl.load(best_ptr + row * num_slices + leader)
    chosen = tl.minimum(tl.maximum(chosen, 0), vocabulary - 1)  # NaN logits must not give an id outside
    logprob = tl.load(row_ptr + chosen) / temperature - top - tl.log(whole)
    tl.store(ids_ptr + row, chosen.to(tl.int64))
    tl.store(numbers_ptr + row, chosen.to(tl.float64))
    tl.store(numbers_ptr + numbers_row + row, logprob.to(tl.float64))


def draw_tokens(
    logits_BV: Tensor, state: Tensor, ids_B: Tensor, numbers: Tensor, *, draw: int, key: int, temperature: int,
    greedy: int,
) -> None:  # fmt: skip
    """Draw a token for each row into `ids_B` (int64) and, with its log-probability, into `numbers` (float64 [2, B]).

    logits_BV: float32, contiguous. state: int32 [B, columns]; the numbers name its columns: how many draws came
    before, the row's random key, the temperature (float32 bits), whether to take the likeliest instead.
    """
    num_rows, vocabulary = logits_BV.shape
    slices = triton.cdiv(vocabulary, _SLICE)
    stats = torch.empty(num_rows, slices, 2, dtype=torch.float32, device=logits_BV.device)
    best = torch.empty(num_rows, slices, dtype=torch.int32, device=logits_BV.device)
    temperature_B = state[:, temperature].view(torch.float32)
    _survey[(slices, num_rows)](
        logits_BV, temperature_B, stats, best, vocabulary, state.stride(0), SLICE=_SLICE, num_warps=8
    )
    _choose[(num_rows,)](
        logits_BV, temperature_B, state, stats, best, ids_B, numbers, vocabulary, slices, state.stride(0),
        numbers.stride(0), DRAW=draw, KEY=key, GREEDY=greedy, SLICE=_SLICE, SLICES=triton.next_power_of_2(slices),
        num_warps=8,
    )  # fmt: skip
