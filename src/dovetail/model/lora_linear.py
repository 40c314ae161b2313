"""A linear layer with a low-rank adapter in five matrix products and nothing between them.

Responsible for: y = x W^T + b + s (x A^T) B^T and its gradients with the sums inside the products, so that no
tensor of the layer's width is read or written only to be scaled or added.
Not responsible for: which layers have adapters (lora.py), adapters with dropout, merged or switched off: peft's own
layer computes those.

Shapes: N tokens, I and O the layer's input and output width, R rank. Hu et al. 2021 (arXiv:2106.09685), eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class AdaptedLinear(Linear):
    """peft's layer around a frozen `nn.Linear`; same parameters, names and results."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [..., I] to [..., O]."""
        base = self.get_base_layer()
        name = self._only_adapter()
        if name is None or args or kwargs or _learns(base) or x.dtype != base.weight.dtype:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        y_NO: Tensor = _LowRankSum.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), base.weight, base.bias, down, up, self.scaling[name]
        )
        return y_NO.view(*x.shape[:-1], -1)

    def _only_adapter(self) -> str | None:
        """Return the adapter's name if it alone changes the result and computes in the base's precision, else None."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name: str = active[0]
        dropout = self.lora_dropout[name]
        is_plain = name not in self.lora_variant and (
            isinstance(dropout, nn.Identity) or not dropout.training
        )
        return (
            name
            if is_plain and self.lora_A[name].weight.dtype == self.get_base_layer().weight.dtype
            else None
        )


def _learns(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


class _LowRankSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        small_NR = x_NI @ down_RI.T
        y_NO = nn.functional.linear(x_NI, weight_OI, bias_O).addmm_(small_NR, up_OR.T, alpha=scaling)
        ctx.save_for_backward(x_NI, weight_OI, down_RI, up_OR, small_NR)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, down_RI, up_OR, small_NR = ctx.saved_tensors
        small_grad_NR = (grad_NO @ up_OR).mul_(ctx.scaling)
        grad_NI = None
        if ctx.needs_input_grad[0]:
            grad_NI = (grad_NO @ weight_OI).addmm_(small_grad_NR, down_RI)
        return grad_NI, None, None, small_grad_NR.T @ x_NI, (grad_NO.T @ small_NR).mul_(ctx.scaling), None
