"""One AdamW step over all weights on a GPU: every number of the state is read once and written once.

Responsible for: a single kernel that scales the gradient, moves both moments and the float32 weight, and
rounds the weight into the model's own.
Not responsible for: which weights there are, when to step (optim.py), the norm behind the scale (step.py).

Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2. With float32 moments and masters, and bf16 gradients
and weights, a weight costs 28 bytes of memory traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_COLUMNS = 6
"""Of the table, one row a weight: addresses of weight, gradient, both moments and image; number of elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightState:
    """One weight and what AdamW keeps of it; all contiguous and on one device."""

    weight: Tensor
    """float32, updated in place."""
    gradient: Tensor
    """float32, bf16 or fp16; read only."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """float32 scalar, steps taken so far, this one included."""
    image: Tensor | None
    """Becomes the weight, rounded to its own precision."""


@triton.jit
def _update(
    table_ptr, weight_of_block_ptr, start_of_block_ptr, scale_ptr, step_size_ptr, root_of_correction_ptr, shrink,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr,
    GRADIENT: tl.constexpr, IMAGE: tl.constexpr, HAS_IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    index = tl.load(weight_of_block_ptr + tl.program_id(0))
    row = table_ptr + index.to(tl.int64) * 6
    place = tl.load(start_of_block_ptr + tl.program_id(0)) + tl.arange(0, BLOCK)
    is_real = (place < tl.load(row + 5)) & (scale == scale)  # NaN: leave everything as it is
    weight_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    gradient_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRADIENT)), 16)
    mean_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    square_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    gradient = tl.load(gradient_ptr + place, mask=is_real).to(tl.float32) * scale
    mean = tl.load(mean_ptr + place, mask=is_real)
    mean += (gradient - mean) * (1 - beta1)
    square = tl.load(square_ptr + place, mask=is_real) * beta2 + gradient * gradient * (1 - beta2)
    weight = tl.load(weight_ptr + place, mask=is_real) * shrink
    spread = tl.sqrt_rn(square) / tl.load(root_of_correction_ptr + index) + eps
    weight -= tl.load(step_size_ptr + index) * mean / spread
    tl.store(mean_ptr + place, mean, mask=is_real)
    tl.store(square_ptr + place, square, mask=is_real)
    tl.store(weight_ptr + place, weight, mask=is_real)
    if HAS_IMAGE:
        image_ptr = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(IMAGE)), 16)
        tl.store(image_ptr + place, weight.to(IMAGE), mask=is_real)


def adamw_step(
    states: Sequence[WeightState],
    *,
    scale: Tensor,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Move all weights by one step; without waiting for the device.

    scale: float32 scalar on the device, multiplies every gradient; NaN leaves weights and moments as they are.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype | None], list[WeightState]] = {}
    for state in states:
        kinds.setdefault(
            (state.gradient.dtype, state.image.dtype if state.image is not None else None), []
        ).append(state)
    for (gradient, image), alike in kinds.items():
        steps = torch.stack([state.step for state in alike]).double()
        table, weight_of_block, start_of_block = _table(alike, scale.device)
        _update[(len(weight_of_block),)](
            table, weight_of_block, start_of_block, scale,
            (learning_rate / (1 - betas[0] ** steps)).float(), (1 - betas[1] ** steps).sqrt().float(),
            1 - learning_rate * weight_decay,
            beta1=betas[0], beta2=betas[1], eps=eps, GRADIENT=_triton_dtype(gradient),
            IMAGE=_triton_dtype(image or torch.float32), HAS_IMAGE=image is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip


def _table(states: Sequence[WeightState], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(addresses and sizes [weights, 6], weight of each block, first element of each block), on the device."""
    sizes = [state.weight.numel() for state in states]
    blocks = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes])
    rows = torch.tensor([
        [
            state.weight.data_ptr(), state.gradient.data_ptr(), state.exp_avg.data_ptr(),
            state.exp_avg_sq.data_ptr(), state.image.data_ptr() if state.image is not None else 0, size,
        ]
        for state, size in zip(states, sizes, strict=True)
    ])  # fmt: skip
    weight_of_block = torch.repeat_interleave(torch.arange(len(states)), blocks)
    first_block = blocks.cumsum(0) - blocks
    start_of_block = (torch.arange(len(weight_of_block)) - first_block[weight_of_block]) * _BLOCK
    return tuple(  # type: ignore[return-value]
        t.pin_memory().to(device, non_blocking=True) for t in (rows, weight_of_block, start_of_block)
    )


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
