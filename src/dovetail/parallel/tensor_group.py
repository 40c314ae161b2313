"""Processes that compute one model together, each with a slice of every large weight.

Responsible for: who they are, and the few collectives that such a model and its generation need.
Not responsible for: what is cut how (tensor_plan.py), the modules (tensor.py).

All tensors stay on their device and no shape depends on their numbers, so a captured CUDA graph may hold these calls.

Shapes: S rows, C columns of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail.parallel.tensor_plan import GENERATION
from dovetail.parallel.world import World, row_and_column


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """This process among those that share a model; by default it has the model for itself."""

    rank: int = 0
    size: int = 1
    handle: Any = None
    """torch's process group."""

    @property
    def is_first(self) -> bool:
        """The one whose answers count: all have the same."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce the tensor in place: the sum over the group."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def columns(self, part_SC: Tensor, lengths: Sequence[int]) -> Tensor:
        """[S, sum of lengths]: the first `lengths[i]` columns of process i, side by side."""
        if self.size == 1:
            return part_SC
        parts = zip(self.each(part_SC), lengths, strict=True)
        return torch.cat([part[:, :length] for part, length in parts], dim=1)

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduce the tensor in place: the maximum over the group, element by element."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.handle)
        return tensor

    def each(self, part: Tensor) -> list[Tensor]:
        """All-gather: return the `part` of every rank, all of one shape, by rank."""
        if self.size == 1:
            return [part]
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.handle)
        return parts

    def from_first(self, tensor: Tensor) -> Tensor:
        """Broadcast the first rank's tensor in place; it must be contiguous."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.handle, group_src=0)
        return tensor

    def least(self, number: int, device: torch.device) -> int:
        """Return the smallest number of the group."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.handle)
        return int(tensor)


WHOLE = TensorGroup()
"""One process with whole weights."""


def tensor_group(world: World, size: int) -> TensorGroup:
    """Return the group of this rank when neighbours, `size` by `size`, share a model. A collective of all ranks.

    Raises ConfigError if the processes do not come out even.
    """
    expect_even_groups(world, size)
    if size == 1:
        return WHOLE
    row, _ = row_and_column(world.size, size)
    return TensorGroup(world.rank % size, size, row)


def expect_even_groups(world: World, size: int, *, setting: str = GENERATION) -> None:
    """Raise ConfigError, which names the setting, unless the processes of `world` form groups of `size`."""
    if world.size % size:
        possible = [str(n) for n in range(1, world.size + 1) if world.size % n == 0]
        raise ConfigError(
            f"{setting} = {size}: the run's {world.size} process{'es' if world.size > 1 else ''} cannot form groups "
            f"of {size}",
            hint=f"set {setting} to one of {', '.join(possible)}, or start another number of processes (--num-gpus)",
        )
