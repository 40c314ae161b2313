"""Three policies: the generator's mu, which drew the tokens, pi_old, at which an update begins, and the current pi.

Responsible for: the weight that corrects for tokens drawn from mu and not from pi_old, and how far the two are
apart. With one set of weights mu and pi_old differ by what kernels round, and by whatever else went wrong.
Not responsible for: the ratio pi / pi_old and its clip (maths/policy_loss.py).

Shapes: T packed tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.maths.kl import k1, k3
from dovetail.maths.masked import zero_outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The distance of pi_old from mu on the tokens that mu drew, nothing clamped; scalars without gradient.

    Sums of micro-batches add up to the sums of the batch; the largest gap is the largest of theirs.
    """

    gap_sum: Tensor
    """sum of |log pi_old - log mu|."""
    gap_max: Tensor
    """The largest of them; 0 if no token counts."""
    kl_sum: Tensor
    """sum of k3 of KL(mu || pi_old)."""


def mismatch(old_logprobs_T: Tensor, sampled_logprobs_T: Tensor, mask_T: Tensor) -> Mismatch:
    """sum |d_t|, max |d_t| and sum (exp(d_t) - 1 - d_t),  d_t = log pi_old,t - log mu_t, over the mask."""
    old_T = zero_outside(old_logprobs_T.detach(), mask_T)
    sampled_T = zero_outside(sampled_logprobs_T.detach(), mask_T)
    gap_T = k1(old_T, sampled_T).abs()
    return Mismatch(gap_sum=gap_T.sum(), gap_max=gap_T.max(), kl_sum=k3(sampled_T, old_T).sum())


def importance_weights(
    old_logprobs_T: Tensor, sampled_logprobs_T: Tensor, mask_T: Tensor, *, cap: float
) -> Tensor:
    """w_t = min(pi_old,t / mu_t, C); [T], without gradient. Where mask_T is False both count as equal.

    Truncated importance sampling (Ionides 2008, "Truncated Importance Sampling"), per token: it multiplies the
    advantage. Where every answer is one token, the mean of w_t A_t grad log pi_t over draws from mu is that over
    draws from pi_old, up to what the cap takes off. In longer answers it corrects for the draw of the token and
    not for that of its prefix, whose weight would be a product over all tokens before it and vary without bound.

    The ratio is truncated and nothing else: a token that pi_old all but excludes gets a weight near 0, NaN stays
    NaN for the finite check to see.
    """
    log_weights_T = k1(
        zero_outside(old_logprobs_T.detach(), mask_T), zero_outside(sampled_logprobs_T.detach(), mask_T)
    )
    return torch.exp(log_weights_T).clamp(max=cap)
