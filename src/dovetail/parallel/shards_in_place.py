"""Let a process that shards alone compute with its shards in place.

Responsible for: the hooks of FSDP2's extension points that do it.
Not responsible for: sharding (shard.py).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


@torch.no_grad()
def compute_on_shards(model: nn.Module) -> None:
    """Make FSDP2 compute with the shards themselves, not with copies, where one process holds all rows.

    The gradients then are those of the shards, and nothing is left to reduce. Both go through FSDP2's extension points;
    nothing else about it changes. The weights are left unsharded.
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
    """Return what FSDP2 sends of a shard, and what it remembers of it: nothing."""
    return (torch.empty(0, device=mesh.device_type),), None


def _as_it_is(
    rows: Tensor,
    received: tuple[Tensor, ...],
    remembered: None,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Return the weight to compute with and what to free after use; None once `out` is that weight."""
    return (rows, ()) if out is None else None


def _hand_over(shard: nn.Parameter, weight: Tensor) -> None:
    """Move the weight's gradient to its shard, as if it had been reduced."""
    assert weight.grad is not None
    shard.grad = weight.grad if shard.grad is None else shard.grad.add_(weight.grad)
    weight.grad = None
    for hook in (shard._post_accumulate_grad_hooks or {}).values():
        hook(shard)
