"""The equations of PPO with a KL penalty, from a score per answer to the two losses.

Responsible for: estimates of the KL and its coefficient, rewards per token, advantages, the clipped surrogate, the
weight that corrects for the generator, the critic's clipped error and explained variance.
Not responsible for: the scores (rlhf/), sums over the tokens that count (masked.py), dividing losses by the global
count (training/step.py).

Sign of the KL: d_t = log p_policy(y_t) - log p_reference(y_t), y_t drawn from the policy. With the other sign the
estimators would speak of another divergence, or of none. Nothing is clamped or made positive: a mean of k1 that is
negative over many tokens says that the tokens were not drawn from the policy (forced ends, top-k, a wrong temperature).

Order of the rewards: clip the model's scores, replace those of cut-off answers, then place them on tokens with the
penalty. Only scores are clipped, never the penalty: that would free the policy to move once it is far enough.

Three policies: the generator's mu drew the tokens, pi_old is where an update begins, pi is the actor now. With one
set of weights mu and pi_old differ by what kernels round, and by whatever else went wrong.

Shapes: T packed tokens, S sequences, A action tokens (those of sequence 0, then 1, ...; nothing in between). What stood
between two actions of one sequence (the user's turn, tool output) is not there any more, so it neither decays nor
interrupts. Excluded tokens are the caller's to leave out, before any gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.maths.masked import at_least_float32, masked_mean, masked_sum, zero_outside

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


def clip_scores(scores_S: Tensor, clip: float | None) -> Tensor:
    """min(max(score, -c), c); [S]. None: as they are. NaN stays NaN."""
    scores_S = at_least_float32(scores_S)
    return scores_S if clip is None else scores_S.clamp(-clip, clip)


def replace_missing_end(scores_S: Tensor, finished_S: Tensor, penalty: float | None) -> Tensor:
    """`penalty` as the score of each answer that was cut off, the others' as they are; [S].

    The reward model never saw answers without an end, so what it says of them means nothing (Huang et al.
    2024, arXiv:2403.17031, the "EOS trick": a fixed low score instead).

    penalty None: 1 below the lowest score of the batch, so give it the whole rollout and not a micro-batch.
    finished_S: bool, by the generator's account of why it stopped, not by the last token's value.
    """
    scores_S = at_least_float32(scores_S)
    if penalty is None:
        lowest = scores_S.min() if scores_S.numel() else scores_S.new_zeros(())
        return scores_S.where(finished_S, lowest - 1)
    return scores_S.masked_fill(~finished_S, penalty)


def per_token_rewards(
    logprobs_T: Tensor,
    reference_logprobs_T: Tensor,
    scores_S: Tensor,
    mask_T: Tensor,
    last_action_index_S: Tensor,
    *,
    kl_coefficient: float,
) -> Tensor:
    """r_t = -beta (log p_t - log p_ref,t) + [t is the last action] score; [T], 0 where mask_T is False.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 2 without the pretraining term, spread over tokens (Ziegler et
    al. 2019, arXiv:1909.08593, eq. 2). With gamma = 1 an answer's rewards add up to score - beta KL estimate.

    logprobs_T: of the actor that sampled, before the update. mask_T: bool, True = action.
    last_action_index_S: index in T of each answer's last action (its end token, if it has one): the score is
    added there, once, not on a position after it.
    """
    log_ratio_T = k1(zero_outside(logprobs_T, mask_T), zero_outside(reference_logprobs_T, mask_T))
    penalty_T = -kl_coefficient * log_ratio_T
    return penalty_T.index_add(0, last_action_index_S, scores_S.to(penalty_T.dtype))


def move_to_turns(
    rewards_T: Tensor, turn_rewards_T: Tensor, cu_seqlens_S1: Tensor, last_action_index_S: Tensor
) -> Tensor:
    """r_t + u_t - [t is the last action] sum of u over the sequence; [T].

    rewards_T: r, with the score of each sequence on its last action. turn_rewards_T: u, the parts of that score that
    turns of a conversation earned, each at the last token of its turn. The sum of each sequence stays.
    """
    lengths_S = (cu_seqlens_S1[1:] - cu_seqlens_S1[:-1]).long()
    sums_S = torch.segment_reduce(turn_rewards_T, "sum", lengths=lengths_S, unsafe=True)
    return (rewards_T + turn_rewards_T).index_add(0, last_action_index_S, -sums_S)


def gae(
    rewards_A: Tensor,
    values_A: Tensor,
    cu_actions_S1: Tensor,
    *,
    gamma: float,
    lam: float,
    longest: int | None = None,
) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t); [A].

    Schulman et al. 2016 (arXiv:1506.02438), eq. 16, each sum ending with its sequence; float32 at least. The
    critic's target is A_t + V(s_t), taken before any normalisation.

    rewards_A: reward that followed action t. values_A: value of the state in which action t was chosen.
    cu_actions_S1: sequence s owns actions cu_actions_S1[s] to cu_actions_S1[s + 1] - 1; it may own none.
    The value of the state after a sequence's last action is 0: the answer ended there, or was cut off and its score
    (see `replace_missing_end`) already says what that is worth.
    longest: the most actions of one sequence, or more; None = the device is asked, and waited for.
    """
    rewards_A, values_A = at_least_float32(rewards_A), at_least_float32(values_A)
    ends_S = cu_actions_S1[1:].long()
    lengths_S = ends_S - cu_actions_S1[:-1].long()
    num_actions = rewards_A.numel()
    ends_A = ends_S.repeat_interleave(lengths_S, output_size=num_actions)
    remaining_A = ends_A - torch.arange(num_actions, device=rewards_A.device)  # 1 at a sequence's last action

    next_values_A = _ahead(values_A, 1, remaining_A)
    deltas_A = rewards_A + gamma * next_values_A - values_A
    if longest is None:
        longest = max(lengths_S.tolist(), default=0)
    return _discounted_sums(deltas_A, remaining_A, decay=gamma * lam, longest=longest)


