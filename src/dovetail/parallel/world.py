"""The processes of a run: their ranks, how they join a group, the collectives they use, and their shares of a batch.

Responsible for: joining the group that `torchrun` describes in the environment, its end (also by an error), the few
collectives the rest of the code needs, and shares balanced by tokens that every process computes alike.
Not responsible for: starting processes, which weights lie where (shard.py), packing (batches.py).

A process that was not started as one of a group is a world of one, `ALONE`: torch.distributed is never touched. The
processes must meet in the same collectives: with sharded weights each forward pass is one. So all run as many
micro-batches as the one with the most, and the results of the extra ones are left out.
"""

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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

from dovetail.batches import MicroBatchable, balanced_parts
from dovetail.errors import ConfigError, DovetailError, RunInterrupted
from dovetail.telemetry.log import CONSOLE

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun sets for each process it starts."""
PATIENCE = timedelta(hours=2)
"""The time that a collective waits for the slowest rank, because large models load and save within one. A run that
stands still ends long before (launch/stuck.py)."""

_FAILURES = "failures"
_STORES: dict[tuple[str, str], Store] = {}
_JOINS = count()
"""The number of groups that this process joined so far; all processes of a run join the same ones."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run. All collectives must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among the processes of this machine, and so the number of its GPU."""
    local_size: int = 1
    """The number of processes on each machine; 0 if it differs or is unknown."""
    is_group: bool = False
    """True if a group was joined, if only of one process."""
    group: Any = None
    """The process group of the collectives; None for the default group, which the main thread uses."""

    @property
    def is_first(self) -> bool:
        """Return whether this is the one process that writes files and prints."""
        return self.rank == 0

    @property
    def everyone(self) -> "World":
        """All processes of the run; these themselves, except in a grid (grid.py)."""
        return self

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process: its own GPU if `device` is a GPU."""
        return torch.device("cuda", self.local_rank) if self.is_group and device.type == "cuda" else device

    def mesh(self, device: torch.device, shard_size: int) -> DeviceMesh:
        """Return a mesh of one row, or of rows of `shard_size` neighbours that hold one replica each."""
        return _mesh(device.type, self.size, shard_size)

    def aside(self) -> "World":
        """Return the same processes with a gloo group of their own, for a thread beside the main one. A collective."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=PATIENCE))

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce the tensor in place: the sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduce the tensor in place: the maximum over all ranks, element by element."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """All-gather plain Python values; returns them by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: T) -> T:
        """Broadcast the first rank's value; what the others passed is ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def from_first_of_row(self, value: T) -> T:
        """Return the value of the first rank of this tensor-parallel row (grid.py); here there is none but this one."""
        return value

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Run the block in the first process, then in the others, which find what it left on disk."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


ALONE = World()
"""One process, no group."""


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the group that the environment describes, and leave it at the end of the block; `ALONE` if there is none.

    device: the kind of device that the run computes on; NCCL connects GPUs, gloo everything else. Processes other than
    the first print nothing. When one fails, it alone reports the error: the others, which wait for it or meet the same
    error, exit silently with status 1. All processes raise RunInterrupted together: they leave the group in order, and
    all but the first exit silently with its code.
    Raises ConfigError if the environment is half a description, or names a GPU that is not there.
    """
    world = described_world()
    if not world.is_group:
        yield ALONE
        return
    _expect_device(world, device)
    # Each group gets a store of its own, so that no process finds the addresses of an earlier group there.
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
        take_down()
        if world.is_first:
            raise
        raise SystemExit(end.exit_code) from end
    except Exception as error:
        # Destroying the group would wait for the other ranks, which wait for this one. At the interpreter's end threads
        # of the group still wait, and now and then that is an abort(), whose exit code says nothing.
        is_first = _is_first_to_fail(store)
        if world.size > 1:
            code = error.exit_code if is_first and isinstance(error, DovetailError) else 1
            atexit.register(_leave, code)
        if is_first:
            raise
        raise SystemExit(1) from error
    take_down()


