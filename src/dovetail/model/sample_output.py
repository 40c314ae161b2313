"""The output of a model for a few tokens, to compare two forms of one model.

Responsible for: computing it, whatever attention the model runs on, and how far two of them are apart.
Not responsible for: the parity of generation and training (engine/parity.py).

Shapes: T tokens, N numbers of each token's output, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.model.forward import evaluation_mode, plain_model, scalar_head
from dovetail.model.linear_logprobs import head_of
from dovetail.model.padding import num_rows
from dovetail.model.plain_forward import plain_attention, plain_hidden_states

LARGEST_GAP = 0.05
"""The largest relative gap of the median token that rounding in half precision on another device explains."""
_NUM_TOKENS = 16


@torch.no_grad()
def sample_output(model: Any) -> Tensor:
    """Return [T, N], float64 on the CPU: logits, or hidden states and score, of the plain forward without dropout."""
    inner = plain_model(model)
    ids = [(7 * i + 3) % num_rows(inner) for i in range(_NUM_TOKENS)]
    with evaluation_mode(inner), plain_attention(inner):
        hidden_TD = plain_hidden_states(inner, ids)
    if hasattr(inner, "score"):
        output_TN = torch.cat([hidden_TD.float(), scalar_head(model, hidden_TD)[:, None]], dim=-1)
    else:
        output_TN = head_of(model).logits(hidden_TD)
    return output_TN.double().cpu()


def relative_gap(one_TN: Tensor, other_TN: Tensor) -> float:
    """Return how far two outputs are apart, relative to the first; a NaN counts as infinitely far.

    It is the median over the tokens: a mixture of experts may send one token elsewhere on another device.
    """
    gaps_T = (one_TN - other_TN).norm(dim=-1) / one_TN.norm(dim=-1).clamp(min=1e-12)
    return float(gaps_T.nan_to_num(nan=float("inf")).median())
