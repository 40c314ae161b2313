"""A whole PPO step on several GPUs: its phases, what switching to generation costs, and how it scales.

    python benchmarks/multi_gpu.py --processes 1 2 --batch 256
    python benchmarks/multi_gpu.py --processes 2 4 8 --model opt-13b --zero-actor 3 --zero-reference 3 --weak
    python benchmarks/multi_gpu.py --processes 1 2 --model tiny --reward tiny-350m --batch 4 --device cpu
    torchrun --nproc-per-node 8 benchmarks/multi_gpu.py         as one of the processes, on any number of machines

The work is that of ppo_step.py, each process its share. One JSON line a step, one of the medians for each number of
processes, and one that compares them. Seconds are those of the slowest process: `generate` holds exchanging the
answers, but not `gather`, the switch of a sharded actor to whole weights. `received_bytes` are those of a whole step in
one process, by collective, counted in a step of its own. One process alone is not sharded, unless `--sharded`. Scaling
efficiency is sequences per second and process over those of one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

import ppo_step
import shapes
import torch
import traffic
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dovetail.config.sharding import OffloadConfig, ZeroStageConfig
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.engine import Sampling
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.sharing import Sharing
from dovetail.parallel.world import ALONE, World, joined
from dovetail.rlhf.build import checkpoint_activations, make_learners
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.rollout import complete
from dovetail.rlhf.update import Learners

PHASES = ("generate", "gather", "score", "train")


def main() -> None:
    options = arguments()
    if "RANK" in os.environ:
        one_of_several(options, alone=False)
        return
    found = [start(number, options) for number in options.processes]
    rates = {row["processes"]: row["sequences_per_second"] for row in found}
    efficiency = {number: rate / number / rates[1] for number, rate in rates.items()} if 1 in rates else None
    shapes.show(benchmark="multi_gpu", sequences_per_second=rates, scaling_efficiency=efficiency)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[ppo_step.workload()])
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers, one run each"
    )
    parser.add_argument(
        "--weak", action="store_true", help="--batch is for each process, not for all together"
    )
    parser.add_argument("--sharded", action="store_true", help="one process shards as well")
    parser.add_argument("--zero-actor", type=int, choices=range(4), default=1)
    parser.add_argument("--zero-critic", type=int, choices=range(4), default=1)
    parser.add_argument("--zero-reference", type=int, choices=(0, 3), default=0)
    parser.add_argument("--zero-reward", type=int, choices=(0, 3), default=0)
    parser.add_argument("--shard-over", default="all", help="zero_stage.shard_over: all, node or a number")
    parser.add_argument(
        "--offload", nargs="+", choices=tuple(OffloadConfig.model_fields), default=[], help="into host memory"
    )
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    options = ppo_step.checked(parser, words)
    if options.offload and "RANK" not in os.environ and 1 in options.processes and not options.sharded:
        parser.error("--offload keeps shards in host memory, and one process shards nothing: add --sharded")
    return options


def start(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """The medians of a run of so many processes on this machine, as its first process reports them."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // number))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=number, run_id="multi_gpu", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    alone = number == 1 and not options.sharded
    reports: dict[int, dict[str, Any]] = elastic_launch(config, one_of_several)(options, alone)
    return reports[0]


def one_of_several(options: argparse.Namespace, alone: bool) -> dict[str, Any]:
    """The work of one process. alone: as if nobody had started it."""
    device = torch.device(options.device)
    if alone:
        return measure(options, device, ALONE)
    with joined(device) as world:
        return measure(options, world.device(device), world)


def measure(options: argparse.Namespace, device: torch.device, world: World) -> dict[str, Any]:
    """Runs the steps; the row of medians."""
    batch = options.batch * (world.size if options.weak else 1)
    stages = ZeroStageConfig(
        actor=options.zero_actor, critic=options.zero_critic, reference=options.zero_reference,
        reward_model=options.zero_reward,
        shard_over=int(options.shard_over) if options.shard_over.isdigit() else options.shard_over,
    )  # fmt: skip
    config = PpoConfig(
        batch_size=batch, micro_batch_tokens=options.micro_tokens, critic_warmup_rollouts=0,
        activation_checkpointing={"auto": "auto", "on": True, "off": False}[options.checkpointing],
        sampling=SamplingConfig(max_new_tokens=options.new),
    )  # fmt: skip
    offload = OffloadConfig(**dict.fromkeys(options.offload, True))
    sharing = Sharing(world=world, zero_stage=stages, offload=offload)
    roles = ppo_step.make_roles(options, device, sharing)
    checkpoint_activations([roles.actor, roles.critic], config, device=device, is_averaged=True)
    learners = make_learners(roles, config, total_steps=1000)
    rows = []
    for step in range(options.steps):
        rows.append(one_step(options, roles, learners, config, world, step))
        if world.is_first:
            shapes.show(benchmark="multi_gpu", processes=world.size, step=step, **rows[-1])
    with traffic.Traffic() as counted:
        one_step(options, roles, learners, config, world, options.steps)
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    rate = batch / medians["seconds"]
    row = {
        "processes": world.size, "model": options.model, "lora": options.lora, "batch": batch,
        "is_sharded": sharding_of(roles.actor).layout.is_sharded, "zero_stage": stages.model_dump(),
        "offload": offload.models,
        "prompt": options.prompt, "new_tokens": options.new, **medians,
        "received_bytes": counted.received(), "sequences_per_second": rate,
        "sequences_per_second_and_process": rate / world.size,
    }  # fmt: skip
    if world.is_first:
        shapes.show(benchmark="multi_gpu", **row, **shapes.setting(device), **shapes.memory(device))
    return row


def one_step(
    options: argparse.Namespace, roles: Roles, learners: Learners, config: PpoConfig, world: World, step: int
) -> dict[str, float]:  # fmt: skip
    """Seconds of the phases, of the slowest process each; bytes that gathering the actor brought to each."""
    prompts = shapes.prompts_of(config.batch_size, options.prompt, roles.engine.vocabulary, seed=step)
    world.wait()
    start = shapes.now(roles.device)
    answers = complete(
        prompts, [()] * len(prompts), roles.engine, roles.chat, Sampling(max_new_tokens=options.new), seed=step,
        world=world,
    )  # fmt: skip
    generated = shapes.now(roles.device) - start
    gather, num_bytes = sharding_of(roles.actor).layout.take_costs()
    learnt = ppo_step.learn(roles, learners, config, answers, step)
    seconds = generated + sum(learnt.values())
    own = {
        "generate": generated - gather,
        "gather": gather,
        **learnt,
        "seconds": seconds,
        "gather_bytes": num_bytes,
    }
    slowest = world.max(torch.tensor(list(own.values()), dtype=torch.float64, device=roles.device))
    return dict(zip(own, slowest.tolist(), strict=True))


if __name__ == "__main__":
    main()
