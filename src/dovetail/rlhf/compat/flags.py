"""DeepSpeed-Chat's flags as our settings.

Responsible for: reading the namespace that its step-3 `main.py` parses, and refusing by name what cannot be honoured.
Not responsible for: what the settings do (config/, rlhf/), flags that only the script itself reads.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from dovetail.config.model import LoraConfig
from dovetail.config.sharding import OffloadConfig, TensorParallelConfig, ZeroStageConfig
from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.errors import ConfigError
from dovetail.model.load import explained
from dovetail.parallel.sharing import Sharing
from dovetail.parallel.world import World
from dovetail.rlhf.build import Setup
from dovetail.telemetry.log import say

Role = Literal["actor", "critic"]

_SCHEDULES: dict[str, Literal["cosine", "linear", "constant"]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}

_SCOPE = "decoder.layers."
"""The predecessor's default for `--actor_lora_module_name`, which is written for OPT."""

_OFFLOADED = {
    "offload": (("actor_zero_stage", 1), ("critic_zero_stage", 1)),
    "offload_reference_model": (("actor_zero_stage", 3),),
    "offload_reward_model": (("critic_zero_stage", 3),),
}
"""Flag -> the ZeRO stages that it needs at least: only shards can stay in host memory."""


def config_from(args: Namespace) -> PpoConfig:
    """Return the settings that the flags ask for; a missing flag has the predecessor's default.

    Raises ConfigError for a flag that cannot be honoured.
    """
    given = vars(args)
    _expect_honoured(given)
    checkpoints = given.get("actor_gradient_checkpointing") or given.get("critic_gradient_checkpointing")
    return PpoConfig(
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=given.get("max_answer_seq_len", 256)),
        actor_optimizer=_optimizer(given, "actor", 9.65e-6),
        critic_optimizer=_optimizer(given, "critic", 5e-6),
        ppo_epochs=given.get("ppo_epochs", 1),
        activation_checkpointing=True if checkpoints else "auto",
        kl_coefficient=0.1,
        score_clip=5.0,
        ratio_clip=0.2,
        value_clip=0.2,
        gamma=1.0,
        gae_lambda=0.95,
        ema_decay=0.992,
        cut_off_answers="penalise",
        missing_end_penalty=None,
        old_logprobs="training",
        importance_cap=None,  # the exchange format has one log-probability per token
        critic_warmup_rollouts=0,
    )


def setup_from(args: Namespace, world: World, models: Mapping[Role, Any]) -> Setup:
    """Return precision, seed, adapters and how the processes hold the models.

    models: each role's model, or its name or folder; the LoRA scopes are looked up in its layers.
    """
    given = vars(args)
    stages = {role: given.get(f"{role}_zero_stage", 0) for role in ("actor", "critic")}
    return Setup(
        precision=given.get("dtype", "auto"),
        seed=given.get("seed") or 0,
        actor_lora=_lora(given, "actor", models["actor"]),
        critic_lora=_lora(given, "critic", models["critic"]),
        sharing=Sharing(
            world=world,
            zero_stage=ZeroStageConfig(
                actor=stages["actor"],
                critic=stages["critic"],
                reference=3 if stages["actor"] == 3 else 0,
                reward_model=3 if stages["critic"] == 3 else 0,
            ),
            offload=OffloadConfig(
                actor=bool(given.get("offload")),
                critic=bool(given.get("offload")),
                reference=bool(given.get("offload_reference_model")),
                reward_model=bool(given.get("offload_reward_model")),
            ),
            tensor_parallel=TensorParallelConfig(generation=given.get("inference_tp_size", 1)),
        ),
    )


def accumulation_from(args: Namespace, *, with_text: bool) -> tuple[int, int]:
    """Return how many losses make one step of the actor, and of the critic.

    with_text: the actor also learns from plain text, whose losses count among its own.
    """
    given = vars(args)
    critic = given.get("gradient_accumulation_steps", 1)
    return given.get("gradient_accumulation_steps_actor", critic * (2 if with_text else 1)), critic


