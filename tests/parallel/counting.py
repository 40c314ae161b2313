"""One process of a group that counts what a gradient step receives at each ZeRO stage, and prints it as JSON.

Counted are the collectives themselves, as FSDP2 and this code call them, each at what a ring algorithm receives.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.batches import pack
from dovetail.parallel.shard import spread
from dovetail.parallel.world import World, joined
from dovetail.rlhf.update import language_model_loss
from dovetail.training.memory import TokenBudget
from dovetail.training.optim import Optimizer
from dovetail.training.step import Term, gradient_step
from tests.fakes import tiny_model

CPU = torch.device("cpu")
LENGTH, PER_MICRO_BATCH = 16, 2
TIMES = {
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "all_reduce": 2,
}
"""How often a ring passes each tensor on, in units of (N - 1) / N; FSDP2 calls the first of a pair since torch 2.13."""
SMALLEST = 4096
"""Bytes of a collective that moves weights or gradients; the sums of a step's report are far below."""


def main(micro_batches: int) -> None:
    """Prints {stage: bytes received in a step}, in the first process."""
    with joined(CPU) as world:
        found = {stage: received(stage, micro_batches, world) for stage in range(4)}
    if world.is_first:
        sys.stdout.write(json.dumps(found))


def received(stage: int, micro_batches: int, world: World) -> int:
    """Bytes that this process receives in the second step of a model at a ZeRO stage; in the first FSDP2 sets up."""
    model = tiny_model()
    spread(model, stage=stage, world=world, device=CPU)
    optimizer = Optimizer(model, learning_rate=1e-3)
    rows = [[1 + i] * LENGTH for i in range(micro_batches * PER_MICRO_BATCH * world.size)]
    batch = pack(rows, [[True] * LENGTH for _ in rows])
    step = partial(
        gradient_step,
        model,
        optimizer,
        [Term(batch, partial(language_model_loss, model))],
        max_grad_norm=1.0,
        budget=TokenBudget(LENGTH * PER_MICRO_BATCH),
        device=CPU,
        learning_rate=1e-3,
    )
    step()
    return counted(step)


def counted(function: Callable[[], Any]) -> int:
    """Bytes received by the collectives that the call makes."""
    total = 0
    size = dist.get_world_size()

    def counting(original: Callable[..., Any], times: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            num_bytes = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            total += times * num_bytes * (size - 1) // size if num_bytes >= SMALLEST else 0
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, times in TIMES.items():
            original = getattr(dist, name, None)
            if original is not None:
                stack.enter_context(patch.object(dist, name, counting(original, times)))
        function()
    return total


if __name__ == "__main__":
    main(int(sys.argv[1]))
