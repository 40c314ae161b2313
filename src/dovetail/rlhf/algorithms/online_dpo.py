"""Online DPO: the actor's best answer to a prompt is preferred to its worst (Guo et al. 2024, arXiv:2402.04792).

Responsible for: pairs from the rewards of a rollout, and DPO's loss on them as a method of the engine.
Not responsible for: the equations (maths/groups.py, maths/preference.py), DPO on given comparisons (stages/dpo.py).

    L = -mean over pairs of log sigmoid(beta (log p(y_w)/p_ref(y_w) - log p(y_l)/p_ref(y_l)))

beta is ppo.kl_coefficient, the KL's weight in the objective that the loss stands for: reward - beta KL(p || p_ref).
The log-ratios are of the actor as it is now, so there is no older policy and no weight for what was drawn.

Shapes: T packed tokens, S sequences.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dovetail.batches import Experience, Groups
from dovetail.config.stages import PpoConfig
from dovetail.maths.groups import best_of_groups, over_tokens_of_sequences, pair_loss, token_weights
from dovetail.maths.masked import zero_outside
from dovetail.maths.ppo import PolicyLoss
from dovetail.rlhf.algorithms.group import WithoutCritic
from dovetail.rlhf.algorithms.protocol import Advantages, Scored, keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineDpo(WithoutCritic):
    """DPO's loss on the best and the worst answer to each prompt."""

    needs_old_logprobs: bool = False
    kl_in_reward: bool = False

    def kl_weight(self, config: PpoConfig) -> float:
        return config.kl_coefficient

    def advantages(self, scored: Scored, config: PpoConfig) -> Advantages:
        """Return 1 for the tokens of the best answer and -1 for those of the worst; equal answers are no pair."""
        rollout, size, found = scored.rollout, self.answers_per_prompt, self.compared(scored, config)
        may_learn_S = torch.tensor(found.learnt.target_counts, device=found.rewards_S.device) > 0
        best_S = best_of_groups(found.rewards_S, may_learn_S, size)
        worst_S = best_of_groups(-found.rewards_S, may_learn_S, size)
        sign_S = best_S.float() - worst_S.float()  # 0 where all are equal: the first is best and worst
        learnt = keeping(found.learnt, sign_S != 0)
        sign_T = over_tokens_of_sequences(sign_S, rollout.cu_seqlens_S1, rollout.num_tokens)
        return Advantages(learnt=learnt, advantages_T=zero_outside(sign_T, learnt.mask_T), stats=found.stats)

    def prepared(self, minibatch: Experience, config: PpoConfig) -> Groups:
        """Keep the two answers of a pair, which are what is left of each prompt, in one micro-batch."""
        weights_T = token_weights(
            minibatch.mask_T,
            minibatch.cu_seqlens_S1,
            aggregation="sequence_mean",
            max_tokens=config.sampling.max_new_tokens,
        )
        return Groups(replace(minibatch, weights_T=weights_T), 2)

    def loss(
        self, logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, micro: Experience, config: PpoConfig
    ) -> PolicyLoss:
        assert micro.weights_T is not None
        return pair_loss(
            logprobs_T,
            micro.reference_logprobs_T,
            advantages_T,
            micro.weights_T,
            micro.mask_T,
            micro.cu_seqlens_S1,
            beta=config.kl_coefficient,
        )
