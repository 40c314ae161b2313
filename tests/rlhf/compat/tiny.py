"""Tiny engines, flags and prompts for the tests of compat."""

from argparse import Namespace
from typing import Any

import torch

from dovetail.rlhf.compat.deepspeed_chat import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import PROMPTS, tiny_reward_model


def arguments(**changes: object) -> Namespace:
    """What the predecessor's `parse_args` gives, as far as it matters here."""
    given = {
        "max_answer_seq_len": 8,
        "max_prompt_seq_len": 64,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "actor_weight_decay": 0.0,
        "critic_weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "num_warmup_steps": 0,
        "ppo_epochs": 2,
        "enable_ema": True,
        "seed": 5,
        "dtype": "fp32",
        "actor_lora_dim": 0,
        "critic_lora_dim": 0,
        "generation_batches": 1,
        "per_device_training_batch_size": 3,
        "actor_zero_stage": 2,
        "unsup_coef": 0.5,
    }
    return Namespace(**{**given, **changes})


def tiny(args: Namespace, *, steps: int = 10, name: str = "llama") -> DeepSpeedRLHFEngine:
    """Actor, reference, critic and reward, all tiny."""
    return DeepSpeedRLHFEngine(
        actor_model_name_or_path=tiny_model(name),
        critic_model_name_or_path=tiny_reward_model(name),
        tokenizer=byte_tokenizer(),
        num_total_iters=steps,
        args=args,
    )


def prompt_batch(engine: DeepSpeedRLHFEngine, texts: list[str] = PROMPTS) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, as the predecessor's collator makes them."""
    chat, pad = engine.engine.roles.chat, engine.tokenizer.pad_token_id
    rows = [chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    width = max(map(len, rows))
    return {
        "prompt": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "prompt_att_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def trainer_of(**changes: Any) -> DeepSpeedPPOTrainer:
    """A trainer of a tiny engine, with these flags."""
    args = arguments(**changes)
    return DeepSpeedPPOTrainer(tiny(args), args)


def weights(model: Any) -> list[torch.Tensor]:
    """A copy of all weights."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether no weight differs by a bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
