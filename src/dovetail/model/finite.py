"""Find weights that are not numbers.

Responsible for: finding a NaN or an infinity among weights. Not responsible for: the message about it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, or None."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
            continue
        # aminmax passes NaN on and, unlike isfinite, makes no tensor of the weight's size.
        if not bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all()):
            return name
    return None
