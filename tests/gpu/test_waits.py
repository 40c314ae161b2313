"""On the device itself: how often a PPO step waits for it."""

import warnings
from collections.abc import Callable

import pytest
import torch

from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rollout import score_answers
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_reward_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def waits_of(work: Callable[[], object]) -> int:
    """How often the driver was asked to wait, by torch's own account."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 60])
@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 3)])
def test_a_ppo_step_waits_for_the_device_once_and_once_more_for_each_gradient_step(
    epochs: int, minibatches: int, micro_batch_tokens: int
) -> None:
    config = tiny_config(ppo_epochs=epochs, minibatches=minibatches, micro_batch_tokens=micro_batch_tokens)
    engine = RLHFEngine(
        actor_model=tiny_model("llama", dtype=torch.bfloat16).cuda(),
        critic_model=tiny_reward_model("llama", torch.bfloat16).cuda(),
        tokenizer=byte_tokenizer(),
        total_steps=100,
        config=config,
        setup=Setup(device="cuda"),
    )
    trainer = PPOTrainer(engine)
    trainer.update(trainer.generate_experience(PROMPTS))
    answers = engine.generate(PROMPTS, seed=1)
    collected = []

    def score() -> None:
        collected.append(
            score_answers(
                answers,
                engine.roles,
                config,
                kl_coefficient=0.1,
                with_old_logprobs=config.needs_old_logprobs(),
            )
        )

    assert waits_of(score) == 1
    assert waits_of(lambda: trainer.update(collected[0])) == 2 * epochs * minibatches
