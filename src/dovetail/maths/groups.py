"""The equations of methods without a critic, which compare the answers to one prompt with each other.

Responsible for: advantages from the rewards of a group, the penalty of overlong answers, the weights that turn a sum
over tokens into a mean over answers, and the losses on a ratio per sequence or on a clipped weight.
Not responsible for: rewards per token and the clipped surrogate (ppo.py), dividing by counts (training/step.py).

A loss stays a sum over tokens that is divided by the number of actions N of the whole minibatch. Another mean is a
weight per token, computed for the minibatch before it is cut: with w_t = N / (S |y_t|) the same sum is the mean over
S answers of the mean over the |y_t| tokens of each.

Shapes: T packed tokens, S sequences, P pairs; the answers to one prompt follow one another.
"""

from typing import Literal

import torch
from torch import Tensor

from dovetail.maths.masked import at_least_float32, masked_sum, sums_of_sequences, zero_outside
from dovetail.maths.ppo import MAX_LOG_RATIO, PolicyLoss, clipped_surrogate, k1, k3, kl_from_old
from dovetail.maths.preference import dpo_loss

Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]
EPSILON = 1e-4
"""The number beside a standard deviation in a denominator (TRL's GRPO)."""


def over_tokens_of_sequences(x_S: Tensor, cu_seqlens_S1: Tensor, num_tokens: int) -> Tensor:
    """x_t = X_s at every token t of sequence s; [T]."""
    return x_S[_sequence_of(cu_seqlens_S1, num_tokens)]


def _sequence_of(cu_seqlens_S1: Tensor, num_tokens: int) -> Tensor:
    """Return the sequence of each token; int64 [T]."""
    lengths_S = (cu_seqlens_S1[1:] - cu_seqlens_S1[:-1]).long()
    index_S = torch.arange(lengths_S.numel(), device=lengths_S.device)
    return index_S.repeat_interleave(lengths_S, output_size=num_tokens)


