"""`dovetail train`, `sft`, `reward` and `ppo`: run the stages of a recipe.

Responsible for: flags and their help, the dry run, and the line that says what to do next.
Not responsible for: settings (run_settings.py), the stages themselves (stages/).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.processes import (
    Hostfile,
    MasterAddr,
    MasterPort,
    MaxRestarts,
    NodeRank,
    NumNodes,
    RdzvId,
    RdzvTimeout,
    carry_out_everywhere,
    commands,
    expect_gpus,
    topology_for,
)
from dovetail.cli.run_settings import Flags, Resolved, resolve
from dovetail.config.load import dump
from dovetail.config.run import RunConfig, StageName, stages_of
from dovetail.launch.early_signals import signals_kept, stopped_by_signals
from dovetail.launch.rank import LAUNCHER
from dovetail.launch.topology import DEFAULT_PORT, LaunchFlags, Topology, is_rank

if TYPE_CHECKING:
    from dovetail.runs.run_folder import RunFolder

MODELS = "Models and data"
RUN = "The run"
FROM_DEEPSPEED = "For people who come from DeepSpeed-Chat"

Recipe = Annotated[
    str | None,
    typer.Argument(
        help="A recipe file, or the name of one that comes with Dovetail (opt-1.3b, qwen3-0.6b ...). "
        "If it is left out with --actor-model, the recipe nearest to the model is taken.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change, setting=value, the value in YAML: ppo.kl_coefficient=0.02 "
        "actor.lora.rank=128 data.blend='\\[rm-static:2, my_pairs.jsonl:1]'",
        show_default=False,
    ),
]
ActorModel = Annotated[
    str | None,
    typer.Option(
        help="Model to train: hub name, folder or .gguf file.", rich_help_panel=MODELS, show_default=False
    ),
]
RewardModel = Annotated[
    str | None,
    typer.Option(
        help="Model that the reward model starts from: as for --actor-model, or a finished reward model.",
        rich_help_panel=MODELS,
        show_default=False,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="One or more sources: a registered or hub name, a file, name:weight, "
        "'{path: pairs.jsonl, chosen: a, rejected: b}', or a YAML file that lists sources.",
        rich_help_panel=MODELS,
        show_default=False,
    ),
]
OutputDir = Annotated[
    str | None,
    typer.Option(help="Folder of the run. By default runs/NAME.", rich_help_panel=RUN, show_default=False),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of everything random.", rich_help_panel=RUN, show_default=False)
]
NumGpus = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes on each machine, one per GPU.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print every setting and what would run, and check all that a run checks; write nothing.",
        rich_help_panel=RUN,
    ),
]
Step = Annotated[
    list[str] | None,
    typer.Option(
        help="Stages to run, such as: --step 1 2 3. By default all.", rich_help_panel=RUN, show_default=False
    ),
]


DeploymentType = Annotated[
    str | None,
    typer.Option(
        help="single_gpu, single_node (all GPUs of this machine) or multi_node.",
        rich_help_panel=FROM_DEEPSPEED,
        show_default=False,
    ),
]
ZeroStage = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=3,
        help="How far the model is sharded over the processes.",
        rich_help_panel=FROM_DEEPSPEED,
        show_default=False,
    ),
]


def train(
    context: typer.Context,
    recipe: Recipe = None,
    overrides: Overrides = None,
    actor_model: ActorModel = None,
    reward_model: RewardModel = None,
    data: Data = None,
    output_dir: OutputDir = None,
    step: Step = None,
    seed: Seed = None,
    num_gpus: NumGpus = None,
    dry_run: DryRun = False,
    num_nodes: NumNodes = None,
    node_rank: NodeRank = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = DEFAULT_PORT,
    rdzv_id: RdzvId = None,
    rdzv_timeout: RdzvTimeout = 300,
    hostfile: Hostfile = None,
    max_restarts: MaxRestarts = 0,
    deployment_type: DeploymentType = None,
    actor_zero_stage: ZeroStage = None,
    reward_zero_stage: ZeroStage = None,
) -> None:
    """Run all stages: supervised fine-tuning, then reward model and PPO, or with algorithm=dpo DPO alone.

    The same command again skips finished stages and resumes a half-finished one.

      dovetail train opt-1.3b
      dovetail train my_recipe.yaml ppo.kl_coefficient=0.02 output_dir=runs/try2
      dovetail train --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --data rm-static
    """
    flags = Flags(
        actor_model=actor_model,
        reward_model=reward_model,
        data=data or (),
        output_dir=output_dir,
        step=step or (),
        seed=seed,
        num_gpus=num_gpus,
        actor_zero_stage=actor_zero_stage,
        reward_zero_stage=reward_zero_stage,
    )
    launch = LaunchFlags(
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        rdzv_id=rdzv_id,
        rdzv_timeout=rdzv_timeout,
        hostfile=hostfile,
        max_restarts=max_restarts,
        deployment_type=deployment_type,
    )
    carry_out(resolve(recipe, overrides or (), flags), launch, context.obj, dry_run=dry_run)


def stage_command(stage: StageName, text: str) -> Callable[..., None]:
    """Make the command that runs one stage: `train`, with all its arguments but --step."""

    def command(context: typer.Context, **given: Any) -> None:
        train(context, **given, step=[stage])

    whole = signature(train)
    kept = [parameter for name, parameter in whole.parameters.items() if name != "step"]
    command.__signature__ = whole.replace(parameters=kept)  # type: ignore[attr-defined]
    command.__annotations__ = train.__annotations__
    command.__doc__ = text
    return command


sft = stage_command(
    "sft",
    """Run stage 1 alone, supervised fine-tuning on demonstrations; it writes RUN/sft/model.

    dovetail sft opt-1.3b data.blend='\\[my_chats.jsonl]'
    """,
)
reward = stage_command(
    "reward",
    """Run stage 2 alone, a reward model from comparisons; it writes RUN/reward/model.

    dovetail reward opt-1.3b data.blend='\\[{path: pairs.csv, prompt: question, chosen: good, rejected: bad}]'
    """,
)
ppo = stage_command(
    "ppo",
    """Run stage 3 alone, PPO against the reward model of the run, a finished one, or a Python function.

    dovetail ppo opt-1.3b                                     after dovetail sft and dovetail reward
    dovetail ppo opt-1.3b ppo.reward_function=my_file.py:score
    """,
)


def carry_out(resolved: Resolved, launch: LaunchFlags, arguments: Sequence[str], *, dry_run: bool) -> None:
    """Run the stages, or only print what would run; `arguments` are those of the whole command."""
    config = resolved.config
    for note in resolved.notes:
        typer.echo(note, err=True)
    check = partial(_check, config)
    if dry_run:
        topology = topology_for(config, launch)
        typer.echo(dump(config))
        typer.echo("\n".join(f"# {line}" for line in [*plan(config), *_machines(topology, arguments)]))
        check(topology)
        typer.echo("# checked: data, models, devices, packages and the folder; no problem was found")
        return
    done = carry_out_everywhere(config, launch, arguments, lambda: _run_stages(config), check)
    if done and {"ppo", "dpo", "sft"} & set(config.stages):
        typer.echo(f"talk to it: dovetail chat {config.output_dir}")


def _check(config: RunConfig, topology: Topology) -> None:
    with signals_kept():  # here and not above: they import torch
        from dovetail.parallel.world import World
        from dovetail.stages.checks import refuse

    with stopped_by_signals():
        refuse(config, World(size=topology.size), partial(expect_gpus, config, topology))


def _run_stages(config: RunConfig) -> None:
    with nullcontext() if is_rank() else signals_kept():
        from dovetail.stages import pipeline  # here and not above: it imports torch

    pipeline.run(config, is_checked=LAUNCHER in os.environ)


def _machines(topology: Topology, arguments: Sequence[str]) -> list[str]:
    if topology.num_nodes > 1:
        return [line.removeprefix("# ") for line in commands(topology, arguments)]
    return [f"{topology.size} processes on this machine"] if topology.size > 1 else []


def plan(config: RunConfig) -> list[str]:
    """Describe what each stage would do now, judging by the output folder."""
    from dovetail.runs.run_folder import RunFolder

    folder = RunFolder(config.output_dir)
    reward_start = "the SFT model" if config.reward.start_from == "sft" else config.reward_start().path
    titles: dict[StageName, str] = {
        "sft": f"supervised fine-tuning of {config.actor.path}",
        "reward": f"reward model from {reward_start}",
        "ppo": f"PPO, {config.ppo.batch_size} answers a rollout",
        "dpo": f"direct preference optimisation, loss {config.dpo.loss}",
    }
    stages = stages_of(config.algorithm)
    width = max(len(titles[name]) for name in stages)
    lines = [
        f"stage {number}  {titles[name]:<{width}}  {_state(folder, name, name in config.stages)}"
        for number, name in enumerate(stages, start=1)
    ]
    return [*lines, f"results in {config.output_dir}; nothing was written"]


def _state(folder: "RunFolder", stage: StageName, wanted: bool) -> str:
    if folder.is_done(stage):
        return "finished before: skipped"
    if not wanted:
        return "not requested"
    begun = folder.checkpoints(stage)
    if begun.is_dir() and any(begun.glob("step-*")):
        return "continues from its last checkpoint"
    return "runs"
