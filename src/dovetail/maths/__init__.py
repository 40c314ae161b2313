"""The equations, as pure functions of tensors: no state, no device choice, no randomness, no logging.

Responsible for: every formula of the stages, each with its paper.
Not responsible for: dividing sums by global counts (training/step.py); losses here return sums and counts.

    masked        the float32 that all of them compute in; sums, means and scales over the tokens that count
    ppo           KL, rewards per token, advantages, the two losses, the weight that corrects for the generator
    groups        advantages within the answers to one prompt, means over answers, losses of methods without a critic
    ranking       Bradley-Terry loss of the reward model
"""

from dovetail.maths.masked import (
    at_least_float32,
    cu_actions,
    masked_mean,
    masked_sum,
    normalise,
    scale_to_unit_std,
    zero_outside,
)
from dovetail.maths.ppo import (
    Mismatch,
    PolicyLoss,
    ValueLoss,
    adaptive_kl_coefficient,
    clip_scores,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    importance_weights,
    k1,
    k3,
    mismatch,
    per_token_rewards,
    replace_missing_end,
)
from dovetail.maths.ranking import ranking_loss, won_pairs

__all__ = [
    "Mismatch",
    "PolicyLoss",
    "ValueLoss",
    "adaptive_kl_coefficient",
    "at_least_float32",
    "clip_scores",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cu_actions",
    "explained_variance",
    "gae",
    "importance_weights",
    "k1",
    "k3",
    "masked_mean",
    "masked_sum",
    "mismatch",
    "normalise",
    "per_token_rewards",
    "ranking_loss",
    "replace_missing_end",
    "scale_to_unit_std",
    "won_pairs",
    "zero_outside",
]
