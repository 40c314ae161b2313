"""Tiny engines for the tests of the RLHF API."""

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from tests.fakes import TINY, byte_tokenizer, tiny_model

PROMPTS = ["Hi", "What is two plus two?", "Name a colour.", "Go on, tell me more about it", "x", "Why?"]


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
