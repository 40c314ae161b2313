"""The operations of the fused decode step on a GPU: the functions of engine/fused_ops.py as few kernels.

Responsible for: which kernel computes what, and whether a product is Triton's or cuBLAS's.
Not responsible for: what they compute, which engine/fused_ops.py defines.

Shapes: B rows, D width, O and I output and input width of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dovetail.engine.architecture import Architecture, Attention, FeedForward, Join, Linear, Norm, NormKind
from dovetail.engine.fused_ops import Angles, Branch, split_heads
from dovetail.engine.kernels.overlap import overlapping
from dovetail.engine.kernels.paged_attention import Turn
from dovetail.engine.kernels.products import multiply, tiles_for
from dovetail.engine.kernels.rows import activate_rows, embed_rows, join_rows


def embed(ids_B: Tensor, positions_B: Tensor, architecture: Architecture) -> Tensor:
    """Look up tokens and learned positions: [B, D]."""
    tokens_VD, learned = architecture.embedding_VD, architecture.positions_PD
    if architecture.project_in is not None:
        x_BD = product(tokens_VD[ids_B] * architecture.embedding_scale, architecture.project_in)
        return x_BD if learned is None else x_BD + learned[positions_B + architecture.position_offset]
    num_rows, width = len(ids_B), tokens_VD.shape[1]
    x_BD = torch.empty(num_rows, width, dtype=tokens_VD.dtype, device=ids_B.device)
    embed_rows[(num_rows,)](
        ids_B, positions_B, tokens_VD, tokens_VD if learned is None else learned, x_BD, width,
        architecture.position_offset, architecture.embedding_scale, HAS_POSITIONS=learned is not None,
        BLOCK=triton.next_power_of_2(width), num_warps=8, **overlapping(ids_B.device),
    )  # fmt: skip
    return x_BD


def product(x_BI: Tensor, linear: Linear) -> Tensor:
    """Multiply by a weight, add its bias and its adapter: [B, O]."""
    return products(x_BI, (linear,))


def products(x_BI: Tensor, linears: Sequence[Linear]) -> Tensor:
    """Multiply by several weights, results side by side: [B, sum of O]."""
    tiles = tiles_for(x_BI, linears)
    y_BO = _by_cublas(x_BI, linears) if tiles is None else multiply(x_BI, linears, tiles)
    start = 0
    for linear in linears:
        end = start + linear.weight_OI.shape[0]
        if linear.adapter is not None:
            adapter = linear.adapter
            y_BO[:, start:end].addmm_(x_BI @ adapter.down_RI.T, adapter.up_OR.T, alpha=adapter.scaling)
        start = end
    return y_BO


def _by_cublas(x_BI: Tensor, linears: Sequence[Linear]) -> Tensor:
    if len(linears) == 1:
        return torch.nn.functional.linear(x_BI, linears[0].weight_OI, linears[0].bias_O)
    sizes = [linear.weight_OI.shape[0] for linear in linears]
    y_BO = torch.empty(len(x_BI), sum(sizes), dtype=x_BI.dtype, device=x_BI.device)
    for part_BO, linear in zip(y_BO.split(sizes, dim=1), linears, strict=True):
        torch.mm(x_BI, linear.weight_OI.T, out=part_BO)
        if linear.bias_O is not None:
            part_BO += linear.bias_O
    return y_BO


def branch(x_BI: Tensor, linear: Linear) -> Branch:
    """Multiply by the last weight of a branch; the join adds up what the kernel leaves in parts."""
    tiles = tiles_for(x_BI, (linear,), may_split=linear.adapter is None)
    if tiles is None or tiles.split == 1:
        return Branch(product(x_BI, linear)[None])
    return Branch(multiply(x_BI, (linear,), tiles), linear.bias_O)


def activated(x_BD: Tensor, feed_forward: FeedForward) -> Tensor:
    """Compute the feed-forward's inner activations: [B, O]."""
    up, name = feed_forward.up, feed_forward.activation
    is_gated = len(up) == 2
    if all(linear.adapter is None for linear in up):
        tiles = tiles_for(x_BD, up, is_gated=is_gated)
        if tiles is not None:
            return multiply(x_BD, up, tiles, activation=name, is_gated=is_gated)
        if not is_gated and name in _CUBLAS_ACTIVATIONS and up[0].bias_O is not None:
            weight_IO = up[0].weight_OI.T
            return torch._addmm_activation(up[0].bias_O, x_BD, weight_IO, use_gelu=name == "gelu_tanh")
    y_BO = products(x_BD, up)
    width = up[0].weight_OI.shape[0]
    out_BO = torch.empty(len(x_BD), width, dtype=x_BD.dtype, device=x_BD.device)
    block = min(2048, triton.next_power_of_2(width))
    activate_rows[(len(x_BD), triton.cdiv(width, block))](
        y_BO,
        out_BO,
        width,
        NAME=name,
        IS_GATED=is_gated,
        BLOCK=block,
        num_warps=4,
        **overlapping(x_BD.device),
    )
    return out_BO


