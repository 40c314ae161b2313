"""Sums, means and scales over the tokens that count, at a precision that can hold them.

Responsible for: leaving excluded tokens (prompt, tool output) out of a number in a way that no value they hold, NaN and
infinity included, can reach the result or its gradient; the bounds of each sequence's actions, from the mask alone and
never from token values, because an answer may contain any token.
Not responsible for: which tokens count (text/chat_format.py, rlhf/rollout.py), the compute dtype of the models.

Shapes: T packed tokens, S sequences, A action tokens (all True positions of mask_T, in order). Masks are bool, True =
counts. `column_T[mask_T]` is the A form of a column; `zeros_T.masked_scatter(mask_T, column_A)` leads back.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is already float64.

    Near -10 bfloat16 steps by 0.0625, so a probability ratio taken in it is off by 3 %. Float64 stays
    float64, so that a float64 model can check a whole training step to 1e-10.
    """
    return x if x.dtype == torch.float64 else x.float()


def zero_outside(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """`x_T` where `mask_T` is True and 0 elsewhere, in value and in gradient; float32 at least.

    Apply it before the arithmetic: a NaN that has gone through `exp` comes back in the gradient as 0 * NaN.
    """
    return at_least_float32(x_T).masked_fill(~mask_T, 0.0)


def masked_sum(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """sum of x_t over the tokens with m_t; a scalar, 0 if there are none."""
    return zero_outside(x_T, mask_T).sum()


def masked_mean(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """sum_t m_t x_t / sum_t m_t; a scalar, 0 if no token counts.

    For whole batches only: the mean of micro-batch means is not the mean of the batch.
    """
    return masked_sum(x_T, mask_T) / mask_T.sum().clamp(min=1)


def normalise(x_T: Tensor, mask_T: Tensor, eps: float = 1e-8) -> Tensor:
    """(x_t - mean) / (std + eps) where m_t, 0 elsewhere: zero mean and unit standard deviation over the mask.

    For advantages, once per rollout over all its actions (Huang et al. 2024, arXiv:2403.17031, advantage
    whitening). `std` is the population's (divided by n), so that a single action gives 0 and not NaN.
    """
    x_T = zero_outside(x_T, mask_T)
    mean, std = _mean_and_std(x_T, mask_T)
    normalised_T = (x_T.double() - mean) / (std + eps)
    return zero_outside(normalised_T.to(x_T.dtype), mask_T)


def scale_to_unit_std(x_T: Tensor, mask_T: Tensor, eps: float = 1e-8) -> Tensor:
    """(x_t - mean) / (std + eps) + mean where m_t, 0 elsewhere: unit standard deviation, the mean kept.

    For rewards before GAE (Huang et al. 2024, arXiv:2403.17031, reward whitening): the sign of the mean
    reward carries meaning, which `normalise` would remove.
    """
    x_T = zero_outside(x_T, mask_T)
    mean, std = _mean_and_std(x_T, mask_T)
    scaled_T = (x_T.double() - mean) / (std + eps) + mean
    return zero_outside(scaled_T.to(x_T.dtype), mask_T)


def _mean_and_std(x_T: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the population mean and standard deviation over the mask, two float64 scalars.

    Float64 because equal inputs must give deviations of 0; float32 would leave rounding noise, which division
    by a standard deviation of the same size turns into advantages of order one.
    """
    x_T = x_T.double()
    mean = masked_mean(x_T, mask_T)
    variance = masked_mean((x_T - mean).square(), mask_T)
    return mean, torch.sqrt(variance)


def cu_actions(mask_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """int64 [S + 1]: actions cu_actions[s] to cu_actions[s + 1] - 1 of all A are those of sequence s."""
    counted_T = mask_T.long().cumsum(0)
    counted_T1 = torch.cat([counted_T.new_zeros(1), counted_T])
    return counted_T1[cu_seqlens_S1.long()]


def sums_of_sequences(x_T: Tensor, mask_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """X_s = sum of x_t over the tokens of sequence s with m_t; [S], differentiable."""
    lengths_S = (cu_seqlens_S1[1:] - cu_seqlens_S1[:-1]).long()
    # In a fixed order on every device, which index_add does not have on a GPU.
    return torch.segment_reduce(zero_outside(x_T, mask_T), "sum", lengths=lengths_S, unsafe=True)
