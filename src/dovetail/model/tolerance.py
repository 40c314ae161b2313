"""The differences between two forwards of one model that rounding explains.

Responsible for: the tolerances of each dtype, and the judgement over many tokens.
Not responsible for: the forwards (plain_forward.py, forward.py).

In half precision a mixture of experts sends some tokens to other experts when anything is rounded another way. So there
the plain forward is run once more with its embeddings changed in the last bit: how far its own output moves is
what rounding does to this model. Neighbouring tokens are judged together, by their median, because a wrong forward
is wrong for many.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TIMES_NOISE = 4
_NEIGHBOURS = 4


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest differences between numbers of one dtype that rounding explains."""

    largest: float
    """Nats: the log-probability of any token, and how far its logit may lie below the best one."""
    mean: float
    """Nats: the mean over all tokens. It finds errors that are small at every token."""
    hidden: float
    """The norm of the difference of a layer's output, as a fraction of its norm, at any token."""


TOLERANCES = {
    torch.float64: Tolerance(largest=1e-5, mean=1e-6, hidden=1e-6),  # transformers keeps some float32 inside
    torch.float32: Tolerance(largest=1e-2, mean=1e-3, hidden=1e-3),
    torch.float16: Tolerance(largest=0.1, mean=0.02, hidden=1e-2),
    torch.bfloat16: Tolerance(largest=0.5, mean=0.1, hidden=5e-2),
}


def is_exact(dtype: torch.dtype) -> bool:
    """Return whether rounding is too small to choose another expert."""
    return dtype in (torch.float32, torch.float64)


def has_experts(config: Any) -> bool:
    """Return whether a model's config says that a router sends each token to some of several experts."""
    return any("experts" in name and isinstance(n, int) and n > 1 for name, n in config.to_dict().items())


def first_beyond(errors_T: Tensor, allowed: float, noise_T: Tensor | None) -> int | None:
    """Return the first token whose error rounding does not explain, None if there is none.

    noise_T: the errors that rounding makes in half precision, of the same kind; None: every token counts.
    """
    errors_T = errors_T.nan_to_num(nan=torch.inf)
    if noise_T is not None:
        allowed = max(allowed, _TIMES_NOISE * float(noise_T.mean()))
        fill = -len(errors_T) % _NEIGHBOURS
        padded_T = torch.cat([errors_T, errors_T[-1:].expand(fill)])
        medians = padded_T.view(-1, _NEIGHBOURS).median(dim=1).values
        errors_T = medians.repeat_interleave(_NEIGHBOURS)[: len(errors_T)]
    beyond = (errors_T > allowed).nonzero()
    return int(beyond[0]) if len(beyond) else None


def is_explained(errors_T: Tensor, allowed_mean: float, noise_T: Tensor | None) -> bool:
    """Return whether rounding explains the mean of the errors; it never explains NaN."""
    if noise_T is not None:
        allowed_mean = max(allowed_mean, _TIMES_NOISE * float(noise_T.mean()))
    return float(errors_T.mean()) <= allowed_mean


@contextmanager
def nudged_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Make every other number of an embedding larger by its last bit within the block."""
    embeddings: Any = model.get_input_embeddings()

    def nudge(_: Any, __: Any, output: Tensor) -> Tensor:
        factor_D = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        factor_D[::2] += torch.finfo(output.dtype).eps
        return output * factor_D

    handle = embeddings.register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()
