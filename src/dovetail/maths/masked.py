"""Sums, means and scales over the tokens that count.

Responsible for: leaving excluded tokens (prompt, tool output) out of a number in a way that no value they
hold, NaN and infinity included, can reach the result or its gradient.
Not responsible for: which tokens count (text/chat_format.py, rlhf/rollout.py).

Shapes: T packed tokens. Masks are bool, True = counts. Any other shape works alike, as long as both agree.
"""

import torch
from torch import Tensor

from dovetail.maths.precision import at_least_float32


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
