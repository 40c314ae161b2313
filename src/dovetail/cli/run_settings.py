"""Turn the command line into a RunConfig: recipe, flags of the one-line script, overrides.

Responsible for: picking a recipe for a model, and what each flag means as a setting.
Not responsible for: reading and checking (config/load.py), running.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.config.load import load, parse_value
from dovetail.config.recipes import names_file, recipe_for
from dovetail.config.run import RunConfig, StageName, stages_of
from dovetail.config.stages import OptimizerConfig
from dovetail.errors import ConfigError
from dovetail.text_file import read_text

STAGES: dict[str, StageName] = {
    "1": "sft",
    "2": "reward",
    "3": "ppo",
    "sft": "sft",
    "reward": "reward",
    "ppo": "ppo",
    "dpo": "dpo",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The values of the flags of `dovetail train` and `train.py`."""

    actor_model: str | None = None
    reward_model: str | None = None
    data: Sequence[str] = ()
    output_dir: str | None = None
    step: Sequence[str] = ()
    seed: int | None = None
    num_gpus: int | None = None
    actor_zero_stage: int | None = None
    reward_zero_stage: int | None = None
    """DeepSpeed-Chat's name; it also means the critic, which starts from the reward model."""


@dataclass(slots=True)
class Resolved:
    """A checked configuration, and notes for the user about its origin."""

    config: RunConfig
    notes: list[str] = field(default_factory=list)


def resolve(recipe: str | None, overrides: Sequence[str], flags: Flags) -> Resolved:
    """Apply the recipe, then flags, then overrides; without a recipe, pick one for the actor."""
    if recipe is not None and "=" in recipe and not names_file(recipe):
        overrides, recipe = [recipe, *overrides], None
    reason = None
    actor = _full_name(flags.actor_model)
    if recipe is None:
        if actor is None and list(map(_stage, flags.step)) == ["reward"]:
            actor = _full_name(flags.reward_model)  # stage 2 needs no other model, and this one names the run
        if actor is None:
            raise ConfigError(
                "neither a recipe nor a model was given",
                hint="dovetail train opt-1.3b, or my_recipe.yaml, or --actor-model facebook/opt-1.3b",
            )
        recipe, reason = recipe_for(actor)
    settings = _settings(flags, actor)
    # The picked recipe splits its own data; the user did not ask to split theirs.
    if reason and flags.data:
        settings = {"data.stage_split": ("--data", None)} | settings
    config = load(recipe, overrides, settings)
    return Resolved(config, [f"recipe {recipe} for {actor}: {reason}; {_choices(config)}"] if reason else [])


def _choices(config: RunConfig) -> str:
    """Describe the choices of a recipe that a user would want to know."""
    weights = f"adapters of rank {config.actor.lora.rank}" if config.actor.lora else "all weights"
    optimizers: dict[StageName, tuple[str, OptimizerConfig]] = {
        "sft": ("SFT", config.sft.optimizer),
        "reward": ("reward model", config.reward.optimizer),
        "ppo": ("PPO", config.ppo.actor_optimizer),
        "dpo": ("DPO", config.dpo.optimizer),
    }
    named = [optimizers[stage] for stage in stages_of(config.algorithm)]
    listed = ", ".join(f"{name} {optimizer.learning_rate:g}" for name, optimizer in named)
    trained = f"it trains {weights} of the actor (learning rates: {listed})"
    if "reward" not in stages_of(config.algorithm):
        return trained
    return f"{trained}; the reward model starts from {config.reward_start().path}"


def _settings(flags: Flags, actor: str | None) -> dict[str, tuple[str, Any]]:
    settings: dict[str, tuple[str, Any]] = {}
    if actor is not None:
        settings["actor.path"] = ("--actor-model", actor)
        settings["output_dir"] = (
            "--actor-model",
            f"runs/{Path(actor).stem if Path(actor).is_file() else Path(actor).name}",
        )
    if flags.reward_model is not None:
        settings["reward_model.path"] = ("--reward-model", _full_name(flags.reward_model))
    if flags.data:
        settings |= _data_settings(flags.data)
    if flags.step:
        settings["stages"] = ("--step", [_stage(step) for step in flags.step])
    for name, value in (("output_dir", flags.output_dir), ("seed", flags.seed), ("num_gpus", flags.num_gpus)):
        if value is not None:
            settings[name] = (f"--{name.replace('_', '-')}", value)
    zero_stages = {
        "zero_stage.actor": ("--actor-zero-stage", flags.actor_zero_stage),
        "zero_stage.critic": ("--reward-zero-stage", flags.reward_zero_stage),
    }
    return settings | {name: given for name, given in zero_stages.items() if given[1] is not None}


def _data_settings(items: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Return the settings that --data stands for.

    Its items are names, files, `name:weight`, `{path: ..., chosen: ...}`, or a YAML file of sources or data settings.
    """
    blend: list[Any] = []
    settings: dict[str, tuple[str, Any]] = {}
    for item in items:
        if Path(item).suffix in (".yaml", ".yml"):
            values = _read_sources(item)
            if isinstance(values, dict) and "path" not in values:
                settings |= {f"data.{key}": (item, value) for key, value in values.items() if key != "blend"}
                values = values.get("blend", [])
            blend += values if isinstance(values, list) else [values]
        elif item.startswith("{"):
            blend.append(parse_value(item, f"--data {item}"))
        else:
            blend.append(item)
    return {"data.blend": ("--data", blend), **settings}


def _read_sources(file: str) -> Any:
    if not names_file(file):
        raise ConfigError(f"--data {file}: no such file", hint="give a YAML file that lists the sources")
    try:
        return parse_value(read_text(Path(file).expanduser()), file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data {file}: not UTF-8 text", hint="save it as UTF-8") from error


def _stage(step: str) -> StageName:
    if step not in STAGES:
        raise ConfigError(f"--step {step}: no such stage", hint="1 or sft, 2 or reward, 3 or ppo; dpo")
    return STAGES[step]


def _full_name(model: str | None) -> str | None:
    """Replace DeepSpeed-Chat's short names of OPT models, such as 1.3b, by full names."""
    if model is not None and re.fullmatch(r"\d+(\.\d+)?[bm]", model) and not Path(model).exists():
        return f"facebook/opt-{model}"
    return model
