"""PPO's objective as methods and numbers that users of DeepSpeed-Chat override and set.

Responsible for: `Objective`: rewards, advantages and the two losses over padded rows, and how they become what the
gradient step adds up.
Not responsible for: the equations (maths/), sampling, scoring and steps (trainer.py).

Shapes: B sequences, L padded tokens, W longest answer, S sequences of a micro-batch, T packed tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import Experience, SummedLoss
from dovetail.config.stages import PpoConfig
from dovetail.errors import ConfigError
from dovetail.maths.masked import normalise
from dovetail.maths.ppo import (
    clip_scores,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    per_token_rewards,
    replace_missing_end,
)
from dovetail.rlhf.compat.padding import answers_of, is_action


class Objective:
    """The rewards, advantages and losses of PPO. Its numbers are read at every call and may be set at any time."""

    def __init__(self, config: PpoConfig) -> None:
        self.missing_end_penalty = config.missing_end_penalty
        self.kl_ctl = config.kl_coefficient
        self.clip_reward_value = config.score_clip
        self.cliprange = config.ratio_clip
        self.cliprange_value = config.value_clip
        self.gamma = config.gamma
        self.lam = config.gae_lambda

    def compute_rewards(
        self,
        prompts: Tensor,
        log_probs: Tensor,
        ref_log_probs: Tensor,
        reward_score: Tensor,
        action_mask: Tensor,
    ) -> Tensor:
        """Return the reward of each token, [B, L - 1]: the clipped score at the last one, minus the KL penalty.

        reward_score: 1 below the lowest for answers that were cut off.
        """
        counts = is_action(prompts, action_mask)
        num_rows, width = counts.shape
        last_B = width - 1 - counts.flip(1).long().argmax(dim=1)
        rewards = per_token_rewards(
            log_probs.flatten(),
            ref_log_probs.flatten(),
            clip_scores(reward_score, self.clip_reward_value),
            counts.flatten(),
            last_B + width * torch.arange(num_rows, device=counts.device),
            kl_coefficient=self.kl_ctl,
        )
        return rewards.view(num_rows, width)

    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Return GAE and the critic's targets, [B, L - 1 - start]; values and rewards are 0 behind each answer."""
        values, rewards = values[:, start:], rewards[:, start:]
        num_rows, width = values.shape
        advantages = gae(
            rewards.flatten(),
            values.flatten(),
            width * torch.arange(num_rows + 1, device=values.device),
            gamma=self.gamma,
            lam=self.lam,
            longest=width,
        ).view(num_rows, width)
        return advantages, advantages + values

    def actor_loss_fn(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the mean of PPO's clipped surrogate over the tokens with mask 1; everything is [S, W]."""
        loss = clipped_policy_loss(logprobs, old_logprobs, advantages, mask.bool(), clip=self.cliprange)
        return loss.total / loss.count

    def critic_loss_fn(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the clipped squared error over the tokens with mask 1; everything is [S, W]."""
        loss = clipped_value_loss(values, old_values, returns, mask.bool(), clip=self.cliprange_value)
        return loss.total / loss.count

    def with_advantages(self, scored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `token_rewards`, `advantages` (normalised over all rows) and `returns`, by the overridable methods."""
        prompts, action_mask = scored["prompts"], scored["attention_mask"][:, 1:]
        worth = replace_missing_end(scored["rewards"], scored["finished"], self.missing_end_penalty)
        rewards = self.compute_rewards(
            prompts, scored["logprobs"].clone(), scored["ref_logprobs"].clone(), worth, action_mask
        )
        expect_shape("compute_rewards", rewards, action_mask.shape)
        counts, start = is_action(prompts, action_mask), prompts.shape[1] - 1
        found = self.get_advantages_and_returns(
            scored["value"].masked_fill(~counts, 0.0), rewards.masked_fill(~counts, 0.0), start
        )
        columns = [torch.zeros(counts.shape) for _ in found]
        for column, part in zip(columns, found, strict=True):
            expect_shape("get_advantages_and_returns", part, counts[:, start:].shape)
            column[:, start:] = part
        advantages, returns = columns
        return scored | {
            "token_rewards": rewards,
            "advantages": normalise(advantages, counts),
            "returns": returns.masked_fill(~counts, 0.0),
        }


def summed(loss_fn: Callable[..., Any], micro: Experience, *columns_T: Tensor) -> SummedLoss:
    """Call a loss that is a mean over answer tokens, and return it as the sum that the gradient step adds up."""
    *columns, mask = answers_of(micro, *columns_T, torch.ones_like(micro.mask_T, dtype=torch.long))
    mean = loss_fn(*columns, mask)
    expect_shape(loss_fn.__name__, mean, ())
    count = micro.mask_T.sum()
    return SummedLoss(mean * count, count)


def expect_shape(name: str, found: Any, shape: tuple[int, ...]) -> None:
    """Raise ConfigError if an overridden method returned anything but a tensor of that shape."""
    if not isinstance(found, Tensor) or found.shape != shape:
        what = (
            f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        )
        raise ConfigError(
            f"{name} returned {what}",
            hint=f"return a tensor of shape {tuple(shape)}" if shape else "return one number, as a tensor",
        )
