"""The processes of a script, by the names that DeepSpeed gives them.

Responsible for: `init_distributed`, `get_accelerator`, `add_config_arguments`, and the processes as the rest of compat
sees them.
Not responsible for: starting them (torchrun), what they share (parallel/).
"""

import atexit
import os
import sys
from argparse import ArgumentParser
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from dovetail.errors import ConfigError
from dovetail.parallel.world import ALONE, PATIENCE, World, described_world, shared_store, take_down
from dovetail.telemetry.log import CONSOLE


class Accelerator:
    """The kind of device that this process computes on."""

    def device_name(self, index: int | None = None) -> str:
        """Return cuda or cpu, followed by a number if one is given."""
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return name if index is None else f"{name}:{index}"

    def set_device(self, index: int) -> None:
        """Make the GPU of that number the current one; do nothing on a CPU."""
        if torch.cuda.is_available():
            torch.cuda.set_device(index)

    def current_device_name(self) -> str:
        """Return the name of the current device."""
        return self.device_name(torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"


def get_accelerator() -> Accelerator:
    """Return the object that describes the device of this process."""
    return Accelerator()


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags that DeepSpeed adds, and take `--local_rank` from the environment that torchrun makes.

    A script that is started by `python` alone is process 0 of one.
    """
    group = parser.add_argument_group("DeepSpeed", "accepted for compatibility; they configure nothing")
    group.add_argument("--deepspeed", action="store_true", help="has no effect")
    group.add_argument("--deepspeed_config", default=None, type=str, help="is refused by the engine if given")
    parser.set_defaults(local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    return parser


def init_distributed(*_: Any, **__: Any) -> None:
    """Join the processes that torchrun started, or a group of one, unless that is done already.

    The arguments of DeepSpeed's function have no effect: NCCL connects GPUs, gloo everything else.
    """
    if dist.is_initialized():
        return
    world = described_world()
    store: Store = PrefixStore("deepspeed-chat", shared_store()) if world.is_group else HashStore()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    atexit.register(_leave)
    CONSOLE.quiet = CONSOLE.quiet or not world.is_first  # only the first one prints


def joined_world() -> World:
    """Return the processes that this one has joined, or this one alone if there are no others.

    Raises ConfigError if there are others that it has not joined: each would train a model of its own.
    """
    described = described_world()
    if dist.is_initialized():
        return World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=described.local_rank,
            local_size=described.local_size,
            is_group=True,
        )
    if described.size > 1:
        raise ConfigError(
            f"this process is one of {described.size} and has not joined the others: each would train another model",
            hint="call init_distributed() before the engine is made, as main.py does when --local_rank is set",
        )
    return ALONE


def is_rank_0() -> bool:
    """Return whether this is the process that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def get_all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over the processes."""
    summed = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(summed)
        summed /= dist.get_world_size()
    return summed


def _leave() -> None:
    """Leave the group at the end of the script, and first wait for the others if there was no error."""
    if not dist.is_initialized():
        return
    if not hasattr(sys, "last_value"):  # the interpreter keeps an error there that ended the script
        with suppress(RuntimeError):  # another process met an error and is gone
            joined_world().wait()
    take_down()