def _discounted_sums(x_A: Tensor, remaining_A: Tensor, *, decay: float, longest: int) -> Tensor:
    """sum_l decay^l x_{t+l} within each sequence, by doubling: log2(longest) passes, no loop over time.

    When the sum over `reach` terms is known for every t, the sum over 2 reach terms is that of t plus
    decay^reach times that of t + reach.
    """
    reach = 1
    while reach < longest:
        x_A = x_A + decay * _ahead(x_A, reach, remaining_A)
        reach, decay = 2 * reach, decay * decay
    return x_A


def _ahead(x_A: Tensor, steps: int, remaining_A: Tensor) -> Tensor:
    """x_{t+steps} of the same sequence, 0 where it has ended by then; nothing leaks into another."""
    return x_A.roll(-steps).masked_fill(remaining_A <= steps, 0.0)


MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8 is far outside any clip range and far inside float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Sums over the actions of one micro-batch; all are scalars, all but `total` without gradient.

    Sums of micro-batches add up to the sums of the batch.
    """

    total: Tensor
    """Differentiable: the sum of the losses of the actions."""
    count: Tensor
    """int64: the number of actions."""
    num_clipped: Tensor
    """int64: actions whose ratio a bound replaced; only in a loss on weights do they send a gradient."""
    kl_sum: Tensor
    """sum of r - 1 - log r (k3 of KL(old || new)), from log-ratios as they are, not clamped."""
    num_clamped: Tensor
    """int64: actions whose |log r| exceeded MAX_LOG_RATIO and was clamped. Not 0 = something is wrong."""


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """sum_t max(-A_t r_t, -A_t clip(r_t, 1 - eps, 1 + eps)),  r_t = exp(log p_t - log p_old,t).

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7, negated to be minimised. log r is clamped to +-20 before
    exp, so that one impossible token costs its own gradient and not the step; NaN in an action stays NaN, for
    the finite check to see.

    logprobs_T carries the gradient; the rest are constants. mask_T: bool, True = action. clip_high: eps of the upper
    bound where it is another one (DAPO, arXiv:2503.14476, section 3.1). dual_clip: see `clipped_surrogate`.
    """
    high = clip if clip_high is None else clip_high
    log_ratio_T = zero_outside(logprobs_T, mask_T) - zero_outside(old_logprobs_T, mask_T)
    advantages_T = zero_outside(advantages_T, mask_T)
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # not an action -> ratio 1
    loss_T, is_clipped_T = clipped_surrogate(ratio_T, advantages_T, clip=(clip, high), dual_clip=dual_clip)
    return PolicyLoss(
        total=masked_sum(loss_T, mask_T),
        count=mask_T.sum(),
        num_clipped=is_clipped_T.sum(),
        kl_sum=kl_from_old(log_ratio_T.detach()),
        num_clamped=(log_ratio_T.abs() > MAX_LOG_RATIO).sum(),
    )


def clipped_surrogate(
    ratio_T: Tensor, advantages_T: Tensor, *, clip: tuple[float, float], dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """l_t = max(-A_t r_t, -A_t clip(r_t, 1 - low, 1 + high)), and where a bound replaced the ratio, bool; both [T].

    dual_clip: c, with which l_t is at most -A_t c where A_t < 0 (Ye et al. 2020, arXiv:1912.09729, equation 5). Without
    it the loss of a bad action that became much likelier has no bound, and neither has its gradient.
    """
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip[0], 1 + clip[1])
    loss_T, is_clipped_T = torch.maximum(plain_T, clipped_T), clipped_T > plain_T
    if dual_clip is None:
        return loss_T, is_clipped_T
    most_T = torch.where(advantages_T < 0, -advantages_T * dual_clip, torch.inf)
    return torch.minimum(loss_T, most_T), is_clipped_T | (most_T < loss_T)


def kl_from_old(log_ratio_T: Tensor) -> Tensor:
    """sum of k3 for KL(old || new): the tokens were drawn from old, so old takes the policy's place."""
    return k3(torch.zeros_like(log_ratio_T), log_ratio_T).sum()


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


