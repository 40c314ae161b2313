"""PPO's clipped surrogate objective.

Responsible for: the summed loss of one micro-batch and the sums that describe the step.
Not responsible for: dividing by the global count (training/step.py), or advantages (maths/gae.py).

Shapes: T packed tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.maths.kl import k3
from dovetail.maths.masked import masked_sum, zero_outside

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8 is far outside any clip range and far inside float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Sums over the actions of one micro-batch; all are scalars, all but `total` without gradient.

    Sums of micro-batches add up to the sums of the batch.
    """

    total: Tensor
    """Differentiable: sum of max(-A r, -A clip(r))."""
    count: Tensor
    """int64: the number of actions."""
    num_clipped: Tensor
    """int64: actions where the clipped branch won, so that they send no gradient."""
    kl_sum: Tensor
    """sum of r - 1 - log r (k3 of KL(old || new)), from log-ratios as they are, not clamped."""
    num_clamped: Tensor
    """int64: actions whose |log r| exceeded MAX_LOG_RATIO and was clamped. Not 0 = something is wrong."""


def clipped_policy_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor, *, clip: float
) -> PolicyLoss:
    """sum_t max(-A_t r_t, -A_t clip(r_t, 1 - eps, 1 + eps)),  r_t = exp(log p_t - log p_old,t).

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7, negated to be minimised. log r is clamped to +-20 before
    exp, so that one impossible token costs its own gradient and not the step; NaN in an action stays NaN, for
    the finite check to see.

    logprobs_T carries the gradient; the rest are constants. mask_T: bool, True = action.
    """
    log_ratio_T = zero_outside(logprobs_T, mask_T) - zero_outside(old_logprobs_T, mask_T)
    advantages_T = zero_outside(advantages_T, mask_T)
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # not an action -> ratio 1
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip, 1 + clip)
    return PolicyLoss(
        total=masked_sum(torch.maximum(plain_T, clipped_T), mask_T),
        count=mask_T.sum(),
        num_clipped=(clipped_T > plain_T).sum(),
        kl_sum=_kl_from_old(log_ratio_T.detach()),
        num_clamped=(log_ratio_T.abs() > MAX_LOG_RATIO).sum(),
    )


def _kl_from_old(log_ratio_T: Tensor) -> Tensor:
    """sum of k3 for KL(old || new): the tokens were drawn from old, so old takes the policy's place."""
    return k3(torch.zeros_like(log_ratio_T), log_ratio_T).sum()
