"""Read the parameters of single Hugging Face modules: products with their adapters, norms, rotary positions.

Responsible for: these modules as records of architecture.py; UnreadableError for what the records cannot express.
Not responsible for: how modules make up a model (families.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dovetail.engine.architecture import Adapter, Linear, Norm, NormKind, Rotary

_STATIC_ROTARY = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}


class UnreadableError(Exception):
    """The reason why a model cannot be described; the modules then decode."""


def linears(*modules: nn.Module) -> tuple[Linear, ...]:
    """Read several linear layers."""
    return tuple(linear(module) for module in modules)


def linear(module: Any) -> Linear:
    """Read a linear layer, with the adapter around it."""
    adapter = _adapter(module) if isinstance(module, BaseTunerLayer) else None
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if type(base) not in (nn.Linear, Conv1D):  # those derived from them may store their weight otherwise
        raise UnreadableError(f"one of its layers is a {type(base).__name__}, not plain linear")
    weight = base.weight.data
    bias = None if base.bias is None else base.bias.data
    if adapter is not None and adapter.down_RI.dtype != weight.dtype:
        raise UnreadableError("an adapter has another precision than the weight beside it")
    return Linear(weight.T if isinstance(base, Conv1D) else weight, bias, adapter)


def _adapter(layer: Any) -> Adapter | None:
    """Read the only adapter in use of a LoRA layer."""
    if layer.disable_adapters and not layer.merged:
        return None
    if layer.merged:
        raise UnreadableError("an adapter is merged into its weight")
    names = [name for name in layer.active_adapters if isinstance(layer, LoraLayer) and name in layer.lora_A]
    if len(names) != 1 or len(layer.active_adapters) != 1:
        raise UnreadableError("a layer has other adapters than one of LoRA")
    (name,) = names
    if name in layer.lora_variant or layer.lora_bias[name]:
        raise UnreadableError("an adapter is a variant of LoRA")
    down, up = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    return Adapter(down, up, layer.scaling[name])


def halves(linear: Linear) -> tuple[Linear, ...]:
    """Split a weight that holds two products, gate first."""

    def half(part: int) -> Linear:
        bias = None if linear.bias_O is None else linear.bias_O.chunk(2)[part]
        adapter = linear.adapter
        if adapter is not None:
            adapter = replace(adapter, up_OR=adapter.up_OR.chunk(2)[part])
        return Linear(linear.weight_OI.chunk(2)[part], bias, adapter)

    return half(0), half(1)


def norm_of(module: Any) -> Norm:
    """Read the parameters of a norm."""
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise UnreadableError("a norm has no weight")
    bias = getattr(module, "bias", None)
    return Norm(module.weight.data, None if bias is None else bias.data)


def norm_kind(model: nn.Module) -> NormKind:
    """Find the one formula of all norms of the model."""
    modules: list[Any] = list(model.modules())
    kinds = {
        NormKind(
            float(module.eps if hasattr(module, "eps") else module.variance_epsilon),
            isinstance(module, nn.LayerNorm),
            1.0 if type(module).__name__.startswith("Gemma") else 0.0,
        )
        for module in modules
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    }
    if len(kinds) != 1:
        raise UnreadableError("its norms differ in kind")
    return kinds.pop()


def rotary_of(module: Any, layer_type: str | None = None) -> Rotary:
    """Read the frequencies of a layer; Gemma 3 has one set for each type of layer."""
    kind, prefix = module.rope_type, ""
    if isinstance(kind, dict):
        kind, prefix = kind[layer_type], f"{layer_type}_"
    if kind not in _STATIC_ROTARY:
        raise UnreadableError(
            f"its rotary positions are of the kind {kind}, which depends on the longest sequence"
        )
    return Rotary(getattr(module, f"{prefix}inv_freq"), float(getattr(module, f"{prefix}attention_scaling")))


def activation_of(module: nn.Module) -> str:
    """Name the activation that the module computes."""
    name = type(module).__name__
    if name not in _ACTIVATIONS:
        raise UnreadableError(f"its activation is {name}")
    return _ACTIVATIONS[name]


def rounded(number: float, dtype: torch.dtype) -> float:
    """Round a factor as the modules do before they multiply by it."""
    return float(torch.tensor(number, dtype=dtype))