_CUBLAS_ACTIVATIONS = frozenset({"relu", "gelu_tanh"})
"""Activations that cuBLAS applies to the sums before it writes them."""


def join(
    stream_BD: Tensor, branches: Sequence[Branch], how: Join, kind: NormKind, multiplier: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add the branches to the residual stream; return it, and the inputs of the layers that read it next."""
    num_rows, width = stream_BD.shape
    if not branches and not how.norms:
        return stream_BD, (stream_BD,)
    one, two, *_ = [*branches, None, None]
    keeps_sum = bool(branches) and not how.keeps_normed
    sum_BD = torch.empty_like(stream_BD) if keeps_sum else stream_BD
    inputs = tuple(torch.empty_like(stream_BD) for _ in how.norms)
    first, second, *_ = [*how.norms, None, None]
    tensors = [
        *(_of(one)), *(_of(two)), *_weights(how.branch_norm), *_weights(first), *_weights(second), sum_BD,
        *(inputs[index] if index < len(inputs) else None for index in range(2)),
    ]  # fmt: skip
    join_rows[(num_rows,)](
        stream_BD, *(stream_BD if x is None else x for x in tensors), num_rows, width, kind.eps, multiplier,
        ONE=0 if one is None else len(one.parts_SBD), ONE_BIAS=one is not None and one.bias_D is not None,
        TWO=0 if two is None else len(two.parts_SBD), TWO_BIAS=two is not None and two.bias_D is not None,
        BRANCH_NORM=how.branch_norm is not None,
        BRANCH_BIAS=how.branch_norm is not None and how.branch_norm.bias_D is not None,
        NORMS=len(how.norms), HAS_BIAS=first is not None and first.bias_D is not None, KEEPS_SUM=keeps_sum,
        OFFSET=kind.offset, IS_CENTRED=kind.is_centred, BLOCK=triton.next_power_of_2(width),
        num_warps=4 if width <= 1024 else 8 if width <= 4096 else 16, **overlapping(stream_BD.device),
    )  # fmt: skip
    return inputs[0] if how.keeps_normed else sum_BD, inputs or (sum_BD,)


def _of(one: Branch | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if one is None else (one.parts_SBD, one.bias_D)


def _weights(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight_D, norm.bias_D)


def attend(
    qkv_BO: Tensor, attention: Attention, angles: Angles | None, kind: NormKind, layout: Any
) -> Tensor:
    """Norm and turn queries and keys, store keys and values, attend: [B, H x K], in one kernel."""
    query, key, value = split_heads(qkv_BO, attention)
    turn = Turn(
        query_weight_K=None if attention.query_norm is None else attention.query_norm.weight_D,
        key_weight_K=None if attention.key_norm is None else attention.key_norm.weight_D,
        eps=kind.eps,
        offset=kind.offset,
        cosine=None if angles is None else angles.cosine,
        sine=None if angles is None else angles.sine,
    )
    out_1BHK: Tensor = layout.attend(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        attention.call,
        turn=turn,
    )
    return out_1BHK[0].flatten(1)
