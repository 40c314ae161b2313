"""What is drawn at random follows from the run's seed, and nothing is drawn twice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.config.model import LoraConfig
from dovetail.rlhf.api import RLHFEngine, prompt_of
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rollout import collect
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import tiny_config, tiny_engine

LORA = LoraConfig(rank=2, alpha=4.0)


def test_every_run_rollout_and_answer_draws_from_a_seed_of_its_own() -> None:
    engine = tiny_engine()
    prompts = [prompt_of("Hi")] * 3

    def answers(seed: int, iteration: int) -> list[tuple[int, ...]]:
        collected = collect(
            prompts,
            engine.roles,
            engine.config,
            kl_coefficient=0.1,
            iteration=iteration,
            seed=seed,
            with_old_logprobs=True,
        )
        return [answer.answer_ids for answer in collected.answers]

    drawn = [answers(0, 0), answers(0, 1), answers(1, 0)]
    assert len({ids for rollout in drawn for ids in rollout}) == 9
    assert answers(0, 1) == drawn[1]


def adapters_of(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if ".lora_A." in name}


def test_adapters_follow_from_the_seed_and_differ_between_actor_and_critic() -> None:
    drawn: list[list[dict[str, Tensor]]] = []
    for seed in (0, 1, 0):
        setup = Setup(device="cpu", seed=seed, actor_lora=LORA, critic_lora=LORA)
        roles = tiny_engine("llama", setup=setup).roles
        drawn.append([adapters_of(roles.actor), adapters_of(roles.critic)])
    for name, weight in drawn[0][0].items():
        assert not torch.equal(weight, drawn[1][0][name])
        assert torch.equal(weight, drawn[2][0][name])
        assert not torch.equal(weight, drawn[0][1][name])


@pytest.mark.parametrize("seed", [0, 3])
def test_a_critic_without_a_reward_model_is_the_actor_under_a_head_of_the_runs_seed(seed: int) -> None:
    engine = RLHFEngine(
        actor_model=tiny_model(),
        tokenizer=byte_tokenizer(),
        total_steps=1,
        config=tiny_config(),
        reward=lambda answers: [0.0 for _ in answers],
        setup=Setup(device="cpu", seed=seed),
    )
    critic, actor = engine.roles.critic, engine.roles.actor
    width = critic.config.hidden_size
    head = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * (width + 1) ** -0.5
    torch.testing.assert_close(critic.score.weight.detach(), head)
    for name, weight in critic.base_model.named_parameters():
        other = actor.base_model.get_parameter(name)
        assert torch.equal(weight, other)
        assert weight.data_ptr() != other.data_ptr()
