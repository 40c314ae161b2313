"""Attention of one new token a sequence over its pages, which also stores its keys and values.

Responsible for: what `engine/forward.py`'s DecodeLayout computes, as one kernel a layer (two where a few long
sequences must be split over the processors). Any head grouping, sliding windows, soft caps.
Not responsible for: which pages a sequence has.

One program serves one sequence and one head of keys: it takes the new key and value from registers and reads
every old one once. Lengths are read on the device, so one captured graph serves all of them. The product of some
keys with the queries of their group runs on the tensor cores, queries padded to 16 rows, softmax in float32.

Shapes: B rows, H query heads, G query heads per key head, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.engine.kernels.overlap import let_next_start, overlapping, wait_for_previous
from dovetail.engine.kv_cache import PAGE_TOKENS

_LOG2_E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1.0e30)
"""A number below every score, and finite: the difference of two of them is 0 and not NaN."""
_FEW_PROGRAMS = 256
"""The number of programs below which processors are idle (an H100 has 132, two programs each)."""
_MAX_SPLITS = 8


@triton.jit
def _capped(scores, softcap, HAS_CAP: tl.constexpr):
    """Return softcap * tanh(scores / softcap), in base-2 units."""
    if HAS_CAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * _LOG2_E


@triton.jit
def _based(base_ptr, like_ptr):
    """Load the address stored there, as a pointer to the type that `like_ptr` points to."""
    return tl.multiple_of(tl.load(base_ptr).to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)


@triton.jit
def _loaded(head_ptr, place_K, is_real, HALF: tl.constexpr):
    """Load heads, and the numbers that theirs are turned with if HALF > 0."""
    x = tl.load(head_ptr + place_K[None, :], mask=is_real, other=0.0)
    partner = x
    if HALF > 0:
        pair = tl.where(place_K < HALF, place_K + HALF, place_K - HALF)
        partner = tl.load(head_ptr + pair[None, :], mask=is_real & (place_K < 2 * HALF)[None, :], other=0.0)
    return x, partner


@triton.jit
def _turned(
    x, partner, place_K, weight_ptr, cosine_ptr, sine_ptr, eps,
    K: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Norm each head, and turn the first 2 x HALF numbers by the angles of the row; either may be absent."""
    if HAS_NORM or HALF > 0:
        wide = x.to(tl.float32)
        if HAS_NORM:
            inverse = tl.rsqrt(tl.sum(wide * wide, 1) / K + eps)[:, None]
            weight = tl.load(weight_ptr + place_K, mask=place_K < K, other=0.0).to(tl.float32) + OFFSET
            wide = wide * inverse * weight[None, :]
        if HALF > 0:
            is_first, is_turned = place_K < HALF, place_K < 2 * HALF
            other = partner.to(tl.float32)
            if HAS_NORM:
                pair = tl.where(is_first, place_K + HALF, place_K - HALF)
                weight = tl.load(weight_ptr + pair, mask=is_turned, other=0.0).to(tl.float32) + OFFSET
                other = other * inverse * weight[None, :]
            angle = tl.where(is_first, place_K, place_K - HALF)
            cosine = tl.load(cosine_ptr + angle, mask=is_turned, other=1.0).to(tl.float32)
            sine = tl.load(sine_ptr + angle, mask=is_turned, other=0.0).to(tl.float32)
            wide = wide * cosine[None, :] + other * tl.where(is_first, -sine, sine)[None, :]
        x = wide.to(x.dtype)
    return x


