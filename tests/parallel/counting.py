"""One process of a group that counts what gradient steps and whole PPO steps receive, and prints it as JSON.

CASES is a JSON list: [ZeRO stage, micro-batches, shard_over] is a gradient step, [ZeRO stage, micro-batches, rank of
adapters, old_logprobs, shard_over] a PPO step. Printed is a list of {operator: bytes received}, in the same order.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dovetail.batches import pack
from dovetail.config.sharding import ZeroStageConfig
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.model.forward import language_model_loss
from dovetail.parallel.shard import shard_model
from dovetail.parallel.sharing import Sharing
from dovetail.parallel.world import World, joined
from dovetail.rlhf.build import make_learners
from dovetail.training.optim import Optimizer
from dovetail.training.step import Term, TokenBudget, gradient_step
from tests.fakes import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import multi_gpu  # type: ignore[import-not-found]
import ppo_step  # type: ignore[import-not-found]
import traffic  # type: ignore[import-not-found]

CPU = torch.device("cpu")
LENGTH, PER_MICRO_BATCH = 16, 2
PROMPT, ANSWER = 96, 32
NUMBERS = 512
"""Bytes below which an all-reduce is one of a few numbers: a step's report, the scores."""


def main(cases: list[list[Any]]) -> None:
    """Prints the counts of all cases, in the first process."""
    with joined(CPU) as world:
        found = [(gradient_bytes if len(case) == 3 else ppo_bytes)(*case, world) for case in cases]
    if world.is_first:
        sys.stdout.write(json.dumps(found))


def gradient_bytes(stage: int, micro_batches: int, shard_over: Any, world: World) -> dict[str, int]:
    """Of the second step of a model; in the first FSDP2 sets up."""
    model = tiny_model()
    shard_size = world.size if shard_over == "all" else shard_over
    shard_model(model, stage=stage, world=world, device=CPU, shard_size=shard_size)
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


def ppo_bytes(
    stage: int, micro_batches: int, lora: int, old_logprobs: Any, shard_over: Any, world: World
) -> dict[str, int]:
    """Of the second step of actor, reference, critic and reward model; at stage 3 the frozen ones are sharded too."""
    frozen: Any = 3 if stage == 3 else 0
    stages = ZeroStageConfig.model_validate(
        {
            "actor": stage,
            "critic": stage,
            "reference": frozen,
            "reward_model": frozen,
            "shard_over": shard_over,
        }
    )
    options = multi_gpu.arguments(
        ["--model", "tiny", "--reward", "tiny-350m", "--device", "cpu", "--dtype", "float32"]
    )
    options.batch, options.lora = micro_batches * PER_MICRO_BATCH * world.size, lora
    options.prompt, options.new = PROMPT, ANSWER
    options.micro_tokens = PER_MICRO_BATCH * (PROMPT + ANSWER)
    config = PpoConfig(
        batch_size=options.batch,
        micro_batch_tokens=options.micro_tokens,
        critic_warmup_rollouts=0,
        old_logprobs=old_logprobs,
        sampling=SamplingConfig(max_new_tokens=ANSWER),
    )
    roles = ppo_step.make_roles(options, CPU, Sharing(world=world, zero_stage=stages))
    learners = make_learners(roles, config, total_steps=10)
    step = partial(multi_gpu.one_step, options, roles, learners, config, world)
    step(0)
    return counted(partial(step, 1))


def counted(function: Callable[[], Any]) -> dict[str, int]:
    """Operator -> bytes received by the collectives that the call makes, without those of a few numbers."""
    with traffic.Traffic() as seen:
        function()
    seen.calls = [(name, n) for name, n in seen.calls if not (name == "allreduce" and n < NUMBERS)]
    received: dict[str, int] = seen.received()
    return received


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
