"""The operations of the fused decode step in plain torch: they define what the kernels compute, and run on the CPU.

Responsible for: embedding, products, the joins between branches and residual stream, and a layer's attention.
Not responsible for: their order (fused.py), or speed (kernels/fused_ops.py has the same functions).

Between two operations numbers have the model's precision; inside one they are float32 at least.

Shapes: B rows, D width, O and I output and input width of a product, H heads, K head width, S parts of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.engine.architecture import Architecture, Attention, FeedForward, Join, Linear, Norm, NormKind
from dovetail.model.attention import Layout


@dataclass(frozen=True, slots=True)
class Branch:
    """The output of a branch, possibly as parts that the join adds up."""

    parts_SBD: Tensor
    bias_D: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Angles:
    """The cosines and sines of a step's rotary positions, [B, half of the rotated width] each."""

    cosine: Tensor
    sine: Tensor


def embed(ids_B: Tensor, positions_B: Tensor, architecture: Architecture) -> Tensor:
    """Look up tokens and learned positions: [B, D]."""
    x_BD = functional.embedding(ids_B, architecture.embedding_VD) * architecture.embedding_scale
    if architecture.project_in is not None:
        x_BD = product(x_BD, architecture.project_in)
    if architecture.positions_PD is not None:
        x_BD = x_BD + architecture.positions_PD[positions_B + architecture.position_offset]
    return x_BD


def product(x_BI: Tensor, linear: Linear) -> Tensor:
    """Multiply by a weight, add its bias and its adapter: [B, O]."""
    y_BO: Tensor = functional.linear(x_BI, linear.weight_OI, linear.bias_O)
    if linear.adapter is not None:
        adapter = linear.adapter
        y_BO = y_BO.addmm_(x_BI @ adapter.down_RI.T, adapter.up_OR.T, alpha=adapter.scaling)
    return y_BO


def products(x_BI: Tensor, linears: Sequence[Linear]) -> Tensor:
    """Multiply by several weights, results side by side: [B, sum of O]."""
    return torch.cat([product(x_BI, linear) for linear in linears], dim=-1)


def branch(x_BI: Tensor, linear: Linear) -> Branch:
    """Multiply by the last weight of a branch."""
    return Branch(product(x_BI, linear)[None])


def activated(x_BD: Tensor, feed_forward: FeedForward) -> Tensor:
    """Compute the feed-forward's inner activations: [B, O]."""
    first, *gated = (product(x_BD, linear) for linear in feed_forward.up)
    y_BO = _ACTIVATIONS[feed_forward.activation](first)
    return y_BO * gated[0] if gated else y_BO


def join(
    stream_BD: Tensor, branches: Sequence[Branch], how: Join, kind: NormKind, multiplier: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add the branches to the residual stream; return it, and the inputs of the layers that read it next."""
    dtype = stream_BD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x_BD = stream_BD.to(wide)
    for one in branches:
        y_BD = one.parts_SBD.to(wide).sum(dim=0)
        if one.bias_D is not None:
            y_BD = y_BD + one.bias_D
        if how.branch_norm is not None:
            y_BD = normed(y_BD, how.branch_norm, kind)
        x_BD = x_BD + multiplier * y_BD
    x_BD = x_BD.to(dtype)
    inputs = tuple(normed(x_BD.to(wide), norm, kind).to(dtype) for norm in how.norms) or (x_BD,)
    return inputs[0] if how.keeps_normed else x_BD, inputs


def normed(x: Tensor, norm: Norm, kind: NormKind) -> Tensor:
    """Apply LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dimension, in x's precision."""
    if kind.is_centred:
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + kind.eps)
    x = x * (norm.weight_D.to(x.dtype) + kind.offset)
    return x if norm.bias_D is None else x + norm.bias_D


def attend(
    qkv_BO: Tensor, attention: Attention, angles: Angles | None, kind: NormKind, layout: Layout
) -> Tensor:
    """Norm and turn queries and keys, store keys and values, attend: [B, H x K]."""
    heads = split_heads(qkv_BO, attention)
    norms = (attention.query_norm, attention.key_norm, None)
    query, key, value = (
        turned(x, norm, kind, angles if index < 2 else None)
        for index, (x, norm) in enumerate(zip(heads, norms, strict=True))
    )
    query_1HBK, key_1CBK, value_1CBK = (x.transpose(0, 1)[None] for x in (query, key, value))
    out_1BHK = layout.attend(query_1HBK, key_1CBK, value_1CBK, attention.call)
    return out_1BHK[0].flatten(1)


def split_heads(qkv_BO: Tensor, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """View the products as queries, keys and values, [B, heads, K] each."""
    if attention.is_interleaved:
        query, key, value = qkv_BO.view(len(qkv_BO), -1, 3, attention.width).unbind(2)
        return query, key, value
    sizes = (attention.num_heads, attention.num_key_heads, attention.num_key_heads)
    query, key, value = qkv_BO.view(len(qkv_BO), -1, attention.width).split_with_sizes(sizes, dim=1)
    return query, key, value


def turned(x_BHK: Tensor, norm: Norm | None, kind: NormKind, angles: Angles | None) -> Tensor:
    """Normalise each head, then rotate pairs of its entries by the angles of its position (arXiv:2104.09864)."""
    dtype = x_BHK.dtype
    x = x_BHK.to(torch.promote_types(dtype, torch.float32))
    if norm is not None:
        x = normed(x, norm, kind)
    if angles is not None:
        half = angles.cosine.shape[-1]
        cosine, sine = angles.cosine[:, None].to(x.dtype), angles.sine[:, None].to(x.dtype)
        one, two, rest = x.split_with_sizes([half, half, x.shape[-1] - 2 * half], dim=-1)
        x = torch.cat([one * cosine - two * sine, two * cosine + one * sine, rest], dim=-1)
    return x.to(dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
