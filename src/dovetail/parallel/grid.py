"""The processes of a run in two dimensions: neighbours compute together, the others work on other sequences.

Responsible for: which processes share a model, to train or to generate, and that those who compute together agree.
Not responsible for: what they hold (tensor_training.py, shard.py).

With T neighbours in a row, process r is number r % T of its row and number r // T of its column. Those of a column hold
the same slices, divide the batch among themselves, and shard their slices as `shard.py` shards whole weights.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dovetail.errors import ConfigError
from dovetail.parallel.tensor_plan import GENERATION, TRAINING
from dovetail.parallel.world import ALONE, WHOLE, TensorGroup, World, row_and_column

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Grid(World):
    """The grid as data parallelism sees it: a World made of this process's column."""

    run: World = ALONE
    """All processes."""
    tensor: TensorGroup = WHOLE
    """This process's row."""

    @property
    def is_first(self) -> bool:
        """Return whether this process is the first of the whole run."""
        return self.run.is_first

    @property
    def everyone(self) -> World:
        """All processes of the run."""
        return self.run

    def wait(self) -> None:
        """Wait until all processes of the run are here."""
        self.run.wait()

    def aside(self) -> World:
        """Return all processes of the run, for a thread beside the main one."""
        return self.run.aside()

    def from_first_of_row(self, value: T) -> T:
        """Return the value of the row's first process."""
        box = [value]
        dist.broadcast_object_list(box, group=self.tensor.handle, group_src=0)
        return box[0]

    def mesh(self, device: torch.device, shard_size: int) -> DeviceMesh:
        """Return the mesh of the column, which shards together."""
        assert shard_size == self.size
        return DeviceMesh.from_group(self.group, device.type, mesh_dim_names=("shard",))


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


def in_rows(world: World, width: int) -> World:
    """Arrange the processes of `world` in rows of `width`; returns `world` itself if that is 1. A collective.

    Raises ConfigError if the processes do not come out even.
    """
    expect_even_groups(world, width, setting=TRAINING)
    if width == 1:
        return world
    row, column = row_and_column(world.size, width)
    return Grid(
        rank=world.rank // width,
        size=world.size // width,
        local_rank=world.local_rank,
        local_size=world.local_size,
        is_group=True,
        group=column,
        run=world,
        tensor=TensorGroup(world.rank % width, width, row),
    )
