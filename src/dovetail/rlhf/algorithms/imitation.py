"""Best-of-n and expert iteration: the actor imitates the better of its own answers.

Responsible for: picking the answers of a rollout by their rewards, and their cross-entropy as a method of the engine.
Not responsible for: the equations (maths/groups.py), the defaults (config/policy.py).

    best_of_n           Dong et al. 2023 (RAFT), arXiv:2304.06767: the best of n answers to each prompt
    expert_iteration    Anthony et al. 2017, arXiv:1705.08439, with a verifier as in Zelikman et al. 2022 (STaR),
                        arXiv:2203.14465, and Gulcehre et al. 2023 (ReST), arXiv:2308.08998: every answer that reaches a
                        reward

Each rollout is a round: sample, pick, L = -sum_t w_t log p(y_t) over the tokens of the picked answers. There is no
ratio, so neither old log-probabilities nor weights for what was drawn; and no KL.

Shapes: T packed tokens, S sequences.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dovetail.batches import Experience
from dovetail.config.stages import PpoConfig
from dovetail.maths.groups import Aggregation, best_of_groups, log_likelihood_loss, token_weights
from dovetail.maths.ppo import PolicyLoss
from dovetail.rlhf.algorithms.group import WithoutCritic
from dovetail.rlhf.algorithms.protocol import Advantages, Scored, keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitation(WithoutCritic):
    """Cross-entropy on picked answers."""

    aggregation: Aggregation
    min_reward: float | None = None
    """Answers with at least this reward are picked; None = the best one to each prompt."""
    needs_old_logprobs: bool = False
    kl_in_reward: bool = False

    @property
    def compares_answers(self) -> bool:
        return self.min_reward is None

    def kl_weight(self, config: PpoConfig) -> float:
        return 0.0

    def advantages(self, scored: Scored, config: PpoConfig) -> Advantages:
        """Return 1 for the tokens of the picked answers; nothing is learnt from the others."""
        found = self.compared(scored, config)
        may_learn_S = torch.tensor(found.learnt.target_counts, device=found.rewards_S.device) > 0
        if self.min_reward is None:
            picked_S = best_of_groups(found.rewards_S, may_learn_S, self.answers_per_prompt)
        else:
            picked_S = may_learn_S & (found.rewards_S >= self.min_reward)
        learnt = keeping(found.learnt, picked_S)
        stats = found.stats | {"ppo/picked_fraction": float(picked_S.float().mean())}
        return Advantages(learnt=learnt, advantages_T=learnt.mask_T.float(), stats=stats)

    def prepared(self, minibatch: Experience, config: PpoConfig) -> Experience:
        mask_T, bounds_S1 = minibatch.mask_T, minibatch.cu_seqlens_S1
        limit = config.sampling.max_new_tokens
        weights_T = token_weights(mask_T, bounds_S1, aggregation=self.aggregation, max_tokens=limit)
        return replace(minibatch, weights_T=weights_T)

    def loss(
        self, logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, micro: Experience, config: PpoConfig
    ) -> PolicyLoss:
        assert micro.weights_T is not None
        return log_likelihood_loss(logprobs_T, micro.weights_T, micro.mask_T)
