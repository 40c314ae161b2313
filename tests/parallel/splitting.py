"""One process of a group that generates with divided models, and prints what came out as JSON.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.splitting '[["llama", 2, 3, ""], ...]' cpu

A case: [model, processes that hold it together, ZeRO stage, what is special ("", "lora", "memory", "bytes",
"whole", "idle" or "wrong plan")].
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from dovetail.engine import kv_cache
from dovetail.engine.hybrid import Generate, HybridEngine
from dovetail.engine.parity import check_parity
from dovetail.engine.sampling import Sampling
from dovetail.errors import ParityError
from dovetail.model.lora import add_lora
from dovetail.model.shards import is_shard
from dovetail.parallel import tensor_plan
from dovetail.parallel.grid import tensor_group
from dovetail.parallel.shard import ShardedModel, shard_model
from dovetail.parallel.tensor import SplitModel
from dovetail.parallel.world import TensorGroup, World, joined
from tests.fakes import TINY, tiny_model

Case = tuple[str, int, int, str]
Result = tuple[list[list[int]], list[list[float]]]
"""Tokens and log-probabilities of all answers."""

_RNG = random.Random(1)
PROMPTS = [[_RNG.randrange(250) for _ in range(length)] for length in (60, 61, 62, 130, 1)]
PROMPTS += [PROMPTS[3]] * 2
"""Ragged, and three answers to one of them."""
SETTINGS = [
    Sampling(max_new_tokens=20, temperature=0.0),
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=20, temperature=0.7),
    Sampling(max_new_tokens=20, top_p=0.9, min_p=0.01),
    Sampling(max_new_tokens=20, temperature=0.0, repetition_penalty=1.3),
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=9, top_k=20),
]


def made(name: str, special: str) -> Any:
    """The model of a case, as one process has it."""
    if name == "one key head":
        config = TINY["llama"]()
        config.num_key_value_heads = 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()
    model: Any = tiny_model(name)
    if special == "lora":
        model = add_lora(model, rank=4, alpha=8, seed=0)
        generator = torch.Generator().manual_seed(0)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def answers(engine: HybridEngine) -> Result:
    """What is compared."""
    with engine.generating() as generate:
        return answered(generate)


def answered(generate: Generate) -> Result:
    """The same within a block."""
    found = generate(PROMPTS, SETTINGS, seeds=range(len(PROMPTS)))
    return [list(c.token_ids) for c in found], [list(c.logprobs) for c in found]


def main(cases: list[Case], kind: torch.device) -> None:
    """Prints {case: what it came to}, in every process."""
    torch.set_num_threads(1)
    groups: dict[int, TensorGroup] = {}
    results = {}
    with joined(kind) as world:
        for case in cases:
            if case[1] not in groups:
                groups[case[1]] = tensor_group(world, case[1])
            results[" ".join(map(str, case))] = result(case, groups[case[1]], world, world.device(kind))
    sys.stdout.write(f"\n{json.dumps(results)}\n")


def result(case: Case, group: TensorGroup, world: World, device: torch.device) -> Any:
    """Answers, or the words of the parity check of a model divided by a wrong plan."""
    name, _, stage, special = case
    model = made(name, special)
    shard_model(model, stage=stage, world=world, device=device)
    with wrong_plan() if special == "wrong plan" else nullcontext():
        split = SplitModel(model, group, device=device)
    engine = HybridEngine(split.modules, device=device, weights=split.filled, group=group)
    if special == "wrong plan":
        try:
            check_parity(engine, PROMPTS, trained=model)
        except ParityError as error:
            return error.message
        return "no difference"
    if special == "bytes":
        return received(engine, group.size)
    if special == "whole":
        with wholes_counted(split) as counts, engine.generating():
            return max(counts)
    if special == "idle":  # the other group has left the block long before
        with engine.generating() as generate:
            return answered(generate) if world.rank < group.size else None
    if special == "memory":
        with little_memory(wanted=not group.is_first):
            return [*answers(engine), engine.counts.preempted]
    check_parity(engine, PROMPTS, trained=model)
    return answers(engine)


def received(engine: HybridEngine, size: int) -> int:
    """Bytes that ring algorithms bring to this process while it answers the first prompt, in numbers of the model."""
    total = 0

    def counting(original: Callable[..., Any], times: int) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal total
            tensors = first if isinstance(first, list) else [first]
            if tensors[0].is_floating_point():
                num_bytes = sum(one.numel() * one.element_size() for one in tensors)
                total += times * num_bytes * (size - 1) // size
            return original(first, *args, **kwargs)

        return call

    with engine.generating() as generate, ExitStack() as stack:
        for name, times in (("all_reduce", 2), ("all_gather", 1)):
            stack.enter_context(patch.object(dist, name, counting(getattr(dist, name), times)))
        generate(PROMPTS[:1], SETTINGS[0], seeds=[0])
    return total


@contextmanager
def wholes_counted(split: SplitModel) -> Iterator[list[int]]:
    """Each time that a weight has been gathered: how many of those that are cut are there whole."""
    counts: list[int] = []

    original = ShardedModel.whole_weights

    def watched(sharded: ShardedModel, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in original(sharded, **options):
            weights = {key: sharded.model.get_parameter(key) for key in split._partitions}
            counts.append(sum(not is_shard(held) for held in weights.values()))
            yield name, weight

    with patch.object(ShardedModel, "whole_weights", watched):
        yield counts


@contextmanager
def wrong_plan() -> Iterator[None]:
    """GPT-2's fused projection cut as if query, key and value of a head were neighbours."""
    right = tensor_plan.PLANS["gpt2"]
    wrong = tensor_plan.Plan({**right.columns, "c_attn": tensor_plan.EVEN}, right.rows)
    with patch.dict(tensor_plan.PLANS, gpt2=wrong):
        yield


@contextmanager
def little_memory(*, wanted: bool) -> Iterator[None]:
    """Room for a few pages of keys and values."""
    page_bytes = 2 * 2 * 1 * 64 * 8 * 4  # layers, keys and values, heads of a process, places, width, float32
    room = 5.5 * page_bytes / 0.8
    with patch.object(kv_cache, "free_bytes", lambda _: int(room)) if wanted else nullcontext():
        yield


if __name__ == "__main__":
    main([tuple(case) for case in json.loads(sys.argv[1])], torch.device(sys.argv[2]))  # type: ignore[misc]
