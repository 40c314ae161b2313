"""PPO: advantages from a critic, and the clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, equation 7).

Responsible for: PPO as a method of the engine. Not responsible for: the critic's loss and warm-up (rlhf/update.py).
"""

from dataclasses import dataclass

from torch import Tensor

from dovetail.batches import Experience
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
    kl_in_reward: bool = True

    def kl_weight(self, config: PpoConfig) -> float:
        return config.kl_coefficient

    def advantages(self, scored: Scored, config: PpoConfig) -> Advantages:
        """Return GAE over the actions alone, normalised over the rollout, and the critic's targets."""
        rollout, values_T = scored.learnt, scored.values_T
        assert values_T is not None
        mask_T, index_A = rollout.mask_T, masked_index(rollout)
        advantages_A = gae(
            scored.rewards_T.index_select(0, index_A),
            values_T.index_select(0, index_A),
            cu_actions(mask_T, rollout.cu_seqlens_S1),
            gamma=config.gamma,
            lam=config.gae_lambda,
            longest=max(rollout.target_counts),
        )
        advantages_T = advantages_A.new_zeros(rollout.num_tokens).index_copy(0, index_A, advantages_A)
        return Advantages(
            learnt=rollout,
            advantages_T=normalise(advantages_T, mask_T),
            returns_T=(advantages_T + values_T).masked_fill(~mask_T, 0.0),
        )

    def prepared(self, minibatch: Experience, config: PpoConfig) -> Experience:
        return minibatch

    def loss(
        self, logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, micro: Experience, config: PpoConfig
    ) -> PolicyLoss:
        return clipped_policy_loss(
            logprobs_T, old_T, advantages_T, micro.mask_T, clip=config.ratio_clip, dual_clip=config.dual_clip
        )
