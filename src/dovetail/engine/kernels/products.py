"""Products of a few rows with weights that are read once: y = x w' + b, for up to three weights in one kernel.

Responsible for: several products side by side without storing their weights side by side; a gated activation where two
products meet; sums left in parts for the kernel that adds them up anyway.
Not responsible for: adapters, single precision, many rows (kernels/fused_ops.py leaves those to cuBLAS).

The number of rows is small, so the time is that of reading the weights. A program computes BN outputs of one weight
over one of SPLIT slices of its inputs; its place in the grid selects the weight.

Shapes: B rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.engine.architecture import Linear
from dovetail.engine.kernels.overlap import fetch, let_next_start, overlapping, wait_for_previous
from dovetail.engine.kernels.rows import activation


@triton.jit
def _tile(pointer, row_stride, column_stride, rows, columns, width, EVEN: tl.constexpr):
    """Load a tile of a weight or of x; past its width it is 0 (`columns` may reach there unless EVEN)."""
    where = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    if EVEN:
        return tl.load(where)
    else:
        return tl.load(where, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _added(total, x, weight, row_stride, column_stride, outputs, columns, width, EVEN: tl.constexpr):
    """Add the product of x with some columns of some rows of a weight."""
    return tl.dot(x, tl.trans(_tile(weight, row_stride, column_stride, outputs, columns, width, EVEN)), total)


@triton.jit
def _stored(
    y_ptr, y_row, total, gated, bias, gated_bias, rows, num_rows, before, outputs, size,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Add the bias, activate, multiply by the second product of a gated layer, and write."""
    is_output = outputs < size
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gated += tl.load(gated_bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    total = activation(total, ACTIVATION)
    if GATED:
        total *= gated
    where = y_ptr + rows[:, None].to(tl.int64) * y_row + (before + outputs)[None, :]
    tl.store(where, total.to(y_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_rows"])  # batch sizes share what is compiled
def _multiply(
    x_ptr, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, y_ptr,
    num_rows, size_0, size_1, size_2, width, x_row, y_row, w_row, w_column,
    BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EVEN_SIZES: tl.constexpr, EVEN: tl.constexpr, FETCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    place, block = tl.program_id(0), tl.program_id(1)
    part, tile = place % SPLIT, place // SPLIT
    weight, bias, size, before = weight_0, bias_0, size_0, 0 * size_0
    if not GATED:
        tiles_0, tiles_1 = tl.cdiv(size_0, BN + TAIL), tl.cdiv(size_1, BN + TAIL)
        if tile >= tiles_0 + tiles_1:
            weight, bias, size, before = weight_2, bias_2, size_2, size_0 + size_1
            tile -= tiles_0 + tiles_1
        elif tile >= tiles_0:
            weight, bias, size, before = weight_1, bias_1, size_1, size_0
            tile -= tiles_0
    rows = block * BM + tl.arange(0, BM)
    real_rows = tl.minimum(rows, num_rows - 1)
    outputs = tile * (BN + TAIL) + tl.arange(0, BN)
    real_outputs = outputs if EVEN_SIZES else tl.minimum(outputs, size - 1)
    each = width // SPLIT
    start = part * each
    if SPLIT > 1:
        start = tl.multiple_of(start, 16)
    total = tl.zeros((BM, BN), tl.float32)
    gated = tl.zeros((BM, BN), tl.float32)
    if TAIL > 0:
        tail = tile * (BN + TAIL) + BN + tl.arange(0, TAIL)
        real_tail = tail if EVEN_SIZES else tl.minimum(tail, size - 1)
        tail_total = tl.zeros((BM, TAIL), tl.float32)
        tail_gated = tl.zeros((BM, TAIL), tl.float32)
    let_next_start(OVERLAPS)
    if FETCH > 0 and OVERLAPS:
        ahead = start + tl.arange(0, FETCH // 64) * 64
        fetch(weight + real_outputs[:, None].to(tl.int64) * w_row + ahead[None, :])
        if GATED:
            fetch(weight_1 + real_outputs[:, None].to(tl.int64) * w_row + ahead[None, :])
    wait_for_previous(OVERLAPS)
    for first in tl.range(start, start + each, BK, num_stages=STAGES):
        columns = first + tl.arange(0, BK)
        x = _tile(x_ptr, x_row, 1, real_rows, columns, width, EVEN)
        total = _added(total, x, weight, w_row, w_column, real_outputs, columns, width, EVEN)
        if GATED:
            gated = _added(gated, x, weight_1, w_row, w_column, real_outputs, columns, width, EVEN)
        if TAIL > 0:
            tail_total = _added(tail_total, x, weight, w_row, w_column, real_tail, columns, width, EVEN)
            if GATED:
                tail_gated = _added(tail_gated, x, weight_1, w_row, w_column, real_tail, columns, width, EVEN)
    y_ptr += part.to(tl.int64) * num_rows * y_row
    _stored(
        y_ptr, y_row, total, gated, bias, bias_1, rows, num_rows, before, outputs, size, HAS_BIAS, ACTIVATION, GATED
    )  # fmt: skip
    if TAIL > 0:
        _stored(
            y_ptr, y_row, tail_total, tail_gated, bias, bias_1, rows, num_rows, before, tail, size,
            HAS_BIAS, ACTIVATION, GATED,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tiles:
    """The sizes of a program's work."""

    rows: int
    outputs: int
    inputs: int
    split: int
    stages: int
    warps: int
    tail: int = 0
    """Further outputs of the same program, for widths that are no power of two."""


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
    owned = tiles.outputs + tiles.tail
    num_tiles = [triton.cdiv(size, owned) for size in (sizes[:1] if is_gated else sizes)]
    first = weights[0]
    fetched = _FETCHED if first.stride(1) == 1 and width >= _FETCHED * tiles.split else 0
    _multiply[(sum(num_tiles) * tiles.split, triton.cdiv(num_rows, tiles.rows))](
        x_BI, *_three(weights), *_three(biases or weights), y,
        num_rows, *sizes[:3], width, x_BI.stride(0), outputs, first.stride(0), first.stride(1),
        BM=tiles.rows, BN=tiles.outputs, TAIL=tiles.tail, BK=tiles.inputs, SPLIT=tiles.split, STAGES=tiles.stages,
        HAS_BIAS=bool(biases) and tiles.split == 1, ACTIVATION=activation, GATED=is_gated,
        EVEN_SIZES=all(size % owned == 0 for size in sizes), EVEN=width % (tiles.inputs * tiles.split) == 0,
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
    outputs = sum(linear.weight_OI.shape[0] for linear in linears)
    is_large = num_rows <= 64 and outputs * width > _MOST_WEIGHTS
    if num_rows > _MOST_ROWS or (len(linears) == 1 and (num_rows > 128 or is_large)):
        return None
    rows = min(128, max(16, triton.next_power_of_2(num_rows)))
    if is_gated and rows == 128:
        return _gated_tiles(outputs // 2)
    if num_rows > 128:
        return Tiles(rows, 128, 64, 1, 4, 8)
    if is_large and not is_gated:
        return Tiles(rows, 64, 64, 1, 6, 4)
    split = _split(outputs // 64, width // 128) if may_split and width % 512 == 0 else 1
    return Tiles(rows, 64, 128, split, 4, 4)


def _gated_tiles(outputs: int) -> Tiles:
    """Choose the width of a program such that the processors end together."""
    choices = {
        64: Tiles(128, 64, 64, 1, 4, 8),
        96: Tiles(128, 64, 64, 1, 5, 8, 32),
        128: Tiles(128, 128, 64, 1, 4, 8),
    }
    rounds = {owned: triton.cdiv(triton.cdiv(outputs, owned), _PROCESSORS) for owned in choices}
    return choices[min(choices, key=lambda owned: (rounds[owned] * owned, -owned))]


def _split(programs: int, steps: int) -> int:
    """Split sums until there is a program for every processor, and none too short."""
    split = 1
    while split < 4 and programs * split <= 96 and steps >= 4 * split:
        split *= 2
    return split


_PROCESSORS = 132
"""The number of an H100 or H200, which work in step where a kernel has one program for each."""
_MOST_ROWS = 256
"""More rows are many enough for cuBLAS."""
_MOST_WEIGHTS = 20_000_000
"""One product of few rows with more weights is faster in cuBLAS (52 MB and more on an H200; 34 MB and less is not)."""
