"""PPO: advantages over a critic, and the clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, equation 7).

Responsible for: PPO as a method of the engine. Not responsible for: the critic's loss and warm-up (rlhf/update.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.batches import Experience, PackedBatch
from dovetail.config.stages import PpoConfig
from dovetail.maths.masked import cu_actions, normalise
from dovetail.maths.ppo import PolicyLoss, clipped_policy_loss, gae
from dovetail.model.forward import masked_index
from dovetail.rlhf.algorithms.protocol import Advantages, Scored


@dataclass(frozen=True, slots=True)
class Ppo:
    """PPO with a KL penalty in the reward (InstructGPT, section 3.5)."""

    answers_per_prompt: int = 1
    needs_critic: bool = True
    needs_old_logprobs: bool = True
    kl_in_reward: bool = True
    refill_rounds: int = 0

    def kl_weight(self, config: PpoConfig) -> float:
        return config.kl_coefficient

    def advantages(self, scored: Scored, config: PpoConfig) -> Advantages:
        """Return GAE over the actions alone, normalised over the rollout, and the critic's targets."""
        rollout, values_T = scored.learnt, scored.values_T
        assert values_T is not None
        advantages_T = gae_over_actions(
            rollout, scored.rewards_T, values_T, gamma=config.gamma, lam=config.gae_lambda
        )
        return Advantages(
            learnt=rollout,
            advantages_T=normalise(advantages_T, rollout.mask_T),
            returns_T=(advantages_T + values_T).masked_fill(~rollout.mask_T, 0.0),
        )

    def prepared(self, minibatch: Experience, config: PpoConfig) -> Experience:
        return minibatch

    def loss(
        self, logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, micro: Experience, config: PpoConfig
    ) -> PolicyLoss:
        return clipped_policy_loss(
            logprobs_T, old_T, advantages_T, micro.mask_T, clip=config.ratio_clip, dual_clip=config.dual_clip
        )


def gae_over_actions(
    batch: PackedBatch, rewards_T: Tensor, values_T: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Return `gae` of the marked tokens alone; float32 [T], 0 where the mask is False."""
    index_A = masked_index(batch)
    advantages_A = gae(
        rewards_T.index_select(0, index_A),
        values_T.index_select(0, index_A),
        cu_actions(batch.mask_T, batch.cu_seqlens_S1),
        gamma=gamma,
        lam=lam,
        longest=max(batch.target_counts),
    )
    return advantages_A.new_zeros(batch.num_tokens).index_copy(0, index_A, advantages_A)


def rewards_to_come(batch: PackedBatch, rewards_T: Tensor, *, gamma: float) -> Tensor:
    """G_t = sum_l gamma^l r_{t+l} over the actions to the end of the answer; float32 [T], 0 where the mask is False.

    It is the advantage over a critic that is 0 everywhere, with lambda = 1.
    """
    return gae_over_actions(batch, rewards_T, torch.zeros_like(rewards_T), gamma=gamma, lam=1.0)
