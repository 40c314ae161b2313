"""What actor and critic learn is the trainer's methods and numbers, as its users override and set them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail.rlhf.compat.deepspeed_chat import (
    DeepSpeedPPOTrainer,
)
from tests.rlhf.compat.tiny import arguments, prompt_batch, same, tiny, trainer_of, weights
from tests.tolerance import assert_near

NUMBERS = {
    "kl_ctl": 0.7,
    "clip_reward_value": 0.4,
    "cliprange": 0.01,
    "cliprange_value": 0.02,
    "gamma": 0.8,
    "lam": 0.6,
}
"""Each far from what the predecessor sets."""


def answer_columns(out: dict[str, Tensor], row: int) -> list[int]:
    """The columns that speak of tokens of the answer."""
    width = out["prompts"].shape[1]
    return [t - 1 for t in range(width, out["input_ids"].shape[1]) if out["attention_mask"][row, t]]


def expected_objective(out: dict[str, Tensor], numbers: dict[str, float]) -> tuple[Any, Any, Any]:
    """Rewards, normalised advantages and returns of each row's answer, from the definitions."""
    scores = out["rewards"].double().tolist()
    all_rewards, all_advantages, all_returns = [], [], []
    for row, score in enumerate(scores):
        columns = answer_columns(out, row)
        worth = score if out["finished"][row] else min(scores) - 1
        ratio = (out["logprobs"] - out["ref_logprobs"])[row].double().tolist()
        rewards = [-numbers["kl_ctl"] * ratio[c] for c in columns]
        rewards[-1] += max(-numbers["clip_reward_value"], min(numbers["clip_reward_value"], worth))
        values = [out["value"][row, c].item() for c in columns]
        advantages, ahead, next_value = [], 0.0, 0.0
        for reward, value in zip(reversed(rewards), reversed(values), strict=True):
            ahead = reward + numbers["gamma"] * next_value - value + numbers["gamma"] * numbers["lam"] * ahead
            next_value = value
            advantages.insert(0, ahead)
        all_rewards.append(rewards)
        all_advantages.append(advantages)
        all_returns.append([a + v for a, v in zip(advantages, values, strict=True)])
    flat = [a for row in all_advantages for a in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    return all_rewards, [[(a - mean) / std for a in row] for row in all_advantages], all_returns


def test_the_numbers_that_are_set_on_the_trainer_are_those_of_the_objective() -> None:
    trainer = trainer_of(ppo_epochs=1)
    batch = prompt_batch(trainer.rlhf_engine)
    trainer.train_rlhf(trainer.generate_experience(batch))  # the actor is no longer its reference
    for name, value in NUMBERS.items():
        setattr(trainer, name, value)
    out = trainer.generate_experience(batch)
    for name, expected in zip(
        ("token_rewards", "advantages", "returns"), expected_objective(out, NUMBERS), strict=True
    ):
        for row, numbers in enumerate(expected):
            assert_near(out[name][row, answer_columns(out, row)], numbers, dtype=torch.float32)

    trainer.train_rlhf(out)  # moves the policy far from where the rollout began
    experience, roles = trainer._packed(out), trainer.engine.roles
    mask_T = experience.mask_T
    ratio_A = (roles.actor_logprobs(experience, temperature=1.0).logprobs_T - experience.old_logprobs_T)[
        mask_T
    ]
    value_A, old_A = roles.values(experience)[mask_T], experience.old_values_T[mask_T]
    surrogates, errors = [], []
    for log_ratio, advantage, value, old, target in zip(
        ratio_A.tolist(), experience.advantages_T[mask_T].tolist(), value_A.tolist(), old_A.tolist(),
        experience.returns_T[mask_T].tolist(), strict=True,
    ):  # fmt: skip
        ratio = math.exp(log_ratio)
        surrogates.append(max(-advantage * ratio, -advantage * min(max(ratio, 0.99), 1.01)))
        near = min(max(value, old - 0.02), old + 0.02)
        errors.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
    actor_loss, critic_loss = trainer.train_rlhf(out)
    assert_near(actor_loss, sum(surrogates) / len(surrogates), dtype=torch.float32)
    assert_near(critic_loss, sum(errors) / len(errors), dtype=torch.float32)


def test_the_predecessor_s_numbers_are_the_default() -> None:
    trainer = trainer_of()
    found = {name: getattr(trainer, name) for name in NUMBERS}
    assert found == {
        "kl_ctl": 0.1, "clip_reward_value": 5.0, "cliprange": 0.2, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
    }  # fmt: skip


def test_compute_rewards_of_a_subclass_decides_what_is_learned() -> None:
    class Longest(DeepSpeedPPOTrainer):
        def compute_rewards(
            self,
            prompts: Tensor,
            log_probs: Tensor,
            ref_log_probs: Tensor,
            reward_score: Tensor,
            action_mask: Tensor,
        ) -> Tensor:
            assert log_probs.shape == ref_log_probs.shape == action_mask.shape
            assert reward_score.shape == (len(prompts),)
            return torch.ones_like(log_probs)

    args = arguments()
    trainer = Longest(tiny(args), args)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    undiscounted = out["returns"][0, answer_columns(out, 0)]
    value = out["value"][0, answer_columns(out, 0)[-1]]
    assert undiscounted[-1].item() == pytest.approx(1.0)
    assert torch.equal(out["token_rewards"], torch.ones_like(out["logprobs"]))
    assert value != 1.0


def test_get_advantages_and_returns_of_a_subclass_is_used() -> None:
    class Returns(DeepSpeedPPOTrainer):
        def get_advantages_and_returns(
            self, values: Tensor, rewards: Tensor, start: int
        ) -> tuple[Tensor, Tensor]:
            ahead = rewards[:, start:].flip(1).cumsum(1).flip(1)
            return ahead, ahead

    args = arguments()
    trainer = Returns(tiny(args), args)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    for row in range(len(out["rewards"])):
        columns = answer_columns(out, row)
        total = out["token_rewards"][row, columns].sum().item()
        assert out["returns"][row, columns[0]].item() == pytest.approx(total, abs=1e-5)


def test_a_loss_of_a_subclass_is_what_its_role_learns() -> None:
    seen: list[tuple[Any, ...]] = []

    class Still(DeepSpeedPPOTrainer):
        def actor_loss_fn(
            self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
        ) -> Tensor:
            seen.append((logprobs.shape, old_logprobs.shape, advantages.shape, mask.shape, mask.sum().item()))
            return 0.0 * logprobs.sum()

    args = arguments()
    trainer = Still(tiny(args), args)
    actor, critic = trainer.engine.roles.actor, trainer.engine.roles.critic
    before = weights(actor), weights(critic)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    actor_loss, _ = trainer.train_rlhf(out)
    assert actor_loss.item() == 0.0
    assert same(before[0], weights(actor))
    assert not same(before[1], weights(critic))
    lengths = [len(answer_columns(out, row)) for row in range(len(out["rewards"]))]
    assert {shape for *shapes, _ in seen for shape in shapes} == {(len(lengths), max(lengths))}
    assert seen[0][-1] == sum(lengths)


def test_a_function_put_on_the_trainer_is_used_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    critic = trainer.engine.roles.critic
    before = weights(critic)
    monkeypatch.setattr(trainer, "critic_loss_fn", lambda values, *_: 0.0 * values.sum())
    trainer.train_rlhf(trainer.generate_experience(prompt_batch(trainer.rlhf_engine)))
    assert same(before, weights(critic))


@pytest.mark.parametrize("loss", [lambda *_: torch.zeros(3), lambda *_: 0.5], ids=["a row", "no tensor"])
def test_a_loss_that_is_no_number_is_refused_by_name(loss: Callable[..., Any]) -> None:
    trainer = trainer_of()
    trainer.critic_loss_fn = loss  # type: ignore[method-assign]
    loss.__name__ = "critic_loss_fn"
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    with pytest.raises(ConfigError, match="critic_loss_fn returned"):
        trainer.train_rlhf(out)


def test_rewards_of_another_shape_are_refused_by_name() -> None:
    trainer = trainer_of()
    trainer.compute_rewards = lambda *_: torch.zeros(2)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"compute_rewards returned a tensor of shape \(2,\)"):
        trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
