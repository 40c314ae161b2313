"""The softmax over chunks of logits on a GPU: one pass forward, one pass backward.

Responsible for: what linear_logprobs.py computes from the logits of a chunk without a soft cap: log-probability,
log of the total and entropy of each row, and the gradient with respect to the logits in the weights' precision.
Not responsible for: the products before and after. linear_logprobs.py says in plain torch what these compute.

Shapes: C tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _forward(
    logits_ptr, ids_ptr, logprob_ptr, total_ptr, entropy_ptr, vocabulary, row_stride, scale,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    top = -float("inf")
    mass = 0.0
    moment = 0.0  # sum of exp(x - top) * x
    for start in tl.range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + place, mask=place < vocabulary, other=-float("inf")) * scale
        higher = tl.maximum(top, tl.max(x, 0))
        weight = tl.exp(x - higher)
        shrink = tl.exp(top - higher)
        mass = mass * shrink + tl.sum(weight, 0)
        if WITH_ENTROPY:
            moment = moment * shrink + tl.sum(tl.where(weight > 0.0, weight * x, 0.0), 0)
        top = higher
    total = top + tl.log(mass)
    chosen = tl.load(logits_ptr + tl.load(ids_ptr + row)) * scale
    tl.store(logprob_ptr + row, chosen - total)
    tl.store(total_ptr + row, total)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, total - moment / mass)


@triton.jit
def _backward(
    logits_ptr, ids_ptr, total_ptr, slope_ptr, grad_ptr, vocabulary, row_stride, scale, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_real = place < vocabulary
    x = tl.load(logits_ptr + row * row_stride + place, mask=is_real, other=-float("inf")) * scale
    slope = tl.load(slope_ptr + row)
    chance = tl.exp(x - tl.load(total_ptr + row))
    grad = slope * (tl.where(place == tl.load(ids_ptr + row), 1.0, 0.0) - chance)
    tl.store(grad_ptr + row * vocabulary + place, grad.to(grad_ptr.dtype.element_ty), mask=is_real)


def softmax_rows(
    logits_CV: Tensor, ids_C: Tensor, *, scale: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probability of the id, log of the total, entropy in nats) of softmax(scale * logits), [C] each.

    logits_CV and the results: float32. The entropy is not written unless asked for.
    """
    logprob_C, total_C, entropy_C = logits_CV.new_empty(3, len(logits_CV))
    _forward[(len(logits_CV),)](
        logits_CV, ids_C, logprob_C, total_C, entropy_C, logits_CV.shape[1], logits_CV.stride(0), scale,
        WITH_ENTROPY=with_entropy, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return logprob_C, total_C, entropy_C


def softmax_slopes(
    logits_CV: Tensor, ids_C: Tensor, total_C: Tensor, slope_C: Tensor, *, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return slope * ([is the id] - softmax(scale * logits)), [C, V] in `dtype`: d logprob / d logit times slope."""
    grad_CV = torch.empty(logits_CV.shape, dtype=dtype, device=logits_CV.device)
    vocabulary = logits_CV.shape[1]
    _backward[(triton.cdiv(vocabulary, _BLOCK), len(logits_CV))](
        logits_CV, ids_C, total_C, slope_C, grad_CV, vocabulary, logits_CV.stride(0), scale, BLOCK=_BLOCK, num_warps=8
    )  # fmt: skip
    return grad_CV
