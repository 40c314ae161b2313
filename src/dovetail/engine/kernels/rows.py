"""Kernels over rows of hidden numbers: embedding, the join of branches and residual stream with its norms, activations.

Responsible for: what `embed`, `join` and the activation of `activated` in engine/fused_ops.py compute, a program a row.
Not responsible for: products (products.py).

Shapes: B rows, D width, O inner width of a feed-forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.engine.kernels.overlap import let_next_start, wait_for_previous


@triton.jit
def embed_rows(
    ids_ptr, positions_ptr, tokens_ptr, learned_ptr, out_ptr, width, offset, scale,
    HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    place = tl.arange(0, BLOCK)
    is_real = place < width
    token = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(tokens_ptr + token * width + place, mask=is_real, other=0.0).to(tl.float32) * scale
    x = x.to(out_ptr.dtype.element_ty)
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + row).to(tl.int64) + offset
        x = x.to(tl.float32) + tl.load(learned_ptr + position * width + place, mask=is_real, other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + row * width + place, x.to(out_ptr.dtype.element_ty), mask=is_real)


@triton.jit
def _normed(x, is_real, weight, bias, width, eps, OFFSET: tl.constexpr, IS_CENTRED: tl.constexpr):
    if IS_CENTRED:
        x = tl.where(is_real, x - tl.sum(x, 0) / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    return x * (weight + OFFSET) + bias


@triton.jit
def _loaded(pointer, place, is_real, IS_THERE: tl.constexpr, BLOCK: tl.constexpr):
    """Load float32 numbers, or zeros where there is no such tensor."""
    if IS_THERE:
        return tl.load(pointer + place, mask=is_real, other=0.0).to(tl.float32)
    else:
        return tl.zeros((BLOCK,), tl.float32)


@triton.jit
def _summed(parts_ptr, bias, row, rows, place, is_real, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (part * rows + row) * width + place, mask=is_real, other=0.0).to(
            tl.float32
        )
    return total + bias


@triton.jit(do_not_specialize=["rows"])  # batch sizes share what is compiled
def join_rows(
    stream_ptr, one_ptr, one_bias_ptr, two_ptr, two_bias_ptr, branch_weight_ptr, branch_bias_ptr,
    first_weight_ptr, first_bias_ptr, second_weight_ptr, second_bias_ptr, sum_ptr, first_ptr, second_ptr,
    rows, width, eps, multiplier,
    ONE: tl.constexpr, ONE_BIAS: tl.constexpr, TWO: tl.constexpr, TWO_BIAS: tl.constexpr, BRANCH_NORM: tl.constexpr,
    BRANCH_BIAS: tl.constexpr, NORMS: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS_SUM: tl.constexpr,
    OFFSET: tl.constexpr, IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Add the branches to the stream; ONE and TWO are their numbers of parts, 0 where there is no such branch."""
    row = tl.program_id(0)
    let_next_start(OVERLAPS)
    place = tl.arange(0, BLOCK)
    is_real = place < width
    one_bias = _loaded(one_bias_ptr, place, is_real, ONE_BIAS, BLOCK)
    two_bias = _loaded(two_bias_ptr, place, is_real, TWO_BIAS, BLOCK)
    branch_weight = _loaded(branch_weight_ptr, place, is_real, BRANCH_NORM, BLOCK)
    branch_bias = _loaded(branch_bias_ptr, place, is_real, BRANCH_BIAS, BLOCK)
    first_weight = _loaded(first_weight_ptr, place, is_real, NORMS >= 1, BLOCK)
    first_bias = _loaded(first_bias_ptr, place, is_real, HAS_BIAS, BLOCK)
    wait_for_previous(OVERLAPS)
    x = tl.load(stream_ptr + row * width + place, mask=is_real, other=0.0).to(tl.float32)
    if ONE > 0:
        y = _summed(one_ptr, one_bias, row, rows, place, is_real, width, ONE, BLOCK)
        if BRANCH_NORM:
            y = _normed(y, is_real, branch_weight, branch_bias, width, eps, OFFSET, IS_CENTRED)
        x += multiplier * y
    if TWO > 0:
        x += multiplier * _summed(two_ptr, two_bias, row, rows, place, is_real, width, TWO, BLOCK)
    rounded = x.to(sum_ptr.dtype.element_ty)
    if KEEPS_SUM:
        tl.store(sum_ptr + row * width + place, rounded, mask=is_real)
    if NORMS >= 1:
        x = rounded.to(tl.float32)
        y = _normed(x, is_real, first_weight, first_bias, width, eps, OFFSET, IS_CENTRED)
        tl.store(first_ptr + row * width + place, y.to(first_ptr.dtype.element_ty), mask=is_real)
        if NORMS == 2:
            weight = _loaded(second_weight_ptr, place, is_real, True, BLOCK)
            bias = _loaded(second_bias_ptr, place, is_real, HAS_BIAS, BLOCK)
            y = _normed(x, is_real, weight, bias, width, eps, OFFSET, IS_CENTRED)
            tl.store(second_ptr + row * width + place, y.to(second_ptr.dtype.element_ty), mask=is_real)


@triton.jit
def activation(x, NAME: tl.constexpr):
    """Apply the activation of this name to float32 numbers."""
    if NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 1 + tanh(z) = 2 sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def activate_rows(
    x_ptr, out_ptr, width, NAME: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    """Activate rows of `width` numbers; gated rows hold the gate's and then as many to multiply by it."""
    row, block = tl.program_id(0), tl.program_id(1)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    place = block * BLOCK + tl.arange(0, BLOCK)
    is_real = place < width
    x_ptr += row * width * (2 if IS_GATED else 1)
    x = activation(tl.load(x_ptr + place, mask=is_real, other=0.0).to(tl.float32), NAME)
    if IS_GATED:
        x *= tl.load(x_ptr + width + place, mask=is_real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + place, x.to(out_ptr.dtype.element_ty), mask=is_real)
