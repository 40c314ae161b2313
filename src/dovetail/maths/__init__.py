"""The equations, as pure functions of tensors: no state, no device choice, no randomness, no logging.

Responsible for: every formula of the three stages, one concept a file, each with its paper.
Not responsible for: dividing sums by global counts (training/step.py); losses here return sums and counts.

    masked        sums, means and scales over the tokens that count
    kl            k1, k3 and the adaptive coefficient
    rewards       scores and KL penalty -> one reward per token
    actions, gae  actions of packed sequences -> advantages
    policy_loss   PPO's clipped surrogate
    mismatch      generator and training forward: how far apart, and the weight that corrects for it
    value_loss    the critic's clipped error, explained variance
    ranking       Bradley-Terry loss of the reward model
    precision     the float32 that all of them compute in
"""

from dovetail.maths.actions import cu_actions
from dovetail.maths.gae import gae
from dovetail.maths.kl import adaptive_kl_coefficient, k1, k3
from dovetail.maths.masked import masked_mean, masked_sum, normalise, scale_to_unit_std, zero_outside
from dovetail.maths.mismatch import Mismatch, importance_weights, mismatch
from dovetail.maths.policy_loss import PolicyLoss, clipped_policy_loss
from dovetail.maths.precision import at_least_float32
from dovetail.maths.ranking import ranking_loss, won_pairs
from dovetail.maths.rewards import clip_scores, per_token_rewards, replace_missing_end
from dovetail.maths.value_loss import ValueLoss, clipped_value_loss, explained_variance

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
