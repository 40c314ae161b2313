"""Choose over how many ranks the actor is divided to generate.

Responsible for: obeying the setting or choosing by an estimate of memory, and saying what was chosen.
Not responsible for: what a slice is (parallel/tensor.py), how much memory is free (rlhf/build.py).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from dovetail.config.stages import PpoConfig
from dovetail.model.forward import plain_model
from dovetail.model.widths import widths_of
from dovetail.parallel.grid import expect_even_groups, tensor_group
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.tensor import SplitModel
from dovetail.parallel.tensor_plan import Place, expect_divisible, slice_bytes, why_not_divisible
from dovetail.parallel.world import World
from dovetail.planning.memory import MAX_RUNNING
from dovetail.telemetry.log import say


def split_to_generate(
    actor: Any,
    wanted: Literal["auto"] | int,
    config: PpoConfig,
    *,
    room: int,
    world: World,
    device: torch.device,
) -> SplitModel | None:
    """Return the actor's slices, or None if it generates whole. A collective; call it after `shard_model`.

    room: bytes of the device that generation may use.
    Raises ConfigError if the model, or the number of processes, cannot be divided by what is wanted.
    """
    size = _chosen(actor, config, room=room, world=world, device=device) if wanted == "auto" else wanted
    expect_possible(plain_model(actor).config, size, world)
    return SplitModel(actor, tensor_group(world, size), device=device) if size > 1 else None


def expect_possible(model_config: Any, size: int, world: World) -> None:
    """Raise ConfigError, with what is possible, unless groups of `size` processes can share such a model."""
    expect_even_groups(world, size)
    expect_divisible(model_config, size)


def _chosen(actor: Any, config: PpoConfig, *, room: int, world: World, device: torch.device) -> int:
    """Choose by memory; replicas, which are whole, and CPUs, whose processes share one memory, need no division."""
    skeleton = sharding_of(actor).layout.skeleton
    if skeleton is None or device.type == "cpu":
        return 1
    model = plain_model(skeleton)
    sizes = [n for n in range(1, world.size + 1) if world.size % n == 0]
    needs = {
        size: slice_bytes(model, size) + cache_bytes(model, size, config, num_processes=world.size)
        for size in sizes
        if why_not_divisible(model.config, size) is None
    }
    size: int = max(world.gather(smallest_that_fits(needs, room)))
    if size > 1:
        say(
            f"generation: groups of {size} processes hold the actor together; whole it would need about "
            f"{needs[1] / 2**30:.1f} GiB with its KV cache, {room / 2**30:.1f} GiB are there"
        )
    return size


def smallest_that_fits(needs: Mapping[int, int], room: int) -> int:
    """needs: size of a group -> bytes in each process. If none fits, the largest: the cache adapts to what is left."""
    return min((size for size, needed in needs.items() if needed <= room), default=max(needs))


def cache_bytes(model: PreTrainedModel, size: int, config: PpoConfig, *, num_processes: int) -> int:
    """Keys and values, in one process, of the answers that a group of `size` draws at once; prompts not counted."""
    widths = widths_of(model.config)
    _, key_heads = Place(0, size).heads(widths)
    answers = min(MAX_RUNNING, -(-config.batch_size * size // num_processes))
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    per_token = num_layers * 2 * key_heads * widths.head * model.dtype.itemsize
    return answers * config.sampling.max_new_tokens * per_token
