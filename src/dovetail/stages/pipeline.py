"""All stages of a run in order: a finished one is skipped, a half-finished one goes on where it was.

Responsible for: which stage runs, timing it, and `summary.json`. Not responsible for: what a stage does.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from dovetail.config.run import RunConfig, StageName
from dovetail.errors import ConfigError
from dovetail.parallel.world import World, described_world
from dovetail.planning.hardware import gpu_like
from dovetail.planning.plan import plan_of
from dovetail.planning.report import short
from dovetail.planning.result import Machine
from dovetail.rlhf.evaluation import Judge
from dovetail.stages import dpo, ppo, reward, sft
from dovetail.stages.checks import refuse
from dovetail.stages.context import Context, StageReport, open_run
from dovetail.stages.verdict import doubts_of, shown
from dovetail.telemetry.log import say, warn

TITLES: dict[StageName, str] = {
    "sft": "stage 1: supervised fine-tuning",
    "reward": "stage 2: reward model",
    "ppo": "stage 3: PPO",
    "dpo": "stage 2: direct preference optimisation",
}


def run(config: RunConfig, *, is_checked: bool = False) -> World:
    """Run the stages of `config.stages` in `config.output_dir`; returns the processes that did.

    Raises what `refuse` finds before anything is written. is_checked: the launcher of this process has looked.
    """
    check = None if is_checked else partial(refuse, config)
    if check is not None and not described_world().is_group:
        check(described_world())  # before the device is resolved, so that a missing one is in the same list
        check = None
    with open_run(config, check) as context:
        if context.device.type == "cuda" and context.world.is_first:
            say_plan(
                config, context.world, name=torch.cuda.get_device_name(), memory=torch.cuda.mem_get_info()[1]
            )
        run_stages(context)
    return context.world


def say_plan(config: RunConfig, world: World, *, name: str, memory: int) -> None:
    """Say what is planned for this run on GPUs of this name and memory; nothing where model or GPU are not known."""
    gpu = gpu_like(name, memory / 2**30)
    if gpu is None:
        return
    nodes = max(1, world.size // max(1, world.local_size))
    with suppress(ConfigError):
        say(short(plan_of(config, Machine(gpu=gpu, num_gpus=world.size // nodes, num_nodes=nodes))))


def run_stages(context: Context, judge: Judge | None = None) -> None:
    """Run the stages of an open run; `judge` gives PPO's held-out answers a second opinion."""
    stages: dict[StageName, Callable[[Context], StageReport]] = {
        "sft": sft.run,
        "reward": reward.run,
        "ppo": lambda context: ppo.run(context, judge),
        "dpo": dpo.run,
    }
    for name, run_stage in stages.items():
        if name not in context.config.stages:
            continue
        if context.is_done(name):
            say(f"{TITLES[name]}: finished before, skipped")
            continue
        context.stop.expect_none(TITLES[name])
        say(TITLES[name])
        start = time.monotonic()
        report = run_stage(context)
        seconds = time.monotonic() - start
        results = {key.removeprefix(f"{name}/"): value for key, value in report.results.items()}
        if context.world.is_first:
            context.folder.update_summary(
                {name: {"steps": report.steps, **results}, "seconds": {name: seconds}}
            )
            context.folder.mark_done(name)
        context.world.wait()
        say(f"{TITLES[name]}: {report.steps} steps in {seconds:.0f} s -> {context.folder.model(name)}")
        say(f"{TITLES[name]}: {shown(results)}")
        for doubt in doubts_of(results):
            warn(f"{TITLES[name]}: {doubt}")
    if context.report is not None:
        context.report.close()
