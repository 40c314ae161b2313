"""The critic's loss and how well it predicts.

Responsible for: the clipped squared error of one micro-batch, and explained variance over a rollout.
Not responsible for: the returns (maths/gae.py), or dividing by the global count (training/step.py).

Shapes: T packed tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.maths.masked import masked_mean, masked_sum, zero_outside

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
