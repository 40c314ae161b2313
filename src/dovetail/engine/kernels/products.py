"""Products of a few rows with weights that are read once: y = x w' + b, for up to three weights in one kernel.

Responsible for: several products side by side without storing their weights side by side; a gated activation where two
products meet; sums left in parts for the kernel that adds them up anyway.
Not responsible for: adapters, single precision, many rows (kernels/fused_ops.py leaves those to cuBLAS).

The number of rows is small, so the time is that of reading the weights. A program owns BN + TAIL outputs of one weight,
over one of SPLIT slices of its inputs; its place in the grid selects the weight. In a gated layer it owns outputs of
both weights, in turns. Tensor cores take 64 rows of the left operand at once: x is that operand, or the weight where x
has fewer rows (SWAPPED).

Shapes: B rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.engine.architecture import Linear
from dovetail.engine.kernels.overlap import fetch, let_next_start, overlapping, wait_for_previous
from dovetail.engine.kernels.rows import activation


@triton.jit
def _tile(rows, columns, column_stride, width, EVEN: tl.constexpr):
    """Load some columns of the rows at these addresses; past their width they are 0 (`columns` ends there if EVEN)."""
    where = rows[:, None] + columns[None, :] * column_stride
    if EVEN:
        return tl.load(where)
    else:
        return tl.load(where, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _weight_rows(
    weight, other, first, size, stride, N: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr
):
    """Return the addresses of N rows of a weight from `first` on, or if GATED of rows of both weights in turns."""
    place = tl.arange(0, N)
    row = first + (place // 2 if GATED else place)
    if not EVEN:
        row = tl.minimum(row, size - 1)
    offset = row.to(tl.int64) * stride
    if GATED:
        return tl.where(place % 2 == 0, weight + offset, other + offset)
    else:
        return weight + offset


@triton.jit
def _added(total, x, rows, columns, column_stride, width, SWAPPED: tl.constexpr, EVEN: tl.constexpr):
    """Add the product of x with some columns of some rows of a weight; SWAPPED: of the weight with x."""
    weight = _tile(rows, columns, column_stride, width, EVEN)
    if SWAPPED:
        return tl.dot(weight, tl.trans(x), total)
    else:
        return tl.dot(x, tl.trans(weight), total)


@triton.jit
def _stored(
    y_ptr, y_row, total, bias, other_bias, rows, num_rows, before, first, size,
    BM: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """Add the bias, activate, multiply by the second product of a gated layer, and write."""
    if SWAPPED:
        total = tl.trans(total)
    if GATED:
        total, gated = tl.split(tl.reshape(total, (BM, N // 2, 2)))
        outputs = first + tl.arange(0, N // 2)
    else:
        outputs = first + tl.arange(0, N)
    is_output = outputs < size
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    total = activation(total, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            gated += tl.load(other_bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        total *= gated
    where = y_ptr + rows[:, None].to(tl.int64) * y_row + (before + outputs)[None, :]
    tl.store(where, total.to(y_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_rows"])  # batch sizes share what is compiled
def _multiply(
    x_ptr, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, y_ptr,
    num_rows, size_0, size_1, size_2, width, x_row, y_row, w_row, w_column,
    BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    SWAPPED: tl.constexpr, EVEN_SIZES: tl.constexpr, EVEN: tl.constexpr, FETCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    place, block = tl.program_id(0), tl.program_id(1)
    part, tile = place % SPLIT, place // SPLIT
    weight, bias, size, before = weight_0, bias_0, size_0, 0 * size_0
    PAIR: tl.constexpr = 2 if GATED else 1
    OWNED: tl.constexpr = (BN + TAIL) // PAIR
    if not GATED:
        tiles_0, tiles_1 = tl.cdiv(size_0, OWNED), tl.cdiv(size_1, OWNED)
        if tile >= tiles_0 + tiles_1:
            weight, bias, size, before = weight_2, bias_2, size_2, size_0 + size_1
            tile -= tiles_0 + tiles_1
        elif tile >= tiles_0:
            weight, bias, size, before = weight_1, bias_1, size_1, size_0
            tile -= tiles_0
    rows = block * BM + tl.arange(0, BM)
    x_rows = x_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64) * x_row
    first, tail_first = tile * OWNED, tile * OWNED + BN // PAIR
    w_rows = _weight_rows(weight, weight_1, first, size, w_row, BN, GATED, EVEN_SIZES)
    each = tl.cdiv(width, BK * SPLIT) * BK
    start = part * each
    end = tl.minimum(start + each, width)
    total = tl.zeros((BN, BM) if SWAPPED else (BM, BN), tl.float32)
    if TAIL > 0:
        tail_rows = _weight_rows(weight, weight_1, tail_first, size, w_row, TAIL, GATED, EVEN_SIZES)
        tail_total = tl.zeros((TAIL, BM) if SWAPPED else (BM, TAIL), tl.float32)
    let_next_start(OVERLAPS)
    if FETCH > 0 and OVERLAPS:
        ahead = start + tl.arange(0, FETCH // 64) * 64
        fetch(w_rows[:, None] + ahead[None, :])
        if TAIL > 0:
            fetch(tail_rows[:, None] + ahead[None, :])
    wait_for_previous(OVERLAPS)
    for column in tl.range(start, end, BK, num_stages=STAGES):
        columns = column + tl.arange(0, BK)
        x = _tile(x_rows, columns, 1, width, EVEN)
        total = _added(total, x, w_rows, columns, w_column, width, SWAPPED, EVEN)
        if TAIL > 0:
            tail_total = _added(tail_total, x, tail_rows, columns, w_column, width, SWAPPED, EVEN)
    y_ptr += part.to(tl.int64) * num_rows * y_row
    _stored(
        y_ptr, y_row, total, bias, bias_1, rows, num_rows, before, first, size, BM, BN, HAS_BIAS, ACTIVATION, GATED,
        SWAPPED,
    )  # fmt: skip
    if TAIL > 0:
        _stored(
            y_ptr, y_row, tail_total, bias, bias_1, rows, num_rows, before, tail_first, size, BM, TAIL, HAS_BIAS,
            ACTIVATION, GATED, SWAPPED,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tiles:
    """The sizes of a program's work."""

    rows: int
    outputs: int
    """The outputs in one tile; of a gated layer half of them are the gate's."""
    inputs: int
    split: int
    stages: int
    warps: int
    tail: int = 0
    """Further outputs of the same program, for widths that are no power of two."""
    is_swapped: bool = False
    """The weight is the left operand."""


