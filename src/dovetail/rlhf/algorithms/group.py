"""Methods without a critic: several answers to each prompt, whose rewards are compared with each other.

Responsible for: putting the equations of maths/groups.py together by the settings of a method (config/policy.py).
Not responsible for: the equations, the defaults of each method.

    grpo            Shao et al. 2024, arXiv:2402.03300: A = (R - mean) / std, mean over answers of means over tokens
    dr_grpo         Liu et al. 2025, arXiv:2503.20783: A = R - mean, mean over answers of a constant length
    dapo            Yu et al. 2025, arXiv:2503.14476: GRPO with a wider upper bound and a mean over tokens; groups of
                    equal rewards are left out
    gspo            Zheng et al. 2025, arXiv:2507.18071: GRPO with one ratio for each answer
    cispo           MiniMax 2025, arXiv:2506.13585: GRPO's advantages on a clipped weight times log p
    rloo            Ahmadian et al. 2024, arXiv:2402.14740: A = R - mean of the others; the sum over an answer's tokens
    reinforce_plus_plus
                    Hu 2025, arXiv:2501.03262: rewards to come, normalised over all actions of the rollout;
                    `_baseline`: of R - mean of the group

Shapes: T packed tokens, S sequences.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dovetail.batches import Experience, Rollout, moved
from dovetail.config.stages import PpoConfig
from dovetail.maths.groups import (
    Aggregation,
    clipped_weight_loss,
    group_advantages,
    kl_loss,
    leave_one_out_advantages,
    over_tokens_of_sequences,
    overlong_penalty,
    sequence_ratio_loss,
    token_weights,
)
from dovetail.maths.masked import normalise, sums_of_sequences, zero_outside
from dovetail.maths.ppo import PolicyLoss, clipped_policy_loss
from dovetail.rlhf.algorithms.ppo import rewards_to_come
from dovetail.rlhf.algorithms.protocol import Advantages, Scored, keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The rewards of a rollout, by token and by answer, and the answers that may be learnt from."""

    learnt: Rollout
    rewards_T: Tensor
    rewards_S: Tensor
    stats: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutCritic:
    """The part that all methods without a critic share."""

    answers_per_prompt: int
    drop_equal_groups: bool = False
    overlong_tokens: int
    refill_rounds: int = 0

    @property
    def needs_critic(self) -> bool:
        return False

    @property
    def compares_answers(self) -> bool:
        """Return whether a single answer to a prompt would teach nothing."""
        return True

    def compared(self, scored: Scored, config: PpoConfig) -> Compared:
        """Return the rewards, and the answers without those of equal groups if the method leaves them out."""
        rollout, learnt, size = scored.rollout, scored.learnt, self.answers_per_prompt
        rewards_T = self._with_overlong_penalty(scored, config)
        rewards_S = sums_of_sequences(rewards_T, rollout.mask_T, rollout.cu_seqlens_S1)
        rewards_GN = rewards_S.view(-1, size)
        is_equal_G = (rewards_GN == rewards_GN[:, :1]).all(1)
        if self.drop_equal_groups:
            learnt = keeping(learnt, ~is_equal_G.repeat_interleave(size))
        stats = {"ppo/equal_groups_fraction": float(is_equal_G.float().mean())} if size > 1 else {}
        return Compared(learnt=learnt, rewards_T=rewards_T, rewards_S=rewards_S, stats=stats)

    def _with_overlong_penalty(self, scored: Scored, config: PpoConfig) -> Tensor:
        if not self.overlong_tokens:
            return scored.rewards_T
        rollout, mask_T = scored.rollout, scored.rollout.mask_T
        lengths_S = sums_of_sequences(mask_T.float(), mask_T, rollout.cu_seqlens_S1)
        limit = config.sampling.max_new_tokens
        penalty_S = overlong_penalty(lengths_S, limit=limit, buffer=self.overlong_tokens)
        return scored.rewards_T.index_add(0, rollout.last_index_S(), penalty_S.to(scored.rewards_T.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMethod(WithoutCritic):
    """A policy gradient without a critic, by its parts."""

    advantages_by: Literal["group_std", "group_mean", "leave_one_out", "batch", "batch_of_groups"]
    ratio: Literal["token", "sequence", "weight"]
    """The clipped ratio: of each token, of each sequence, or a constant weight of the token's gradient."""
    clip: tuple[float, float]
    aggregation: Aggregation
    kl: Literal["none", "reward", "k2", "k3"]

    @property
    def compares_answers(self) -> bool:
        return self.advantages_by != "batch"

    @property
    def needs_old_logprobs(self) -> bool:
        return True

    @property
    def kl_in_reward(self) -> bool:
        return self.kl == "reward"

    def kl_weight(self, config: PpoConfig) -> float:
        return 0.0 if self.kl == "none" else config.kl_coefficient

    def advantages(self, scored: Scored, config: PpoConfig) -> Advantages:
        rollout, size, found = scored.rollout, self.answers_per_prompt, self.compared(scored, config)
        learnt = found.learnt
        if self.advantages_by == "batch":
            # Hu 2025 (REINFORCE++, arXiv:2501.03262), equation 8
            to_come_T = rewards_to_come(rollout, found.rewards_T, gamma=1.0)
            normal_T = normalise(to_come_T, learnt.mask_T)
            return Advantages(learnt=learnt, advantages_T=normal_T, stats=found.stats)
        if self.advantages_by == "leave_one_out":
            advantages_S = leave_one_out_advantages(found.rewards_S, size)
        else:
            by_std = self.advantages_by == "group_std"
            advantages_S = group_advantages(found.rewards_S, size, divides_by_std=by_std)
        if self.advantages_by == "batch_of_groups":
            # Over answers: over tokens one long answer would decide mean and deviation.
            is_learnt_S = torch.tensor([count > 0 for count in learnt.target_counts])
            advantages_S = normalise(advantages_S, moved(is_learnt_S, advantages_S.device))
        placed_T = over_tokens_of_sequences(advantages_S, rollout.cu_seqlens_S1, rollout.num_tokens)
        advantages_T = zero_outside(placed_T, learnt.mask_T)
        return Advantages(learnt=learnt, advantages_T=advantages_T, stats=found.stats)

    def prepared(self, minibatch: Experience, config: PpoConfig) -> Experience:
        weights_T = token_weights(
            minibatch.mask_T,
            minibatch.cu_seqlens_S1,
            aggregation=self.aggregation,
            max_tokens=config.sampling.max_new_tokens,
        )
        return replace(minibatch, weights_T=weights_T)

    def loss(
        self, logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, micro: Experience, config: PpoConfig
    ) -> PolicyLoss:
        weights_T, mask_T = micro.weights_T, micro.mask_T
        assert weights_T is not None
        # Weights are not negative, so they may join the advantages within any maximum.
        loss = self._surrogate(logprobs_T, old_T, advantages_T * weights_T, micro, config.dual_clip)
        if self.kl == "none" or self.kl == "reward":
            return loss
        kl = kl_loss(logprobs_T, micro.reference_logprobs_T, weights_T, mask_T, estimator=self.kl)
        return replace(loss, total=loss.total + config.kl_coefficient * kl)

    def _surrogate(
        self,
        logprobs_T: Tensor,
        old_T: Tensor,
        advantages_T: Tensor,
        micro: Experience,
        dual_clip: float | None,
    ) -> PolicyLoss:
        columns, mask_T = (logprobs_T, old_T, advantages_T), micro.mask_T
        if self.ratio == "sequence":
            bounds_S1 = micro.cu_seqlens_S1
            return sequence_ratio_loss(*columns, mask_T, bounds_S1, clip=self.clip, dual_clip=dual_clip)
        if self.ratio == "weight":
            return clipped_weight_loss(*columns, mask_T, clip=self.clip)
        low, high = self.clip
        return clipped_policy_loss(*columns, mask_T, clip=low, clip_high=high, dual_clip=dual_clip)