def group_advantages(rewards_S: Tensor, group_size: int, *, divides_by_std: bool) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-4) over the group of answer i; without the divisor if asked for; [S].

    Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; without the divisor Liu et al. 2025 (arXiv:2503.20783), section
    3. The deviation is the sample's (divided by n - 1), as in TRL. A group of equal rewards gives exactly 0.
    """
    rewards_GN = at_least_float32(rewards_S).double().view(-1, group_size)
    centred_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
    if divides_by_std:
        std_G1 = torch.sqrt(centred_GN.square().sum(1, keepdim=True) / max(1, group_size - 1))
        centred_GN = centred_GN / (std_G1 + EPSILON)
    return _zero_without_signal(centred_GN, rewards_GN).flatten().to(at_least_float32(rewards_S).dtype)


def leave_one_out_advantages(rewards_S: Tensor, group_size: int) -> Tensor:
    """A_i = R_i - (1 / (n - 1)) sum_{j != i} R_j over the group of answer i; [S].

    Ahmadian et al. 2024 (arXiv:2402.14740), section 3.2: the other answers are an unbiased baseline.
    """
    rewards_GN = at_least_float32(rewards_S).double().view(-1, group_size)
    others_GN = (rewards_GN.sum(1, keepdim=True) - rewards_GN) / (group_size - 1)
    advantages_GN = _zero_without_signal(rewards_GN - others_GN, rewards_GN)
    return advantages_GN.flatten().to(at_least_float32(rewards_S).dtype)


def best_of_groups(rewards_S: Tensor, may_learn_S: Tensor, group_size: int) -> Tensor:
    """Mark the answer with the highest reward of each group, the first of several; bool [S].

    Dong et al. 2023 (RAFT, arXiv:2304.06767), algorithm 1. may_learn_S: False = never picked.
    """
    rewards_GN = rewards_S.masked_fill(~may_learn_S, -torch.inf).view(-1, group_size)
    is_best_GN = torch.zeros_like(rewards_GN, dtype=torch.bool).scatter(
        1, rewards_GN.argmax(1, keepdim=True), True
    )
    return is_best_GN.flatten() & may_learn_S


def _zero_without_signal(advantages_GN: Tensor, rewards_GN: Tensor) -> Tensor:
    """Return exactly 0 where all rewards of a group are equal, so that no rounding is learnt from."""
    return advantages_GN.masked_fill((rewards_GN == rewards_GN[:, :1]).all(1, keepdim=True), 0.0)


def overlong_penalty(lengths_S: Tensor, *, limit: int, buffer: int) -> Tensor:
    """0 up to limit - buffer tokens, then falling linearly to -1 at the limit: max(-1, (limit - buffer - n) / buffer).

    Yu et al. 2025 (DAPO, arXiv:2503.14476), equation 13; added to the score; [S].
    """
    return ((limit - buffer - lengths_S.float()) / buffer).clamp(-1.0, 0.0)


def token_weights(
    mask_T: Tensor, cu_seqlens_S1: Tensor, *, aggregation: Aggregation, max_tokens: int
) -> Tensor:
    """w_t, with which sum_t w_t l_t / N is the mean asked for; float32 [T], 0 where the mask is False.

    sequence_mean: over S answers, of the mean over the tokens of each: w_t = N / (S |y_t|) (GRPO, equation 3).
    token_mean: over all tokens: w_t = 1 (DAPO, equation 8). constant_length: w_t = N / (S max_tokens), so that a
    token counts alike in short and long answers and minibatches (Dr. GRPO, appendix A).

    N: the actions, S: the sequences with actions. For whole minibatches only.
    """
    ones_T = mask_T.float()
    if aggregation == "token_mean":
        return ones_T
    counts_S = sums_of_sequences(ones_T, mask_T, cu_seqlens_S1)
    per_answer = counts_S.sum() / (counts_S > 0).sum().clamp(min=1)
    if aggregation == "constant_length":
        return ones_T * (per_answer / max_tokens)
    weights_S = per_answer / counts_S.clamp(min=1)
    return ones_T * over_tokens_of_sequences(weights_S, cu_seqlens_S1, mask_T.numel())


def log_likelihood_loss(logprobs_T: Tensor, weights_T: Tensor, mask_T: Tensor) -> PolicyLoss:
    """-sum_t w_t log p_t: the cross-entropy of the marked tokens."""
    return _without_ratio(-masked_sum(weights_T * zero_outside(logprobs_T, mask_T), mask_T), mask_T)


def pair_loss(
    logprobs_T: Tensor,
    reference_T: Tensor,
    signs_T: Tensor,
    weights_T: Tensor,
    mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    beta: float,
) -> PolicyLoss:
    """sum over pairs of W -log sigmoid(beta (r_chosen - r_rejected)),  r_s = sum_t log p_t - log p_ref,t of sequence s.

    DPO's loss (preference.py) on sequences of which each two neighbours are a pair: signs_T is positive on the tokens
    of the chosen one and negative on the other's. W: the sum of w_t over the tokens of both, so that with the weights
    of `token_weights` by sequence_mean sum / N is the mean over pairs.
    """
    log_ratio_T = zero_outside(logprobs_T, mask_T) - zero_outside(reference_T, mask_T)
    ratio_P2 = sums_of_sequences(log_ratio_T, mask_T, cu_seqlens_S1).view(-1, 2)
    is_chosen_P2 = sums_of_sequences(signs_T, mask_T, cu_seqlens_S1).view(-1, 2) > 0
    weight_P = sums_of_sequences(weights_T, mask_T, cu_seqlens_S1).view(-1, 2).sum(1)
    chosen_P = ratio_P2.masked_fill(~is_chosen_P2, 0.0).sum(1)
    rejected_P = ratio_P2.masked_fill(is_chosen_P2, 0.0).sum(1)
    return _without_ratio((weight_P * dpo_loss(chosen_P, rejected_P, beta=beta)).sum(), mask_T)


def _without_ratio(total: Tensor, mask_T: Tensor) -> PolicyLoss:
    """Return a loss that has no older policy to compare with, so that nothing is clipped."""
    none = torch.zeros((), device=mask_T.device)
    return PolicyLoss(total=total, count=mask_T.sum(), num_clipped=none, kl_sum=none, num_clamped=none)


def kl_loss(
    logprobs_T: Tensor,
    reference_T: Tensor,
    weights_T: Tensor,
    mask_T: Tensor,
    *,
    estimator: Literal["k2", "k3"],
) -> Tensor:
    """sum_t w_t k_t, k2_t = d_t^2 / 2 or k3_t = exp(-d_t) - 1 + d_t, d_t = log p_t - log p_ref,t; a scalar.

    k3: GRPO, equation 4. k2: REINFORCE++, whose gradient is that of KL(policy || reference) on the policy's own tokens.
    """
    logprobs_T, reference_T = zero_outside(logprobs_T, mask_T), zero_outside(reference_T, mask_T)
    if estimator == "k3":
        return masked_sum(weights_T * k3(logprobs_T, reference_T), mask_T)
    return masked_sum(weights_T * k1(logprobs_T, reference_T).square() / 2, mask_T)


def sequence_ratio_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    clip: tuple[float, float],
    dual_clip: float | None = None,
) -> PolicyLoss:
    """sum_t max(-A_t s_i, -A_t clip(s_i, 1 - low, 1 + high)),  s_i = exp(mean over i's tokens of log p - log p_old).

    Zheng et al. 2025 (GSPO, arXiv:2507.18071), equations 5 and 7: one ratio for each answer. dual_clip: see
    `clipped_surrogate`.
    """
    log_ratio_T = zero_outside(logprobs_T, mask_T) - zero_outside(old_logprobs_T, mask_T)
    advantages_T = zero_outside(advantages_T, mask_T)
    counts_S = sums_of_sequences(mask_T.float(), mask_T, cu_seqlens_S1).clamp(min=1)
    mean_S = sums_of_sequences(log_ratio_T, mask_T, cu_seqlens_S1) / counts_S
    ratio_S = mean_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    ratio_T = over_tokens_of_sequences(ratio_S, cu_seqlens_S1, mask_T.numel())
    loss_T, is_clipped_T = clipped_surrogate(ratio_T, advantages_T, clip=clip, dual_clip=dual_clip)
    mean_T = over_tokens_of_sequences(mean_S, cu_seqlens_S1, mask_T.numel())
    return PolicyLoss(
        total=masked_sum(loss_T, mask_T),
        count=mask_T.sum(),
        num_clipped=is_clipped_T.sum(),
        kl_sum=kl_from_old(log_ratio_T.detach()),
        num_clamped=((mean_T.abs() > MAX_LOG_RATIO) & mask_T).sum(),
    )


def clipped_weight_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    clip: tuple[float, float],
) -> PolicyLoss:
    """-sum_t sg(clip(r_t, 1 - low, 1 + high)) A_t log p_t,  r_t = exp(log p_t - log p_old,t), sg = no gradient.

    MiniMax 2025 (CISPO, arXiv:2506.13585), equations 4 and 5: the weight is clipped, and no token loses its gradient.
    """
    logprobs_T = zero_outside(logprobs_T, mask_T)
    log_ratio_T = logprobs_T.detach() - zero_outside(old_logprobs_T, mask_T)
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight_T = ratio_T.clamp(1 - clip[0], 1 + clip[1])
    return PolicyLoss(
        total=-masked_sum(weight_T * zero_outside(advantages_T, mask_T) * logprobs_T, mask_T),
        count=mask_T.sum(),
        num_clipped=(weight_T != ratio_T).sum(),
        kl_sum=kl_from_old(log_ratio_T),
        num_clamped=(log_ratio_T.abs() > MAX_LOG_RATIO).sum(),
    )