def multiply(
    x_BI: Tensor, linears: Sequence[Linear], tiles: Tiles, *, activation: str = "", is_gated: bool = False
) -> Tensor:
    """Compute the products side by side, [B, sum of O]; or their gated activation, [B, O].

    With `tiles.split` > 1: the parts of the sum without bias, float32 [split, B, O].
    """
    num_rows, width = x_BI.shape
    sizes = [linear.weight_OI.shape[0] for linear in linears] + [0, 0]
    weights = [linear.weight_OI for linear in linears]
    biases = [linear.bias_O for linear in linears if linear.bias_O is not None]
    outputs = sizes[0] if is_gated else sum(sizes)
    if tiles.split == 1:
        y = torch.empty(num_rows, outputs, dtype=x_BI.dtype, device=x_BI.device)
    else:
        y = torch.empty(tiles.split, num_rows, outputs, dtype=torch.float32, device=x_BI.device)
    owned = (tiles.outputs + tiles.tail) // (2 if is_gated else 1)
    num_tiles = [triton.cdiv(size, owned) for size in (sizes[:1] if is_gated else sizes)]
    first = weights[0]
    fetched = _FETCHED if first.stride(1) == 1 and width >= _FETCHED * tiles.split else 0
    _multiply[(sum(num_tiles) * tiles.split, triton.cdiv(num_rows, tiles.rows))](
        x_BI, *_three(weights), *_three(biases or weights), y,
        num_rows, *sizes[:3], width, x_BI.stride(0), outputs, first.stride(0), first.stride(1),
        BM=tiles.rows, BN=tiles.outputs, TAIL=tiles.tail, BK=tiles.inputs, SPLIT=tiles.split, STAGES=tiles.stages,
        HAS_BIAS=bool(biases) and tiles.split == 1, ACTIVATION=activation, GATED=is_gated,
        SWAPPED=tiles.is_swapped, EVEN_SIZES=all(size % owned == 0 for size in sizes), EVEN=width % tiles.inputs == 0,
        FETCH=fetched, num_warps=tiles.warps, num_stages=tiles.stages, **overlapping(x_BI.device),
    )  # fmt: skip
    return y


