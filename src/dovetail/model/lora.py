"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through peft.

Responsible for: putting adapters on a model, running it without them (the reference policy), merging them.
Not responsible for: saving (save.py), dropout of the base model (dropout.py).

Adapters live in the precision of the weights they adapt; their float32 master copies live in the optimizer, as
those of all other weights do (training/optim.py).
"""

from __future__ import annotations

import warnings
from collections import Counter
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
from dovetail.telemetry.log import say, warn

ALL_LINEAR = "all-linear"
WORTHWHILE_SHARE = 0.5
"""The share of the weights beside the embeddings that adapters should reach; below it most cannot learn."""


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    seed: int,
) -> Any:
    """Return the model with adapters on the named linear layers of its backbone, or on all; the rest is frozen.

    The new weights are drawn from `seed`. A scalar model's head stays trainable, in a copy of its own.
    """
    linear = _linear_layers(model)
    if target_modules == ALL_LINEAR:
        targets = [name for name, layer in linear.items() if type(layer) in (nn.Linear, Conv1D)]
    else:
        targets = [name for name in linear if any(_matches(target, name) for target in target_modules)]
    unmatched = [
        target
        for target in (() if target_modules == ALL_LINEAR else target_modules)
        if not any(_matches(target, name) for name in linear)
    ]
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
        target_modules=targets,
        modules_to_save=["score"] if is_scalar else None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
    )
    settings._register_custom_module({nn.Linear: AdaptedLinear})
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{type(model).__name__} cannot have these adapters: {reason}",
                hint="name other layers in target_modules",
            ) from error
    _share_adapters_of_shared_weights(adapted)
    if not next(model.parameters()).is_meta:
        _say_reach(model, adapted)
    return adapted


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Switch the adapters off within the block; afterwards restore the model, and which weights learn."""
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
    """Return what a forward uses of each adapted layer's adapters; equal for two forwards that compute the same."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return tuple((layer.disable_adapters, layer.merged, tuple(layer.active_adapters)) for layer in layers)


def _set_learning(learning: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, was_learning in learning:
        parameter.requires_grad_(was_learning)


def merged_copy(
    model: Any, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Return a plain model whose weights include the adapters, added in `dtype` (default: that of the weights).

    It is always a copy: adding and subtracting again would not restore the weights bit for bit.
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
    _keep_one_of_shared(model)
    with warnings.catch_warnings(action="ignore"):  # that a shared weight is merged already
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
    """Return the linear layers of the text backbone that adapters can change, by their full names.

    The head is no target: its weight must stay plain for the fused log-probabilities. The towers of other inputs get
    no gradient from text. State-space mixers read the weights of their layers instead of calling them, all but the
    first: an adapter there would have no effect. A module that stands in several places would get one in
    only one of them.
    """
    backbone: Any = model.base_model
    kind = type(model.config.get_text_config())
    text_models = [m for m in backbone.modules() if isinstance(m, PreTrainedModel) and type(m.config) is kind]
    inside = {id(module) for module in (text_models or [backbone])[0].modules()}
    mixers = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "A_log"))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside
        and places[id(module)] == 1
        and isinstance(module, (nn.Linear, Conv1D))
        and (not name.startswith(mixers) or name.endswith(".in_proj"))
    }


def _leaf_names(linear: dict[str, nn.Module]) -> tuple[str, ...]:
    return tuple(sorted({name.rpartition(".")[2] for name in linear}))


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _adapted_layers(model: Any) -> dict[str, Any]:
    """Return every adapted layer by its name, once for each place where it stands."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")
    }


def _share_adapters_of_shared_weights(model: Any) -> None:
    """Give layers with one weight one adapter: two would be two corrections of the same numbers, and cannot merge."""
    first: dict[int, Any] = {}
    for layer in _adapted_layers(model).values():
        owner = first.setdefault(id(layer.get_base_layer().weight), layer)
        if owner is not layer:
            layer.lora_A, layer.lora_B = owner.lora_A, owner.lora_B


def _keep_one_of_shared(model: Any) -> None:
    """Let layers with one weight be merged once; raise ModelError if they have different adapters."""
    first: dict[int, tuple[str, Any]] = {}
    for name, layer in _adapted_layers(model).items():
        owner_name, owner = first.setdefault(id(layer.get_base_layer().weight), (name, layer))
        if owner is layer:
            continue
        if not all(
            torch.equal(one, other) for one, other in zip(_factors(owner), _factors(layer), strict=True)
        ):
            raise ModelError(
                f"{owner_name} and {name} share one weight and have two adapters: they cannot be merged",
                hint="use the adapter beside its base model",
            )
        layer.merged_adapters.extend(layer.active_adapters)


def _factors(layer: Any) -> list[torch.Tensor]:
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")]


def _say_reach(model: PreTrainedModel, adapted: Any) -> None:
    """Say which share of the backbone's weights the adapters change; warn where most of them are out of reach."""
    layers = [layer.get_base_layer().weight for layer in _adapted_layers(adapted).values()]
    reached = sum({id(weight): weight.numel() for weight in layers}.values())
    embeddings = {id(weight) for weight in model.get_input_embeddings().parameters()}
    heads = {
        id(p)
        for name in ("score", "lm_head", "embed_out")
        for p in getattr(model, name, nn.Module()).parameters()
    }
    total = sum(
        parameter.numel()
        for name, parameter in adapted.named_parameters()
        if "lora_" not in name and id(parameter) not in embeddings | heads
    )
    share = reached / max(total, 1)
    line = (
        f"LoRA: adapters on {len(layers)} layers, which hold {share:.0%} of the weights beside the embeddings"
    )
    if share < WORTHWHILE_SHARE:
        warn(
            line,
            hint="the rest, such as experts fused into one tensor, stays as it is; or train without lora",
        )
    else:
        say(line)
