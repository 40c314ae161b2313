"""Products of a few rows with weights that are read once: y = x w' + b, for up to three weights in one kernel.

Responsible for: several products side by side without storing their weights side by side; a gated activation where two
products meet; sums left in parts for the kernel that adds them up anyway.
Not responsible for: adapters, single precision, many rows (kernels/fused_ops.py leaves those to cuBLAS).

The number of rows is small, so the time is that of reading the weights. A program owns BN outputs of one weight and one
of SPLIT slices of its inputs; which weight, its place in the grid says.

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
def _tile(pointer, row_stride, column_stride, rows, columns, limit, width, EVEN: tl.constexpr):
    """Load a tile of a weight or of x; past its width it is 0 (`columns` may reach there unless EVEN)."""
    where = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    if EVEN:
        return tl.load(where)
    else:
        return tl.load(where, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _multiply(
    x_ptr, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, y_ptr,
    num_rows, size_0, size_1, size_2, width, x_row, y_row, weight_row, weight_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_ROWS: tl.constexpr,
    EVEN_SIZES: tl.constexpr, EVEN_WIDTH: tl.constexpr, FETCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    place, block = tl.program_id(0), tl.program_id(1)
    part, tile = place % SPLIT, place // SPLIT
    weight, bias, size, before = weight_0, bias_0, size_0, 0 * size_0
    if not GATED:
        tiles_0, tiles_1 = tl.cdiv(size_0, BN), tl.cdiv(size_1, BN)
        if tile >= tiles_0 + tiles_1:
            weight, bias, size, before = weight_2, bias_2, size_2, size_0 + size_1
            tile -= tiles_0 + tiles_1
        elif tile >= tiles_0:
            weight, bias, size, before = weight_1, bias_1, size_1, size_0
            tile -= tiles_0
    rows = block * BM + tl.arange(0, BM)
    outputs = tile * BN + tl.arange(0, BN)
    real_rows = rows if EVEN_ROWS else tl.minimum(rows, num_rows - 1)
    real_outputs = outputs if EVEN_SIZES else tl.minimum(outputs, size - 1)
    each = width // SPLIT
    start = part * each
    if SPLIT > 1:
        start = tl.multiple_of(start, 16)
    let_next_start(OVERLAPS)
    if FETCH > 0 and OVERLAPS:
        ahead = start + tl.arange(0, FETCH // 64) * 64
        fetch(weight + real_outputs[:, None].to(tl.int64) * weight_row + ahead[None, :])
        if GATED:
            fetch(weight_1 + real_outputs[:, None].to(tl.int64) * weight_row + ahead[None, :])
    wait_for_previous(OVERLAPS)
    total = tl.zeros((BM, BN), tl.float32)
    gated = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(start, start + each, BK, num_stages=STAGES):
        columns = first + tl.arange(0, BK)
        x = _tile(x_ptr, x_row, 1, real_rows, columns, num_rows, width, EVEN_WIDTH)
        w = _tile(weight, weight_row, weight_column, real_outputs, columns, size, width, EVEN_WIDTH)
        total = tl.dot(x, tl.trans(w), total)
        if GATED:
            w = _tile(weight_1, weight_row, weight_column, real_outputs, columns, size, width, EVEN_WIDTH)
            gated = tl.dot(x, tl.trans(w), gated)
    if HAS_BIAS:
        total += tl.load(bias + real_outputs).to(tl.float32)[None, :]
        if GATED:
            gated += tl.load(bias_1 + real_outputs).to(tl.float32)[None, :]
    total = activation(total, ACTIVATION)
    if GATED:
        total *= gated
    y_ptr += part.to(tl.int64) * num_rows * y_row
    where = y_ptr + rows[:, None].to(tl.int64) * y_row + (before + outputs)[None, :]
    is_real = (rows < num_rows)[:, None] & (outputs < size)[None, :]
    tl.store(where, total.to(y_ptr.dtype.element_ty), mask=is_real)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The shape of a program's work."""

    rows: int
    outputs: int
    inputs: int
    split: int
    stages: int
    warps: int


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
    num_tiles = [triton.cdiv(size, tiles.outputs) for size in (sizes[:1] if is_gated else sizes)]
    first = weights[0]
    fetched = _FETCHED if first.stride(1) == 1 and width >= _FETCHED * tiles.split else 0
    _multiply[(sum(num_tiles) * tiles.split, triton.cdiv(num_rows, tiles.rows))](
        x_BI, *_three(weights), *_three(biases or weights), y,
        num_rows, *sizes[:3], width, x_BI.stride(0), outputs, first.stride(0), first.stride(1),
        BM=tiles.rows, BN=tiles.outputs, BK=tiles.inputs, SPLIT=tiles.split, STAGES=tiles.stages,
        HAS_BIAS=bool(biases) and tiles.split == 1, ACTIVATION=activation, GATED=is_gated,
        EVEN_ROWS=num_rows % tiles.rows == 0, EVEN_SIZES=all(size % tiles.outputs == 0 for size in sizes),
        EVEN_WIDTH=width % (tiles.inputs * tiles.split) == 0, FETCH=fetched,
        num_warps=tiles.warps, num_stages=tiles.stages, **overlapping(x_BI.device),
    )  # fmt: skip
    return y


_FETCHED = 512
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
    if num_rows > _MOST_ROWS or (num_rows > 128 and len(linears) == 1 and not may_split):
        return None
    rows = min(128, max(16, triton.next_power_of_2(num_rows)))
    if is_gated and rows == 128:
        return Tiles(rows, 64, 64, 1, 3, 4)
    if num_rows > 128 and not may_split:
        return Tiles(rows, 128, 64, 1, 4, 8)
    stages, warps = (4, 8) if rows == 128 else (4 if is_gated else 6, 4)
    outputs = sum(linear.weight_OI.shape[0] for linear in linears)
    split = _split(outputs // 64, width // 128) if may_split and width % 512 == 0 else 1
    return Tiles(rows, 64, 128, split, stages, warps)


def _split(programs: int, steps: int) -> int:
    """Split sums until there is a program for every processor, and none too short."""
    split = 1
    while split < 4 and programs * split <= 96 and steps >= 4 * split:
        split *= 2
    return split


_MOST_ROWS = 256
"""More rows are many enough for cuBLAS."""