@triton.jit
def _span(count, split, window, PAGE: tl.constexpr, SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Return the first old token that is seen, and where this split begins (a page's first token) and ends."""
    start = tl.maximum(0, count + 1 - window) if HAS_WINDOW else 0 * count
    first = start // PAGE
    num_pages = tl.maximum(tl.cdiv(count, PAGE) - first, 0)
    each = tl.cdiv(num_pages, SPLITS)
    return start, (first + split * each) * PAGE, tl.minimum((first + (split + 1) * each) * PAGE, count)


@triton.jit
def _mixed_in(
    top, total, mixed, query, keys, values, is_seen, scale, softcap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Take a page into the softmax (arXiv:1805.02867): largest score so far, sum of weights, weighted values."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(is_seen[None, :], _capped(scores, softcap, HAS_CAP), _NOTHING)
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.where(is_seen[None, :], tl.exp2(scores - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return higher, total, mixed


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, bases_ptr, state_ptr, out_ptr, partial_ptr, totals_ptr,
    query_weight_ptr, key_weight_ptr, cosine_ptr, sine_ptr,
    query_head, query_row, key_head, key_row, value_head, value_row, page_stride, state_row, scale, softcap,
    window, eps,
    TABLE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PAGE: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr, OFFSET: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    let_next_start(OVERLAPS)
    place_G, place_K, place_N = tl.arange(0, GP), tl.arange(0, KP), tl.arange(0, STEP)
    is_query, is_width = place_G < G, place_K < K
    is_real = is_query[:, None] & is_width[None, :]
    query_heads = head * G + place_G
    keys_ptr, values_ptr = _based(bases_ptr, key_ptr), _based(bases_ptr + 1, value_ptr)
    count = tl.load(state_ptr + row * state_row)  # old tokens of this row; -1: nothing to do
    table_ptr = state_ptr + row * state_row + TABLE
    start, begin, end = _span(count, split, window, PAGE, SPLITS, HAS_WINDOW)
    following = tl.load(table_ptr + begin // PAGE, mask=begin < end, other=0)
    in_page = head * PAGE * K + place_N[:, None] * K + place_K[None, :]
    is_new = (split == 0) & (count >= 0)
    new_page = tl.load(table_ptr + count // PAGE, mask=is_new, other=0).to(tl.int64)
    wait_for_previous(OVERLAPS)
    cosine_ptr, sine_ptr = cosine_ptr + row * HALF, sine_ptr + row * HALF
    heads_ptr = query_ptr + row * query_row + query_heads[:, None] * query_head
    query, query_pair = _loaded(heads_ptr, place_K, is_real, HALF)
    is_new_width = is_width & is_new
    new_key, key_pair = _loaded(
        key_ptr + row * key_row + head * key_head, place_K, is_new_width[None, :], HALF
    )
    new_value = tl.load(
        value_ptr + row * value_row + head * value_head + place_K, mask=is_new_width, other=0.0
    )
    query = _turned(
        query, query_pair, place_K, query_weight_ptr, cosine_ptr, sine_ptr, eps, K, HALF, HAS_NORM, OFFSET
    )  # fmt: skip
    top = tl.full((GP,), _NOTHING, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    mixed = tl.zeros((GP, KP), tl.float32)
    for token in tl.range(begin, end, STEP, num_stages=STAGES):
        # The next page's number is loaded early: keys whose address waits for a load of this round would come late.
        page = following.to(tl.int64)
        following = tl.load(table_ptr + (token + STEP) // PAGE, mask=token + STEP < end, other=0)
        is_seen = (token + place_N < count) & (token + place_N >= start)
        where = page * page_stride + token % PAGE * K + in_page
        keys = tl.load(keys_ptr + where, mask=is_seen[:, None] & is_width[None, :], other=0.0)
        values = tl.load(values_ptr + where, mask=is_seen[:, None] & is_width[None, :], other=0.0)
        top, total, mixed = _mixed_in(
            top, total, mixed, query, keys, values, is_seen, scale, softcap, HAS_CAP, PRECISION
        )  # fmt: skip
    if is_new:  # last: the first old keys need not wait for it
        new_key = _turned(
            new_key, key_pair, place_K, key_weight_ptr, cosine_ptr, sine_ptr, eps, K, HALF, HAS_NORM, OFFSET
        )  # fmt: skip
        target = new_page * page_stride + (head * PAGE + count % PAGE) * K + place_K
        tl.store(keys_ptr + target[None, :], new_key, mask=is_width[None, :])
        tl.store(values_ptr + target, new_value, mask=is_width)
        score = _capped(tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1) * scale, softcap, HAS_CAP)
        higher = tl.maximum(top, score)
        shrink, weight = tl.exp2(top - higher), tl.exp2(score - higher)
        top, total = higher, total * shrink + weight
        mixed = mixed * shrink[:, None] + weight[:, None] * new_value.to(tl.float32)[None, :]
    _written(
        mixed, top, total, out_ptr, partial_ptr, totals_ptr, row * tl.num_programs(0) * G + query_heads, split,
        is_query, is_real, place_K, K, KP, SPLITS,
    )  # fmt: skip


@triton.jit
def _written(
    mixed, top, total, out_ptr, partial_ptr, totals_ptr, rows, split, is_query, is_real, place_K,
    K: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Store the output, or this split's part of it with its softmax statistics."""
    if SPLITS == 1:
        mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(
            out_ptr + rows[:, None] * K + place_K[None, :], mixed.to(out_ptr.dtype.element_ty), mask=is_real
        )
    else:
        part = rows * SPLITS + split
        tl.store(partial_ptr + part[:, None] * KP + place_K[None, :], mixed, mask=is_query[:, None])
        tl.store(totals_ptr + part * 2, top, mask=is_query)
        tl.store(totals_ptr + part * 2 + 1, total, mask=is_query)


@triton.jit
def _combine(
    partial_ptr, totals_ptr, out_ptr, K: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    place_S, place_K = tl.arange(0, SPLITS), tl.arange(0, KP)
    part = head * SPLITS + place_S
    top = tl.load(totals_ptr + part * 2)
    total = tl.load(totals_ptr + part * 2 + 1)
    weights = tl.exp2(top - tl.max(top, 0))
    mixed = tl.load(partial_ptr + part[:, None] * KP + place_K[None, :])
    whole = tl.sum(weights * total, 0)
    out = tl.sum(mixed * weights[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out_ptr + head * K + place_K, out.to(out_ptr.dtype.element_ty), mask=place_K < K)


@dataclass(frozen=True, slots=True)
class Turn:
    """The change of queries and keys before they meet: a norm of each head, then rotary positions."""

    query_weight_K: Tensor | None = None
    """The weights of the RMSNorms, where there are any."""
    key_weight_K: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0
    cosine: Tensor | None = None
    """The cosines of the angles, [B, half of the turned width], contiguous; `sine` likewise."""
    sine: Tensor | None = None


AS_THEY_ARE = Turn()


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bases: Tensor,
    state: Tensor,
    *,
    table: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    turn: Turn = AS_THEY_ARE,
) -> Tensor:
    """Store the new key and value of each row in its pages, attend with its query; returns [1, B, H, K].

    query [1, H, B, K], key and value [1, H / G, B, K], last dimension contiguous. bases: int64 [2] on the device,
    the addresses of a layer's keys and values: pages [H / G, 64, K], contiguous, in the precision of `key`; the kernel
    reads them, so a captured graph serves any arena. state: int32 [B, columns]; column 0 is the number of old tokens
    of the row (-1: an empty row, whose output is 0), columns `table` and on its pages in order. turn: the change of
    queries and keys before anything else.
    """
    num_heads, num_rows, width = query.shape[1:]
    num_key_heads = key.shape[1]
    group = num_heads // num_key_heads
    padded = max(16, triton.next_power_of_2(width))
    splits = _splits(num_rows * num_key_heads, (state.shape[1] - table) * PAGE_TOKENS)
    out = torch.empty(1, num_rows, num_heads, width, dtype=query.dtype, device=query.device)
    parts = num_rows * num_heads * splits if splits > 1 else 0
    partial = torch.empty(parts, padded, dtype=torch.float32, device=query.device)
    totals = torch.empty(parts, 2, dtype=torch.float32, device=query.device)
    options = overlapping(query.device)
    step, stages, warps = _pipeline(num_rows * num_key_heads * splits, padded * key.element_size())
    has_norm, half = turn.query_weight_K is not None, 0 if turn.cosine is None else turn.cosine.shape[1]
    _attend[(num_key_heads, num_rows, splits)](
        query, key, value, bases, state, out, partial, totals,
        *(query if x is None else x for x in (turn.query_weight_K, turn.key_weight_K, turn.cosine, turn.sine)),
        query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2),
        num_key_heads * PAGE_TOKENS * width, state.stride(0), scale, softcap or 0.0, window or 0,
        turn.eps,
        TABLE=table, G=group, GP=max(16, triton.next_power_of_2(group)), K=width, KP=padded, PAGE=PAGE_TOKENS,
        STEP=step, SPLITS=splits, HAS_CAP=softcap is not None, HAS_WINDOW=window is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", STAGES=stages,
        HALF=half, HAS_NORM=has_norm, OFFSET=turn.offset,
        num_warps=warps, **options,
    )  # fmt: skip
    if splits > 1:
        _combine[(num_rows * num_heads,)](
            partial, totals, out, K=width, KP=padded, SPLITS=splits, num_warps=1, **options
        )
    return out


def _splits(programs: int, longest: int) -> int:
    """Return the number of splits, a power of two: one where the rows fill the processors, or sequences are short."""
    splits = 1
    while splits < _MAX_SPLITS and programs * splits < _FEW_PROGRAMS and longest > 256 * splits:
        splits *= 2
    return splits


def _pipeline(programs: int, token_bytes: int) -> tuple[int, int, int]:
    """Return the tokens of a step, the stages of loads that overlap, and the warps of a program (measured on an H200).

    token_bytes: the size of one head's key. Many programs are small, so that nearly all run at once and none is left
    to run alone at the end; a few must each read more at a time.
    """
    if token_bytes <= 128:
        return 32, 4, 1
    if token_bytes <= 256:
        return (16, 3, 1) if programs > _FEW_PROGRAMS else (32, 4, 2)
    return (32, 3, 4) if token_bytes <= 512 else (16, 3, 2)
