"""Whole PPO steps of models that do not read or answer the fast way, rollouts after an update among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    DeepseekV3Config,
    NemotronConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from dovetail.config.stages import SamplingConfig
from dovetail.model.plain_forward import plain_attention, plain_logits
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from tests.fakes import byte_tokenizer
from tests.rlhf.tiny import PROMPTS, tiny_config

SHAPE: dict[str, Any] = dict(
    vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.1, pad_token_id=257, bos_token_id=None, eos_token_id=256,
)  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "packed in training, padded in rollouts": DeepseekV3Config(
        **SHAPE, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    ),
    "padded in both": NemotronConfig(**SHAPE, num_key_value_heads=2),
    "a window in the mask": Qwen2MoeConfig(
        **SHAPE, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, use_sliding_window=True, sliding_window=8, max_window_layers=2,
    ),
    "attention of its own": BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


def engine_of(config: PreTrainedConfig) -> RLHFEngine:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actor = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        config.num_labels = 1
        reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return RLHFEngine(
        actor_model=actor,
        critic_model=reward,
        tokenizer=byte_tokenizer(),
        total_steps=10,
        config=tiny_config(sampling=SamplingConfig(temperature=1.0, max_new_tokens=8)),
        setup=Setup(device="cpu"),
    )


@pytest.mark.filterwarnings("ignore:.*(padded|one text at a time)")
@pytest.mark.parametrize("name", CONFIGS)
def test_rollouts_before_and_after_updates_are_drawn_from_the_models_own_forward(name: str) -> None:
    engine = engine_of(CONFIGS[name])
    trainer = PPOTrainer(engine)
    for _ in range(3):
        actor = engine.roles.engine.model
        for answer in engine.generate(PROMPTS, seed=0):
            with torch.no_grad(), plain_attention(actor):
                logits_AV = plain_logits(actor, [*answer.prompt_ids, *answer.answer_ids])[
                    len(answer.prompt_ids) - 1 : -1
                ]
            ids_A1 = torch.tensor(answer.answer_ids)[:, None]
            wanted = logits_AV.log_softmax(-1).gather(1, ids_A1)[:, 0]
            torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=1e-4, rtol=1e-4)
        trainer.train_rlhf(trainer.generate_experience(PROMPTS))