def _optimizer(given: Mapping[str, Any], role: Role, rate: float) -> OptimizerConfig:
    rate = given.get(f"{role}_learning_rate", rate)
    if given.get(f"{role}_lora_dim"):
        rate = given.get(f"{role}_lora_learning_rate", rate)
    return OptimizerConfig(
        learning_rate=rate,
        weight_decay=given.get(f"{role}_weight_decay", 0.0),
        schedule=_SCHEDULES[_schedule(given)],
        warmup_steps=given.get("num_warmup_steps", 0),
        betas=(0.9, 0.95),
        eps=1e-8,
        max_grad_norm=1.0,
    )


def _schedule(given: Mapping[str, Any]) -> str:
    name = given.get("lr_scheduler_type", "cosine")
    return str(getattr(name, "value", name))


def _lora(given: Mapping[str, Any], role: Role, model: Any) -> LoraConfig | None:
    """Return the adapters of a role, on the linear layers whose names hold the scope."""
    rank = given.get(f"{role}_lora_dim", 0)
    if not rank:
        return None
    if not given.get("only_optimize_lora"):
        say(
            f"{role}: adapters alone learn, as with --only_optimize_lora; all loaded weights stay as they are"
        )
    targets = _layers_in_scope(
        f"{role}_lora_module_name", given.get(f"{role}_lora_module_name", _SCOPE), model
    )
    # The predecessor scales its adapters by 1 / rank.
    return LoraConfig(rank=rank, alpha=1.0, target_modules=targets)


def _layers_in_scope(flag: str, scope: str, model: Any) -> tuple[str, ...] | Literal["all-linear"]:
    """Return the names, within the backbone, of the linear layers that the scope means.

    The default scope is in the names of OPT's layers only; for other families it means all layers.
    """
    backbone = _skeleton(model) if isinstance(model, str) else model.base_model
    names = [
        name
        for name, part in backbone.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D)) and name
    ]
    prefix = model.base_model_prefix if not isinstance(model, str) else backbone.base_model_prefix
    found = tuple(name for name in names if scope in f"{prefix}.{name}")
    if found:
        return found
    if scope == _SCOPE:
        return "all-linear"
    raise ConfigError(
        f"--{flag} = {scope!r} is not in the name of any linear layer of {type(backbone).__name__}",
        hint=f"give a part of such a name; the first and the last are {prefix}.{names[0]} and {prefix}.{names[-1]}",
    )


def _skeleton(name: str) -> Any:
    """Return the backbone of a model on the meta device, without memory for its weights."""
    with explained(name), torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(name))  # type: ignore[no-untyped-call]


def _expect_honoured(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first flag whose meaning has no counterpart here."""
    schedule = _schedule(given)
    if schedule not in _SCHEDULES:
        raise ConfigError(
            f"--lr_scheduler_type = {schedule} has no counterpart here",
            hint=f"use one of {', '.join(_SCHEDULES)}",
        )
    for role in ("actor", "critic"):
        if given.get(f"{role}_dropout"):
            raise ConfigError(
                f"--{role}_dropout = {given[f'{role}_dropout']:g}: PPO runs without dropout here, so that the "
                "ratio of an unchanged policy is 1",
                hint=f"leave out --{role}_dropout, or set it to 0",
            )
    if given.get("enable_mixed_precision_lora"):
        raise ConfigError(
            "--enable_mixed_precision_lora: frozen weights are not quantised here",
            hint="leave it out; --actor_zero_stage 3 shards the frozen weights over the processes",
        )
    if given.get("align_overflow") and given.get("dtype") == "fp16":
        raise ConfigError(
            "--align_overflow with --dtype fp16: actor and critic each skip their own steps that overflow here",
            hint="leave out --align_overflow, or use --dtype bf16, which does not overflow",
        )
    if given.get("deepspeed_config"):
        raise ConfigError(
            f"--deepspeed_config = {given['deepspeed_config']}: DeepSpeed's configuration files are not read here",
            hint="leave it out and use the flags of main.py",
        )
    _expect_shards_to_offload(given)


def _expect_shards_to_offload(given: Mapping[str, Any]) -> None:
    for flag, needed in _OFFLOADED.items():
        for stage_flag, least in needed:
            stage = given.get(stage_flag, 0)
            if given.get(flag) and stage < least:
                raise ConfigError(
                    f"--{flag} with --{stage_flag} {stage}: only a sharded model can stay in host memory",
                    hint=f"set --{stage_flag} to {'3' if least == 3 else '1, 2 or 3'}, or leave out --{flag}",
                )
