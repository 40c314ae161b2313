"""Generalised advantage estimation over packed answers.

Responsible for: advantages of the actions from per-action rewards and values.
Not responsible for: normalising them (maths/masked.py), or finding the actions (maths/actions.py).

Shapes: A action tokens (those of sequence 0, then 1, ...; nothing in between), S sequences. What stood
between two actions of one sequence (the user's turn, tool output) is not there any more, so it neither decays
nor interrupts.
"""

import torch
from torch import Tensor

from dovetail.maths.precision import at_least_float32


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
