"""The processes of a run: who they are, how they meet, and what they tell each other.

Responsible for: joining the group that `torchrun` describes in the environment, its end (also by an error), and the
few collectives the rest of the code needs.
Not responsible for: starting processes, which weights lie where (shard.py), who works on what (share.py).

A process that was not started as one of a group is a world of one, `ALONE`: torch.distributed is never touched.
"""

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from dovetail.errors import ConfigError, RunInterrupted
from dovetail.telemetry.log import CONSOLE

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Set by torchrun for each process it starts."""
PATIENCE = timedelta(hours=2)
"""How long a collective waits for the slowest process; loading and saving large models happen within one. A run in
which nobody moves ends long before (launch/stuck.py)."""

_FAILURES = "failures"
_STORES: dict[tuple[str, str], Store] = {}
_JOINS = count()
"""Groups that this process joined so far; all processes of a run join the same ones."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run. All collectives must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: the number of its GPU."""
    local_size: int = 1
    """Processes of each machine; 0 if they differ, or nobody said."""
    is_group: bool = False
    """A group was joined, if only of one process."""
    group: Any = None
    """Whose collectives these are, to torch; None for those of the run's main thread."""

    @property
    def is_first(self) -> bool:
        """The one process that writes and speaks."""
        return self.rank == 0

    @property
    def everyone(self) -> "World":
        """All processes of the run; others than these only where they stand in a grid (grid.py)."""
        return self

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: its own GPU where `device` is any."""
        return torch.device("cuda", self.local_rank) if self.is_group and device.type == "cuda" else device

    def mesh(self, device: torch.device, shard_size: int) -> DeviceMesh:
        """All processes in one row; or rows of `shard_size` neighbours, one replica each."""
        return _mesh(device.type, self.size, shard_size)

    def aside(self) -> "World":
        """The same processes, with collectives of their own on the host for a thread beside the main one. A
        collective."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=PATIENCE))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of all processes, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; plain Python data."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value; what the others passed is ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def agreed(self, value: T) -> T:
        """The value of the first of those that compute one model's layers together (grid.py): here, of this process."""
        return value

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The block runs in the first process, then in the others, which find what it left on disk."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


ALONE = World()
"""One process, no group."""


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The group that the environment describes, left at the end of the block; `ALONE` if it describes none.

    device: what kind the run computes on; NCCL connects GPUs, gloo everything else. Processes other than the first
    print nothing. When one fails, it alone is heard: those that it leaves waiting, and those that meet the same
    error, exit with status 1 and no word. RunInterrupted is met by all together: they leave the group in order, and
    all but the first exit with its code and no word.
    Raises ConfigError if the environment is half a description, or names a GPU that is not there.
    """
    world = described_world()
    if not world.is_group:
        yield ALONE
        return
    _expect_device(world, device)
    # A store of its own for each group: nobody finds the addresses of an earlier one in it.
    store = PrefixStore(f"group-{next(_JOINS)}", shared_store())
    _forget_groups()
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    try:
        with _silent(not world.is_first):
            yield replace(world, local_size=_common(world.gather(world.local_size)))
            world.wait()
    except RunInterrupted as end:
        world.wait()
        _take_down()
        if world.is_first:
            raise
        raise SystemExit(end.exit_code) from end
    except Exception as error:
        # The group is not taken down: that would wait for the others, who wait for this process.
        if _is_first_to_fail(store):
            raise
        # Nor by the interpreter at its end: threads of the group still wait, and now and then that is an abort().
        atexit.register(_leave)
        raise SystemExit(1) from error
    _take_down()


def _take_down() -> None:
    """Leave all groups while the interpreter lives: at its end their threads would now and then abort() it."""
    _forget_groups()
    dist.destroy_process_group()


def _forget_groups() -> None:
    _mesh.cache_clear()
    row_and_column.cache_clear()
    gc.collect()  # models that were sharded refer to groups, in circles


def shared_store(patience: timedelta = PATIENCE) -> Store:
    """Where the processes of the environment meet. Kept as long as this one lives, which may be its host.

    patience: how long the first call waits for the others.
    """
    address, port, rank, size = (
        os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    )
    if (address, port) not in _STORES:
        _STORES[address, port], _, _ = next(
            rendezvous("env://", rank=int(rank), world_size=int(size), timeout=patience)
        )
    return _STORES[address, port]


@cache
def row_and_column(size: int, width: int) -> tuple[Any, Any]:
    """torch's groups of this process when all `size` stand in rows of `width` neighbours: its row, and its column.

    A collective. Made once for all that want the same: each has buffers of its own on a GPU.
    """
    rows = [list(range(start, start + width)) for start in range(0, size, width)]
    columns = [list(range(start, size, width)) for start in range(width)]
    row, column = (
        dist.new_subgroups_by_enumeration(ranks, timeout=PATIENCE)[0]  # type: ignore[no-untyped-call]
        for ranks in (rows, columns)
    )
    return row, column


def described_world() -> World:
    """The world of the environment variables, not joined yet. Raises ConfigError if they are half a description."""
    given = {name: os.environ.get(name) for name in VARIABLES}
    if given["RANK"] is None and _number("WORLD_SIZE", given["WORLD_SIZE"] or "1") == 1:
        return ALONE
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ConfigError(
            f"this process is one of several (RANK={given['RANK']}, WORLD_SIZE={given['WORLD_SIZE']}), but "
            f"{', '.join(missing)} is not set",
            hint="start it with torchrun, which sets all of them; alone, unset RANK and WORLD_SIZE",
        )
    numbers = {name: _number(name, given[name]) for name in VARIABLES if name != "MASTER_ADDR"}
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise ConfigError(
            f"RANK={numbers['RANK']} is not one of WORLD_SIZE={numbers['WORLD_SIZE']} processes",
            hint="ranks run from 0 to WORLD_SIZE - 1; torchrun numbers them",
        )
    local_size = _number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], local_size, is_group=True)


def _common(numbers: Sequence[int]) -> int:
    return numbers[0] if len(set(numbers)) == 1 else 0


@cache
def _mesh(kind: str, size: int, shard_size: int) -> DeviceMesh:
    """Made once for all models: each has groups of processes with buffers of their own on a GPU."""
    if shard_size == size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _number(name: str, value: str | None) -> int:
    try:
        return int(value or "")
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} is no number", hint="torchrun sets it") from error


def _expect_device(world: World, device: torch.device) -> None:
    if device.type == "cuda" and world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            hint="start as many processes per machine as it has GPUs",
        )


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _is_first_to_fail(store: Any) -> bool:
    """Whether no other process has failed before. Whoever cannot ask any more was left behind."""
    try:
        number: int = store.add(_FAILURES, 1)
    except RuntimeError:
        return False
    return number == 1


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    before = CONSOLE.quiet
    CONSOLE.quiet = before or wanted
    try:
        with warnings.catch_warnings():
            if wanted:
                warnings.simplefilter("ignore")
            yield
    finally:
        CONSOLE.quiet = before
