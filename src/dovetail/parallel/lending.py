"""One process that shards alone, and computes with its shards themselves.

Responsible for: telling FSDP2 so, through its extension points.
Not responsible for: sharding (shard.py).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


@torch.no_grad()
def lend_shards(model: nn.Module) -> None:
    """For one process, whose shards are whole: FSDP2 computes with them instead of copies, and what it would reduce
    are their gradients already. Both through its extension points; nothing else about it changes. The weights are left
    gathered.
    """
    shards = dict(model.named_parameters())
    for shard in shards.values():
        rows: Any = shard._local_tensor  # type: ignore[attr-defined]  # the very tensor that FSDP2 asks
        rows.fsdp_pre_all_gather = _gather_nothing
        rows.fsdp_post_all_gather = partial(_as_it_is, rows)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(partial(_hand_over, shards[name]))  # type: ignore[no-untyped-call]


def _gather_nothing(
    mesh: Any, size: torch.Size, stride: tuple[int, ...], module: nn.Module, policy: MixedPrecisionPolicy
) -> tuple[tuple[Tensor, ...], None]:
    """What to send of a shard, and what to remember of it."""
    return (torch.empty(0, device=mesh.device_type),), None


def _as_it_is(
    rows: Tensor,
    received: tuple[Tensor, ...],
    remembered: None,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The weight to compute with, and what of it is to be freed after use; nothing once `out` is that weight."""
    return (rows, ()) if out is None else None


def _hand_over(shard: nn.Parameter, weight: Tensor) -> None:
    """The gradient of the weight becomes that of its shard, as if it had been reduced."""
    assert weight.grad is not None
    shard.grad = weight.grad if shard.grad is None else shard.grad.add_(weight.grad)
    weight.grad = None
    for hook in (shard._post_accumulate_grad_hooks or {}).values():
        hook(shard)
