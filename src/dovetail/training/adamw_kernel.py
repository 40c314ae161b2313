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

_BLOCK, _WARPS = 1024, 8
"""Elements that a program moves, four a thread: of all sizes tried, the one that comes nearest to the floor."""
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightState:
    """One weight and what AdamW keeps of it; contiguous, on one device, at addresses that 16 divides."""

    weight: Tensor
    """float32, updated in place."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """The number of steps taken so far, float32 scalar."""
    image: Tensor | None
    """Becomes the weight, rounded to its own precision; its gradients have that precision or float32."""


@triton.jit
def _move(
    row, place, is_real, scale, step_size, root_of_correction, shrink,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr, IMAGE: tl.constexpr, HAS_IMAGE: tl.constexpr,
):  # fmt: skip
    weight_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16) + place
    mean_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16) + place
    square_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16) + place
    if tl.load(row + 6) != 0:
        gradient_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
        gradient = tl.load(gradient_ptr + place, mask=is_real)
    else:
        narrow_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(IMAGE)), 16)
        gradient = tl.load(narrow_ptr + place, mask=is_real).to(tl.float32)
    gradient *= scale
    mean = tl.load(mean_ptr, mask=is_real)
    mean += (gradient - mean) * (1 - beta1)
    square = tl.load(square_ptr, mask=is_real) * beta2 + gradient * gradient * (1 - beta2)
    weight = tl.load(weight_ptr, mask=is_real) * shrink
    weight -= step_size * mean / (tl.sqrt_rn(square) / root_of_correction + eps)
    tl.store(mean_ptr, mean, mask=is_real)
    tl.store(square_ptr, square, mask=is_real)
    tl.store(weight_ptr, weight, mask=is_real)
    if HAS_IMAGE:
        image_ptr = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(IMAGE)), 16)
        tl.store(image_ptr + place, weight.to(IMAGE), mask=is_real)


@triton.jit
def _update(
    table_ptr, weight_of_block_ptr, first_block_ptr, scale_ptr, step_size_ptr, root_of_correction_ptr, shrink,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr,
    IMAGE: tl.constexpr, HAS_IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    index = tl.load(weight_of_block_ptr + tl.program_id(0))
    row = table_ptr + index.to(tl.int64) * 7
    start = (tl.program_id(0) - tl.load(first_block_ptr + index)).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    size = tl.load(row + 5)
    step_size = tl.load(step_size_ptr + index)
    root = tl.load(root_of_correction_ptr + index)
    if scale == scale:  # NaN: leave everything as it is
        if start + BLOCK <= size:  # without a mask loads and stores are as wide as they can be
            _move(row, place, None, scale, step_size, root, shrink, beta1, beta2, eps, IMAGE, HAS_IMAGE)
        else:
            real = place < size
            _move(row, place, real, scale, step_size, root, shrink, beta1, beta2, eps, IMAGE, HAS_IMAGE)


class OnePassAdamW:
    """The update of weights whose images are all of one precision, or that all have none."""

    def __init__(self, states: Sequence[WeightState], *, betas: tuple[float, float], eps: float) -> None:
        self._states = tuple(states)
        self._betas = betas
        self._eps = eps
        image = states[0].image
        self._image_dtype = _DTYPES[torch.float32 if image is None else image.dtype]
        device = states[0].weight.device
        blocks = torch.tensor([triton.cdiv(state.weight.numel(), _BLOCK) for state in states])
        self._first_block = (blocks.cumsum(0) - blocks).int().to(device)
        self._weight_of_block = torch.repeat_interleave(torch.arange(len(states)), blocks).int().to(device)

    def step(
        self, gradients: Sequence[Tensor | None], *, scale: Tensor, learning_rate: float, weight_decay: float
    ) -> None:
        """Move the weights that have a gradient by one step; without waiting for the device.

        gradients: one a weight, in the order given. scale: float32 scalar on the device, multiplies every gradient;
        NaN leaves weights and moments as they are.
        """
        gradients = [None if gradient is None else _at_a_round_address(gradient) for gradient in gradients]
        moved = [state.step for state, g in zip(self._states, gradients, strict=True) if g is not None]
        if not moved:
            return
        torch._foreach_add_(moved, [(~scale.isnan()).float()] * len(moved))
        steps = torch.stack([state.step for state in self._states]).double().clamp_(min=1.0)
        _update[(len(self._weight_of_block),)](
            self._table(gradients), self._weight_of_block, self._first_block, scale,
            (learning_rate / (1 - self._betas[0] ** steps)).float(), (1 - self._betas[1] ** steps).sqrt().float(),
            1 - learning_rate * weight_decay, beta1=self._betas[0], beta2=self._betas[1], eps=self._eps,
            IMAGE=self._image_dtype, HAS_IMAGE=self._states[0].image is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip

    def _table(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Build the table of the kernel, one row per weight.

        A row holds the addresses of weight, gradient, both moments and image, the number of elements, and whether the
        gradient is float32. It is made anew each step, because offloaded state comes back to other addresses.
        """
        rows = [
            [
                state.weight.data_ptr(), 0 if gradient is None else gradient.data_ptr(), state.exp_avg.data_ptr(),
                state.exp_avg_sq.data_ptr(), 0 if state.image is None else state.image.data_ptr(),
                0 if gradient is None else state.weight.numel(),
                gradient is not None and gradient.dtype == torch.float32,
            ]
            for state, gradient in zip(self._states, gradients, strict=True)
        ]  # fmt: skip
        table = torch.tensor(rows, dtype=torch.int64).pin_memory()
        return table.to(self._states[0].weight.device, non_blocking=True)


def _at_a_round_address(gradient: Tensor) -> Tensor:
    gradient = gradient.contiguous()
    return gradient if gradient.data_ptr() % 16 == 0 else gradient.clone()
