"""Locate the actions, the tokens the policy chose, among all tokens of its sequences.

Responsible for: the bounds of each sequence's actions, from the mask alone, never from token values: an
answer may contain any token.
Not responsible for: making the mask.

Shapes: T packed tokens, S sequences, A action tokens (all True positions of mask_T, in order).
`column_T[mask_T]` is the A form of a column; `zeros_T.masked_scatter(mask_T, column_A)` leads back.
"""

import torch
from torch import Tensor


def cu_actions(mask_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """int64 [S + 1]: actions cu_actions[s] to cu_actions[s + 1] - 1 of all A are those of sequence s."""
    counted_T = mask_T.long().cumsum(0)
    counted_T1 = torch.cat([counted_T.new_zeros(1), counted_T])
    return counted_T1[cu_seqlens_S1.long()]
