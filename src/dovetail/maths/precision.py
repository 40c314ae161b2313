"""The precision in which equations are computed.

Responsible for: the one cast that widens bfloat16 and float16 before a sum, an exponential or a difference.
Not responsible for: the compute dtype of the models, or master weights (training/optim.py).
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is already float64.

    Near -10 bfloat16 steps by 0.0625, so a probability ratio taken in it is off by 3 %. Float64 stays
    float64, so that a float64 model can check a whole training step to 1e-10.
    """
    return x if x.dtype == torch.float64 else x.float()
