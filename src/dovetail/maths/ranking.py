"""The reward model's loss on preference pairs, and how often it agrees with them.

Responsible for: the Bradley-Terry likelihood of pairs.
Not responsible for: which pairs a ranking yields and their weights (batches.pack_ranked), or dividing by the
number of prompts (training/step.py).

Shapes: P preference pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dovetail.maths.masked import at_least_float32


def ranking_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, weight_P: Tensor) -> Tensor:
    """-sum_p w_p log sigmoid(r(x, y_w) - r(x, y_l) - m_p); a scalar.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1, with w = 1 / (K choose 2) for each pair of one prompt's K
    answers; margin m as in Touvron et al. 2023 (arXiv:2307.09288), eq. 2, 0 where the source gives none.

    chosen_P, rejected_P: scores, both with gradient. log sigmoid as one function: log(sigmoid(x)) is -inf
    from x = -104 on in float32, and log(1 + exp(-x)) infinite from -89 on.
    """
    difference_P = at_least_float32(chosen_P) - at_least_float32(rejected_P) - margin_P
    return -(weight_P * logsigmoid(difference_P)).sum()


def won_pairs(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """[P]: 1 where the chosen answer scores higher, a half for a tie, else 0; its weighted mean is the accuracy.

    Half, so that a model that scores everything alike is at chance and not at 0.
    """
    chosen_P, rejected_P = at_least_float32(chosen_P), at_least_float32(rejected_P)
    return torch.where(chosen_P == rejected_P, 0.5, (chosen_P > rejected_P).to(chosen_P.dtype))
