"""Every flag reaches the setting it stands for, and what has none is refused by name."""

from argparse import Namespace
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
from transformers import SchedulerType

from dovetail.config.model import LoraConfig
from dovetail.errors import ConfigError
from dovetail.parallel.world import ALONE
from dovetail.rlhf.compat.flags import accumulation_from, config_from, setup_from
from tests.fakes import tiny_model
from tests.rlhf.tiny import tiny_reward_model


def settings_of(**flags: Any) -> Any:
    args = Namespace(**flags)
    models = {"actor": tiny_model("opt"), "critic": tiny_reward_model("opt")}
    return Namespace(
        ppo=config_from(args),
        setup=setup_from(args, ALONE, models),
        accumulation=accumulation_from(args, with_text=False),
        accumulation_with_text=accumulation_from(args, with_text=True),
    )


def value_at(path: str) -> Callable[[Any], Any]:
    return lambda settings: reduce(getattr, path.split("."), settings)


UNTOUCHED = {
    "ppo.kl_coefficient": 0.1,
    "ppo.score_clip": 5.0,
    "ppo.ratio_clip": 0.2,
    "ppo.value_clip": 0.2,
    "ppo.gamma": 1.0,
    "ppo.gae_lambda": 0.95,
    "ppo.ema_decay": 0.992,
    "ppo.cut_off_answers": "penalise",
    "ppo.missing_end_penalty": None,
    "ppo.importance_cap": None,
    "ppo.critic_warmup_rollouts": 0,
    "ppo.old_logprobs": "training",
    "ppo.sampling.max_new_tokens": 256,
    "ppo.sampling.temperature": 1.0,
    "ppo.activation_checkpointing": "auto",
    "ppo.ppo_epochs": 1,
    "ppo.actor_optimizer.learning_rate": 9.65e-6,
    "ppo.actor_optimizer.weight_decay": 0.0,
    "ppo.actor_optimizer.schedule": "cosine",
    "ppo.actor_optimizer.warmup_steps": 0,
    "ppo.actor_optimizer.betas": (0.9, 0.95),
    "ppo.actor_optimizer.eps": 1e-8,
    "ppo.actor_optimizer.max_grad_norm": 1.0,
    "ppo.critic_optimizer.learning_rate": 5e-6,
    "ppo.critic_optimizer.weight_decay": 0.0,
    "ppo.critic_optimizer.schedule": "cosine",
    "ppo.critic_optimizer.warmup_steps": 0,
    "ppo.critic_optimizer.betas": (0.9, 0.95),
    "ppo.critic_optimizer.eps": 1e-8,
    "ppo.critic_optimizer.max_grad_norm": 1.0,
    "setup.precision": "auto",
    "setup.seed": 0,
    "setup.actor_lora": None,
    "setup.critic_lora": None,
    "setup.sharing.world": ALONE,
    "setup.sharing.zero_stage.actor": 0,
    "setup.sharing.zero_stage.critic": 0,
    "setup.sharing.zero_stage.reference": 0,
    "setup.sharing.zero_stage.reward_model": 0,
    "setup.sharing.offload.models": [],
    "setup.sharing.tensor_parallel.generation": 1,
    "setup.sharing.tensor_parallel.training": 1,
    "accumulation": (1, 1),
    "accumulation_with_text": (2, 1),
}
"""The published script's own numbers: without a flag, nothing else is trained with."""


def adapters(rank: int, *, layers: list[str]) -> LoraConfig:
    names = [
        f"decoder.layers.{i}.{name}"
        for i in range(2)
        for name in (
            *(f"self_attn.{letter}" for letter in ("k_proj", "v_proj", "q_proj", "out_proj")),
            "fc1",
            "fc2",
        )
    ]
    chosen = tuple(name for name in names if any(layer in name for layer in layers))
    return LoraConfig(rank=rank, alpha=1.0, target_modules=chosen)


EVERY = [""]

CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"actor_learning_rate": 3e-4}, {"ppo.actor_optimizer.learning_rate": 3e-4}),
    ({"critic_learning_rate": 4e-4}, {"ppo.critic_optimizer.learning_rate": 4e-4}),
    ({"actor_weight_decay": 0.3}, {"ppo.actor_optimizer.weight_decay": 0.3}),
    ({"critic_weight_decay": 0.4}, {"ppo.critic_optimizer.weight_decay": 0.4}),
    ({"actor_lora_learning_rate": 1e-2}, {}),
    (
        {"actor_lora_dim": 4, "actor_lora_learning_rate": 1e-2, "actor_learning_rate": 1.0},
        {"setup.actor_lora": adapters(4, layers=EVERY), "ppo.actor_optimizer.learning_rate": 1e-2},
    ),
    (
        {"critic_lora_dim": 8, "critic_lora_learning_rate": 2e-2, "only_optimize_lora": True},
        {"setup.critic_lora": adapters(8, layers=EVERY), "ppo.critic_optimizer.learning_rate": 2e-2},
    ),
    (
        {"actor_lora_dim": 4, "actor_lora_module_name": "self_attn", "critic_lora_module_name": "fc"},
        {"setup.actor_lora": adapters(4, layers=["self_attn"])},
    ),
    (
        {"critic_lora_dim": 4, "actor_lora_module_name": "self_attn", "critic_lora_module_name": "fc"},
        {"setup.critic_lora": adapters(4, layers=["fc"])},
    ),
    (
        {"lr_scheduler_type": SchedulerType.LINEAR},
        {"ppo.actor_optimizer.schedule": "linear", "ppo.critic_optimizer.schedule": "linear"},
    ),
    (
        {"lr_scheduler_type": "constant_with_warmup", "num_warmup_steps": 7},
        {
            "ppo.actor_optimizer.schedule": "constant",
            "ppo.critic_optimizer.schedule": "constant",
            "ppo.actor_optimizer.warmup_steps": 7,
            "ppo.critic_optimizer.warmup_steps": 7,
        },
    ),
    ({"max_answer_seq_len": 99}, {"ppo.sampling.max_new_tokens": 99}),
    ({"ppo_epochs": 3}, {"ppo.ppo_epochs": 3}),
    ({"actor_gradient_checkpointing": True}, {"ppo.activation_checkpointing": True}),
    ({"critic_gradient_checkpointing": True}, {"ppo.activation_checkpointing": True}),
    ({"dtype": "bf16"}, {"setup.precision": "bf16"}),
    ({"seed": 17}, {"setup.seed": 17}),
    ({"seed": None}, {}),
    ({"gradient_accumulation_steps": 3}, {"accumulation": (3, 3), "accumulation_with_text": (6, 3)}),
    (
        {"gradient_accumulation_steps": 3, "gradient_accumulation_steps_actor": 5},
        {"accumulation": (5, 3), "accumulation_with_text": (5, 3)},
    ),
    ({"actor_zero_stage": 2}, {"setup.sharing.zero_stage.actor": 2}),
    ({"critic_zero_stage": 1}, {"setup.sharing.zero_stage.critic": 1}),
    (
        {"actor_zero_stage": 3},
        {"setup.sharing.zero_stage.actor": 3, "setup.sharing.zero_stage.reference": 3},
    ),
    (
        {"critic_zero_stage": 3},
        {"setup.sharing.zero_stage.critic": 3, "setup.sharing.zero_stage.reward_model": 3},
    ),
    (
        {"offload": True, "actor_zero_stage": 1, "critic_zero_stage": 2},
        {
            "setup.sharing.offload.models": ["actor", "critic"],
            "setup.sharing.zero_stage.actor": 1,
            "setup.sharing.zero_stage.critic": 2,
        },
    ),
    (
        {"offload_reference_model": True, "actor_zero_stage": 3},
        {
            "setup.sharing.offload.models": ["reference"],
            "setup.sharing.zero_stage.actor": 3,
            "setup.sharing.zero_stage.reference": 3,
        },
    ),
    (
        {"offload_reward_model": True, "critic_zero_stage": 3},
        {
            "setup.sharing.offload.models": ["reward_model"],
            "setup.sharing.zero_stage.critic": 3,
            "setup.sharing.zero_stage.reward_model": 3,
        },
    ),
    ({"inference_tp_size": 2, "actor_zero_stage": 0}, {"setup.sharing.tensor_parallel.generation": 2}),
    ({"actor_dropout": 0.0, "critic_dropout": None, "align_overflow": True, "compute_fp32_loss": True}, {}),
]
"""Flags, and all that they change."""


@pytest.mark.parametrize(("flags", "changed"), CHANGES, ids=lambda given: " ".join(given) or "nothing")
def test_a_flag_changes_its_settings_and_no_others(flags: dict[str, Any], changed: dict[str, Any]) -> None:
    settings = settings_of(**flags)
    assert {path: value_at(path)(settings) for path in UNTOUCHED} == UNTOUCHED | changed


def test_the_default_scope_means_all_layers_where_it_is_in_no_name() -> None:
    args = Namespace(actor_lora_dim=2, actor_lora_module_name="decoder.layers.")
    setup = setup_from(args, ALONE, {"actor": tiny_model("llama"), "critic": None})
    assert setup.actor_lora == LoraConfig(rank=2, alpha=1.0, target_modules="all-linear")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"lr_scheduler_type": "polynomial"}, "--lr_scheduler_type = polynomial", "cosine, linear"),
    ({"lr_scheduler_type": SchedulerType.COSINE_WITH_RESTARTS}, "cosine_with_restarts", "cosine, linear"),
    ({"actor_dropout": 0.1}, "--actor_dropout = 0.1", "leave out --actor_dropout"),
    ({"critic_dropout": 0.2}, "--critic_dropout = 0.2", "leave out --critic_dropout"),
    ({"enable_mixed_precision_lora": True}, "--enable_mixed_precision_lora", "actor_zero_stage 3"),
    ({"align_overflow": True, "dtype": "fp16"}, "--align_overflow", "bf16"),
    ({"deepspeed_config": "ds.json"}, "--deepspeed_config = ds.json", "flags of main.py"),
    ({"offload": True, "actor_zero_stage": 2}, "--offload with --critic_zero_stage 0", "1, 2 or 3"),
    ({"offload": True, "critic_zero_stage": 2}, "--offload with --actor_zero_stage 0", "1, 2 or 3"),
    (
        {"offload_reference_model": True, "actor_zero_stage": 2},
        "--offload_reference_model with --actor_zero_stage 2",
        "set --actor_zero_stage to 3",
    ),
    (
        {"offload_reward_model": True, "critic_zero_stage": 1},
        "--offload_reward_model with --critic_zero_stage 1",
        "set --critic_zero_stage to 3",
    ),
    (
        {"actor_lora_dim": 4, "actor_lora_module_name": "blocks."},
        "--actor_lora_module_name = 'blocks.'",
        "model.decoder.layers.0",
    ),
    (
        {"critic_lora_dim": 4, "critic_lora_module_name": "blocks."},
        "--critic_lora_module_name = 'blocks.'",
        "decoder.layers.0",
    ),
]


@pytest.mark.parametrize(("flags", "told", "hint"), REFUSED, ids=lambda given: str(given)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(flags: dict[str, Any], told: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(**flags)
    assert told in str(caught.value)
    assert hint in str(caught.value.hint)
