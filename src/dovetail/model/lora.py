"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through peft.

Responsible for: putting adapters on a model, running it without them (the reference policy), merging them.
Not responsible for: saving (save.py), dropout of the base model (dropout.py).

Adapters live in the precision of the weights they adapt; their float32 master copies live in the optimizer, as
those of all other weights do (training/optim.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dovetail.errors import ModelError
from dovetail.model.copies import copy_of
from dovetail.model.lora_linear import AdaptedLinear
from dovetail.model.sample_output import LARGEST_GAP, relative_gap, sample_output

ALL_LINEAR = "all-linear"


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    seed: int,
) -> Any:
    """The model with adapters on the named linear layers of its backbone, or on all; the rest is frozen.

    The new weights are drawn from `seed`. A scalar model's head stays trainable, in a copy of its own.
    """
    linear = _linear_layers(model)
    targets = _leaf_names(linear) if target_modules == ALL_LINEAR else tuple(target_modules)
    unmatched = [name for name in targets if not _matches(name, linear)]
    if unmatched or not targets:
        raise ModelError(
            f"{type(model).__name__} has no linear layer named {', '.join(unmatched) or 'at all'}",
            hint=f"target_modules may name: {', '.join(_leaf_names(linear))}",
        )
    is_scalar = hasattr(model, "score")
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS if is_scalar else TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=["score"] if is_scalar else None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
    )
    settings._register_custom_module({nn.Linear: AdaptedLinear})
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return get_peft_model(model, settings, autocast_adapter_dtype=False)


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """The model as it was before `add_lora`; afterwards as it was on entry, also which weights learn."""
    if not isinstance(model, PeftModel):
        raise ModelError(
            "this model has no adapter to switch off", hint="keep a frozen copy as the reference"
        )
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            _set_learning(learning)  # peft sets these as it sees fit
            yield
    finally:
        _set_learning(learning)


def adapters_in_use(model: nn.Module) -> tuple[Any, ...]:
    """For each adapted layer, what of it a forward uses; equal for two forwards that compute the same."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return tuple((layer.disable_adapters, layer.merged, tuple(layer.active_adapters)) for layer in layers)


def _set_learning(learning: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, was_learning in learning:
        parameter.requires_grad_(was_learning)


def merged_copy(
    model: Any, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A plain model whose weights include the adapters, added in `dtype` (default: that of the weights).

    Always from a copy: adding and subtracting again would not give back the weights bit for bit.
    """
    copied = copy_of(model, device=torch.device(device))
    if dtype is not None:  # not copied.to(dtype): that would round the rotary frequencies, too
        for parameter in copied.parameters():
            parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else None)
    return merge(copied)


def merge(model: Any) -> PreTrainedModel:
    """Add the adapters to the weights, in place, and return the plain model.

    Raises ModelError if it does not compute what the model did with its adapters.
    """
    before = sample_output(model)
    merged: PreTrainedModel = model.merge_and_unload()
    gap = relative_gap(before, sample_output(merged))
    if not gap <= LARGEST_GAP:
        raise ModelError(
            f"merging the adapters into {type(merged).__name__} changes its output by {100 * gap:.1f} %: "
            "they cannot be merged",
            hint="use the adapter beside its base model, or train without adapters on these layers",
        )
    return merged


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Of the backbone; the head is no target, its weight must stay plain for the fused log-probabilities."""
    named = model.base_model.named_modules()
    return {name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D))}


def _leaf_names(linear: dict[str, nn.Module]) -> tuple[str, ...]:
    return tuple(sorted({name.rpartition(".")[2] for name in linear}))


def _matches(target: str, linear: dict[str, nn.Module]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in linear)
