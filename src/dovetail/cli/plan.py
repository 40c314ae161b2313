"""`dovetail plan`: memory, time and cost of a run before it starts.

Responsible for: the flags. Not responsible for: settings (run_settings.py), the plan (planning/).
"""

import json
from typing import Annotated

import typer

from dovetail.cli.run_settings import Flags, resolve
from dovetail.cli.train import ActorModel, Overrides, Recipe, RewardModel, Step
from dovetail.planning.architecture import catalogue
from dovetail.planning.fit import remedies
from dovetail.planning.hardware import gpu_named, gpus
from dovetail.planning.plan import ROWS, plan_of
from dovetail.planning.report import lines_of
from dovetail.planning.result import Machine
from dovetail.planning.sweep import tables

MACHINE = "The machine"


def plan(
    recipe: Recipe = None,
    overrides: Overrides = None,
    actor_model: ActorModel = None,
    reward_model: RewardModel = None,
    step: Step = None,
    gpu: Annotated[
        str, typer.Option(help="The kind of GPU; --gpus lists those that are known.", rich_help_panel=MACHINE)
    ] = "h100-80g",
    num_gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="GPUs of each node. By default the recipe's.", rich_help_panel=MACHINE, show_default=False
        ),
    ] = None,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes.", rich_help_panel=MACHINE)] = 1,
    price: Annotated[
        float | None,
        typer.Option(
            min=0, help="Dollars of a GPU and hour. By default the catalogue's.", rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of the data, of all stages together. By default rm-static's.")
    ] = ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes, seconds and dollars.")] = False,
    list_gpus: Annotated[bool, typer.Option("--gpus", help="List the GPUs with their figures and sources.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Print DeepSpeed-Chat's tables and figures for this engine beside its own.")
    ] = False,
    list_models: Annotated[bool, typer.Option("--models", help="List the models whose shapes are known.")] = False,
) -> None:  # fmt: skip
    """Say what a run needs: memory item by item, whether it fits, what makes it fit, time and cost.

    A model's name, folder or config.json is enough: no weights, no GPU and no network.

      dovetail plan opt-13b --gpu a100-80g
      dovetail plan --actor-model Qwen/Qwen3-8B --gpu rtx-4090 actor.lora.rank=16
      dovetail plan opt-66b --gpu h100 --num-gpus 8 zero_stage.actor=3 --json
    """
    if list_gpus or list_models or sweep:
        typer.echo("\n".join(_gpu_lines() if list_gpus else catalogue() if list_models else tables()))
        return
    flags = Flags(actor_model=actor_model, reward_model=reward_model, step=step or (), num_gpus=num_gpus)
    resolved = resolve(recipe, overrides or (), flags)
    config = resolved.config
    machine = Machine(gpu=gpu_named(gpu), num_gpus=config.num_gpus, num_nodes=num_nodes, price=price)
    found = plan_of(config, machine, rows=rows)
    ways = remedies(
        config,
        machine,
        rows=rows,
        with_overrides=lambda more: resolve(recipe, [*(overrides or ()), *more], flags).config,
    )
    if as_json:
        ways_as_json = [{"overrides": way.overrides, **way.plan.as_json()} for way in ways]
        typer.echo(json.dumps({**found.as_json(), "fits_with": ways_as_json}, indent=2))
        return
    for note in resolved.notes:
        typer.echo(note, err=True)
    typer.echo("\n".join(lines_of(found, ways)))


def _gpu_lines() -> list[str]:
    return [
        f"{gpu.key:<11} {gpu.memory:6.1f} GiB {gpu.bandwidth:6.0f} GB/s {gpu.tflops:7.1f} TFLOP/s {gpu.price:6.2f} $/h"
        f"  {gpu.source}; {gpu.price_source}"
        for gpu in gpus().values()
    ]