_FETCHED = 256
"""Inputs of each output whose weights are fetched while the kernel before ends."""


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[min(index, len(tensors) - 1)] for index in range(3)]


def tiles_for(
    x_BI: Tensor, linears: Sequence[Linear], *, is_gated: bool = False, may_split: bool = False
) -> Tiles | None:
    """Choose the tiles of these products, or None where cuBLAS is faster or the kernel cannot serve.

    is_gated: the two products meet in one program. may_split: the sum may be left in parts.
    """
    num_rows, width = x_BI.shape
    has_bias = {linear.bias_O is not None for linear in linears}
    strides = {linear.weight_OI.stride() for linear in linears}
    if x_BI.dtype == torch.float32 or len(has_bias) > 1 or len(strides) > 1:
        return None
    sizes = [linear.weight_OI.shape[0] for linear in linears]
    if num_rows <= 128:
        rows = max(16, triton.next_power_of_2(num_rows))
        return _balanced(rows, [2 * sizes[0]] if is_gated else sizes, width, may_split=may_split)
    programs = 2 * sum(triton.cdiv(size, 128) for size in sizes)
    is_faster = num_rows <= 256 and len(linears) == 3 and programs <= _PROCESSORS
    return Tiles(128, 128, 64, 1, 5, 8) if is_faster else None


def _balanced(rows: int, sizes: Sequence[int], width: int, *, may_split: bool) -> Tiles:
    """Choose the outputs and inputs of a program such that the processors end together."""
    splits = [split for split in (1, 2, 3, 4) if split == 1 or (may_split and width >= 256 * split)]
    owned, split = min(product(_OWNED[rows], splits), key=lambda choice: _cost(sizes, *choice))
    tail = owned - (1 << (owned.bit_length() - 1))
    memory = _SHARED_MEMORY // min(2, _rounds(sizes, owned, split))
    inputs = 128 if rows <= 64 and width >= 512 * split and 3 * 256 * (rows + owned) <= memory else 64
    return Tiles(
        rows=rows,
        outputs=owned - tail,
        tail=tail,
        inputs=inputs,
        split=split,
        stages=min(6 if inputs == 128 else 8, memory // (2 * inputs * (rows + owned))),
        warps=8 if rows == 128 and owned > 64 else 4,
        is_swapped=rows < 64 or (rows == 128 and owned == 64),
    )


def _cost(sizes: Sequence[int], owned: int, split: int) -> tuple[float, ...]:
    """Return what orders the choices: the share of the weights that the busiest processor reads, then their kind.

    Two programs fit beside each other. Narrow ones read x more often, and each part of a sum is written and read once.
    """
    rounds = _rounds(sizes, owned, split)
    return rounds > 2, rounds * owned / split, owned < 64, rounds, split


def _rounds(sizes: Sequence[int], owned: int, split: int) -> int:
    """Return the number of programs that the busiest processor computes."""
    return triton.cdiv(sum(triton.cdiv(size, owned) for size in sizes) * split, _PROCESSORS)


_OWNED = {
    16: (64, 128, 192, 256),
    32: (64, 128, 192, 256),
    64: (32, 48, 64, 80, 96, 128, 160, 192, 256),
    128: (64, 80, 96, 128, 160, 192, 256),
}
"""The numbers of outputs that a program may own, by its rows; each is the sum of at most two powers of two."""
_SHARED_MEMORY = 224 * 1024
"""The bytes of a processor's shared memory that tiles may fill, on an H100 or H200."""
_PROCESSORS = 132
"""The number of an H100 or H200, which work in step where a kernel has one program for each."""
