"""Estimate the KL from the reference token by token, and control the coefficient of its penalty.

Responsible for: estimates of KL(policy || reference) from tokens that the policy sampled.
Not responsible for: where the penalty enters (maths/rewards.py).

Sign: d_t = log p_policy(y_t) - log p_reference(y_t), y_t drawn from the policy. With the other sign the
estimators would speak of another divergence, or of none. Nothing is clamped or made positive: a mean of k1
that is negative over many tokens says that the tokens were not drawn from the policy (forced ends, top-k, a
wrong temperature).

Shapes: T packed tokens. Excluded tokens are the caller's to leave out (maths/masked.py), before any gradient.

Reference for both: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).
"""

import math

from torch import Tensor

from dovetail.maths.precision import at_least_float32

MAX_RELATIVE_ERROR = 0.2
"""Ziegler et al. 2019, section 2.2: the controller's error is clipped to this, either way."""
GAIN = 0.1
"""Ziegler et al. 2019, section 2.2: K_beta."""


def k1(logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """k1_t = d_t.  Unbiased: E[k1] = KL(policy || reference). The per-token penalty in the reward.

    As a loss it is wrong: its expected gradient is 0 (E[grad log p] = 0).
    """
    return at_least_float32(logprobs_T) - at_least_float32(reference_logprobs_T)


def k3(logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """k3_t = exp(-d_t) - 1 + d_t.  Unbiased, never negative, less noisy than k1: the one to report.

    Its expected gradient is that of KL(reference || policy), not of the divergence it estimates.
    """
    log_ratio_T = k1(logprobs_T, reference_logprobs_T)
    return (-log_ratio_T).expm1() + log_ratio_T


def adaptive_kl_coefficient(coefficient: float, observed_nats_per_answer: float, target: float) -> float:
    """beta' = beta (1 + K e), K = 0.1, e = clip((KL - KL_target) / KL_target, -0.2, 0.2).

    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2: one move of at most 2 % after each rollout, whatever its size.

    observed_nats_per_answer: mean over answers of the *sum* of k1 over their tokens (a mean per token would
    be smaller than the target by the length of an answer, and the coefficient would only fall).
    An undefined observation (NaN, from a rollout that will be skipped) leaves the coefficient as it is.
    """
    if math.isnan(observed_nats_per_answer):
        return coefficient
    relative_error = (observed_nats_per_answer - target) / target
    clipped_error = min(max(relative_error, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return coefficient * (1 + GAIN * clipped_error)
