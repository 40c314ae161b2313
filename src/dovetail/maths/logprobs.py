"""Log-probability and entropy of tokens from full logits: the definition, for small inputs.

Responsible for: the reference form that the fused head (model/linear_logprobs.py) must equal.
Not responsible for: training, which never holds all logits [T, V] at once.

Shapes: T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from dovetail.maths.precision import at_least_float32


def logprobs_of(logits_TV: Tensor, next_ids_T: Tensor, temperature: float = 1.0) -> Tensor:
    """log p_t = (z_t / tau)[y_t] - log sum_v exp((z_t / tau)[v]); [T], float32 at least.

    Row t of the logits must be the one that predicts `next_ids_T[t]`: in a causal model, the output at the
    token before it. `temperature` (tau) is the one sampled with: the policy is softmax(z / tau), so a ratio
    of probabilities taken without it compares two policies of which neither answered.
    """
    logprobs_TV = _log_softmax(logits_TV, temperature)
    return logprobs_TV.gather(-1, next_ids_T[:, None]).squeeze(-1)


def entropy_of(logits_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """H_t = -sum_v p_tv log p_tv in nats, of p_t = softmax(z_t / tau); [T], float32 at least.

    A token excluded by a logit of -inf adds 0, in value and in gradient.
    """
    logprobs_TV = _log_softmax(logits_TV, temperature)
    finite_TV = logprobs_TV.clamp(min=torch.finfo(logprobs_TV.dtype).min)  # 0 * -inf would be NaN
    return -(logprobs_TV.exp() * finite_TV).sum(dim=-1)


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    return (at_least_float32(logits_TV) / temperature).log_softmax(dim=-1)