def take_down() -> None:
    """Destroy all groups now, because at the interpreter's end their threads would now and then abort() it."""
    _forget_groups()
    dist.destroy_process_group()


def _forget_groups() -> None:
    _mesh.cache_clear()
    row_and_column.cache_clear()
    gc.collect()  # models that were sharded refer to groups, in circles


def shared_store(patience: timedelta = PATIENCE) -> Store:
    """Return the store where the processes meet. It is kept as long as this process lives, which may host it.

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
    """Return this rank's process groups when all `size` ranks stand in rows of `width`: its row, and its column.

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
    """Read the world from the environment without joining it. Raises ConfigError if the description is incomplete."""
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
    """Make the mesh once for all models, because each mesh has groups with buffers of their own on a GPU."""
    if shard_size == size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _number(name: str, value: str | None) -> int:
    try:
        return int(value or "")
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} is not a number", hint="torchrun sets it") from error


def _expect_device(world: World, device: torch.device) -> None:
    if device.type == "cuda" and world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            hint="start as many processes per machine as it has GPUs",
        )


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_first_to_fail(store: Any) -> bool:
    """Return whether no other rank has failed before; False if the store cannot be asked any more."""
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


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """This process among those that share a model layer by layer; by default it has the model for itself.

    All tensors of its collectives stay on their device and no shape depends on their numbers, so a captured CUDA graph
    may hold these calls.

    Shapes: S rows, C columns of one process.
    """

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


@dataclass(frozen=True, slots=True)
class Part:
    """Units (sequences, groups of ranked answers) of one forward pass."""

    index: list[int]
    counts: bool = True
    """False for padding: the part makes all ranks run as many passes, and its result is left out."""


def balanced_shares(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the indices of each rank, with sums of sizes as even as a greedy choice gives; a rank may get none.

    Longest first to the rank with least (Graham 1969: at most 4/3 of the best possible largest share).
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    used = [0] * num_ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        target = min(range(num_ranks), key=lambda rank: (used[rank], len(shares[rank])))
        shares[target].append(i)
        used[target] += sizes[i]
    return [sorted(share) for share in shares]


def divided(
    sizes: Sequence[int], work: Callable[[list[int]], list[T]], world: World, group: TensorGroup = WHOLE
) -> list[T]:
    """Return one result for each item; every process works on a share of them, and gets the results of all.

    sizes: an estimate of each item's work. work: takes the indices of some items and returns their results. group: the
    processes that work on one share together; what their first one returns counts.
    """
    shares = balanced_shares(sizes, world.size // group.size)
    own = work(shares[world.rank // group.size])
    gathered = zip(shares, world.gather(own if group.is_first else [])[:: group.size], strict=True)
    found = {i: result for share, part in gathered for i, result in zip(share, part, strict=True)}
    return [found[i] for i in range(len(sizes))]


def parts_of(sizes: Sequence[int], max_tokens: int, world: World) -> list[Part]:
    """Return this rank's share of the units, in parts of at most `max_tokens` tokens, as many parts as every rank has.

    Raises ValueError if there are no units.
    """
    if not sizes:
        raise ValueError("a batch without sequences cannot be shared")
    cut: list[list[list[int]]] = []
    for share in balanced_shares(sizes, world.size):
        own = [sizes[i] for i in share]
        cut.append([[share[i] for i in part] for part in balanced_parts(own, max_tokens)])
    most = max(map(len, cut))
    shortest = min(range(len(sizes)), key=sizes.__getitem__)
    mine = [Part(index) for index in cut[world.rank]]
    return mine + [Part([shortest], counts=False)] * (most - len(mine))


def shared_micro_batches(batch: MicroBatchable, max_tokens: int, world: World) -> list[tuple[Any, bool]]:
    """Return (micro-batch, whether it counts) for this rank's share of the units that have targets."""
    targets = batch.unit_targets
    runs = [run for run in batch.runs(max_tokens) if any(targets[unit] for unit in run.units)]
    return [
        (batch.units([unit for i in part.index for unit in runs[i].units]), part.counts)
        for part in parts_of([run.tokens for run in runs], max_tokens, world)
    ]
