"""Tiny engines for the tests of the RLHF API."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.rlhf import rollout
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rewards import Answer
from tests.fakes import TINY, byte_tokenizer, tiny_model

PROMPTS = ["Hi", "What is two plus two?", "Name a colour.", "Go on, tell me more about it", "x", "Why?"]


_ACTOR = OptimizerConfig(
    learning_rate=1e-2, schedule="linear", warmup_steps=3, final_fraction=0.25, weight_decay=0.3, betas=(0.7, 0.8),
    eps=1e-3, max_grad_norm=0.4,
)  # fmt: skip
_CRITIC = OptimizerConfig(
    learning_rate=3e-2, schedule="linear", warmup_steps=2, final_fraction=0.1, weight_decay=0.2, betas=(0.6, 0.9),
    eps=2e-3, max_grad_norm=0.7,
)  # fmt: skip
OFF_DEFAULT = {
    "batch_size": 9,
    "minibatches": 3,
    "ppo_epochs": 2,
    "sampling": SamplingConfig(temperature=0.7, max_new_tokens=9),
    "actor_optimizer": _ACTOR,
    "critic_optimizer": _CRITIC,
    "critic_warmup_rollouts": 0,
    "kl_coefficient": 0.3,
    "kl_target": 4.0,
    "ratio_clip": 0.1,
    "value_clip": 0.05,
    "importance_cap": 1.02,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "score_clip": 0.5,
    "missing_end_penalty": -0.7,
    "whiten_rewards": True,
    "ema_decay": 0.8,
    "ptx_coefficient": 0.6,
}
"""Settings of PPO that act on the weights, each off its default, so that one that is ignored shows."""


def tiny_config(**changes: object) -> PpoConfig:
    """Every number away from its default where a default would hide a mistake."""
    constant = OptimizerConfig(learning_rate=1e-3, schedule="constant")
    given = {
        "batch_size": len(PROMPTS),
        "sampling": SamplingConfig(temperature=0.7, max_new_tokens=12),
        "kl_coefficient": 0.1,
        "gae_lambda": 0.9,
        "score_clip": None,
        "missing_end_penalty": -1.0,
        "critic_warmup_rollouts": 0,
        "actor_optimizer": constant,
        "critic_optimizer": constant,
    }
    return PpoConfig(**{**given, **changes})


def tiny_reward_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model with one score."""
    config = TINY[name]()
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def tiny_engine(
    name: str = "llama",
    config: PpoConfig | None = None,
    dtype: torch.dtype = torch.float32,
    setup: Setup | None = None,
    total_steps: int = 10,
) -> RLHFEngine:
    """Actor, reference, critic and reward model, all tiny."""
    return RLHFEngine(
        actor_model=tiny_model(name, dtype=dtype),
        critic_model=tiny_reward_model(name, dtype),
        tokenizer=byte_tokenizer(),
        total_steps=total_steps,
        config=config or tiny_config(),
        setup=setup or Setup(device="cpu"),
    )


def end_often(model: Any) -> Any:
    """In some states the end of the turn is likely: some answers finish, others are cut off."""
    model.lm_head.weight.data[256] *= 2.5
    return model


def draw_from_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers claim log-probabilities up to 0.05 nats off, as if the generator were another policy."""

    def complete(*args: Any, **kwargs: Any) -> list[Answer]:
        rng = random.Random(5)
        return [
            replace(answer, logprobs=tuple(p + rng.uniform(-0.05, 0.05) for p in answer.logprobs))
            for answer in honest(*args, **kwargs)
        ]

    honest = rollout.complete
    monkeypatch.setattr(rollout, "complete", complete)