ROUNDING = 1e-11
"""A variance below this share of the mean square is rounding of float32 returns."""
LEAST = -10.0
"""The lowest explained variance that is reported: where returns hardly vary, a lower one is rounding enlarged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """Sums over the actions of one micro-batch; scalars, all but `total` without gradient."""

    total: Tensor
    """Differentiable: sum of half squared errors, the larger of plain and clipped."""
    count: Tensor
    """int64: the number of actions."""
    num_clipped: Tensor
    """int64: actions where the clipped error was the larger, so that they send no gradient."""


def clipped_value_loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, mask_T: Tensor, *, clip: float | None
) -> ValueLoss:
    """sum_t 1/2 max((V_t - R_t)^2, (V_old,t + clip(V_t - V_old,t, -c, c) - R_t)^2).

    Dhariwal et al. 2017 (OpenAI baselines, ppo2); Huang et al. 2024 (arXiv:2403.17031) for language models.

    clip None: the first term alone. values_T carries the gradient; old_values_T are the critic's at sampling
    time. mask_T: bool, True = action.
    """
    values_T, old_values_T = zero_outside(values_T, mask_T), zero_outside(old_values_T, mask_T)
    returns_T = zero_outside(returns_T, mask_T)
    error_T = (values_T - returns_T).square() / 2
    if clip is None:
        clipped_error_T = error_T
    else:
        moved_T = (values_T - old_values_T).clamp(-clip, clip)
        clipped_error_T = (old_values_T + moved_T - returns_T).square() / 2
    return ValueLoss(
        total=masked_sum(torch.maximum(error_T, clipped_error_T), mask_T),
        count=mask_T.sum(),
        num_clipped=(clipped_error_T > error_T).sum(),
    )


def explained_variance(values_T: Tensor, returns_T: Tensor, mask_T: Tensor) -> Tensor:
    """max(1 - Var(R - V) / Var(R), -10) over the mask: 1 = perfect, 0 = as good as a constant, below 0 = worse.

    A scalar, float64; 0 when the returns vary by rounding alone. For whole rollouts: it is no sum over micro-batches.
    """
    returns_T = zero_outside(returns_T, mask_T).double()
    left_over = _variance(returns_T - zero_outside(values_T, mask_T).double(), mask_T)
    variance = _variance(returns_T, mask_T)
    rounding = ROUNDING * masked_mean(returns_T.square(), mask_T)
    explained = 1 - left_over / variance.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(variance > rounding, explained.clamp(min=LEAST), 0.0)


def _variance(x_T: Tensor, mask_T: Tensor) -> Tensor:
    return masked_mean((x_T - masked_mean(x_T, mask_T)).square(), mask_T)
