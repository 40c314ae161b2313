"""The plain forward of a model, the reference for every other, and the first layer in which another differs.

Responsible for: one whole sequence alone, with explicit positions, no cache and transformers' own attention
(SDPA; eager where scores are soft-capped, which SDPA leaves out), and the outputs of the layers.
Not responsible for: what is compared, and how far apart is too far (parity.py).

Shapes: T tokens of one sequence, V vocabulary, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dovetail.model.attention import has_attention_switch
from dovetail.model.layers import layer_list
from dovetail.model.shards import computing_device

Ids = Sequence[int] | Tensor
"""The tokens of one sequence."""


def plain_logits(model: PreTrainedModel, ids: Ids, *, last: int | None = None) -> Tensor:
    """Return the logits of one sequence, read whole, [T, V]; only the `last` rows if asked for."""
    logits: Tensor = _plain_output(model, ids, last=last).logits[0]
    return logits if last is None else logits[-last:]


def plain_hidden_states(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Return the backbone's output for one sequence, [T, D], no head applied."""
    hidden_TD: Tensor = _plain_output(model.base_model, ids).last_hidden_state[0]
    return hidden_TD


def _plain_output(module: Any, ids: Ids, *, last: int | None = None) -> Any:
    ids_1T = torch.as_tensor(ids, device=computing_device(module))[None]
    known = inspect.signature(module.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in known:
        extra["position_ids"] = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    if "use_cache" in known:
        extra["use_cache"] = False
    extra |= without_extras(module)
    if last is not None and "logits_to_keep" in known:
        extra["logits_to_keep"] = last
    return module(input_ids=ids_1T, **extra)


def without_extras(module: Any) -> dict[str, bool]:
    """Return arguments that switch off what a config may ask for beside logits: the routers' own training loss."""
    known = inspect.signature(module.forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in known else {}


@contextmanager
def attention_restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore the model's attention after the block."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use transformers' own attention within the block; classes that keep their own have nothing to switch."""
    with attention_restored(model):
        use_plain_attention(model)
        yield


def use_plain_attention(model: PreTrainedModel) -> None:
    """Switch a model to an attention of transformers that leaves nothing out, unless it has one already."""
    if not has_attention_switch(model):
        return
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    wanted = "eager" if softcap or not model._supports_sdpa else "sdpa"
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def first_difference(
    model: PreTrainedModel, ids: Sequence[int], seen: Mapping[str, Tensor], *, largest: float
) -> str | None:
    """Name the first of the outputs `seen` [up to T, D] that is off by more than `largest`, see `errors_T`, or None."""
    with plain_attention(model), layer_outputs(model) as calls:
        plain_logits(model, ids)
    for name, rows_TD in seen.items():
        error_T = errors_T(rows_TD, calls[name][0][0, : len(rows_TD)])
        wrong = (~(error_T <= largest)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            off = float(error_T[at])
            return f"The first layer that differs is {name}: its output is off by {off:.1%} at token {at}"
    return None


def errors_T(rows_TD: Tensor, expected_TD: Tensor) -> Tensor:
    """Return the norm of the difference as a fraction of the expected norm, token by token."""
    expected_TD = expected_TD.float()
    gap_T = torch.linalg.vector_norm(rows_TD.float() - expected_TD, dim=-1)
    expected_T: Tensor = torch.linalg.vector_norm(expected_TD, dim=-1)
    relative_T: Tensor = gap_T / expected_T.clamp(min=1e-12)
    return relative_T


@contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """Record within the block what the embeddings and each decoder layer put out, call after call."""
    prefix, found = layer_list(model) or ("", nn.ModuleList())
    layers = {f"{prefix}.{index}": layer for index, layer in enumerate(found)}
    calls: dict[str, list[Tensor]] = {name: [] for name in ["the embedding", *layers]}

    def remember_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls["the embedding"].append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def remember_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            calls[name].append((output[0] if isinstance(output, tuple) else output).detach().clone())

        return hook

    handles = [layer.register_forward_hook(remember_output(name)) for name, layer in layers.items()]
    handles += [
        layer.register_forward_pre_hook(remember_input, with_kwargs=True)
        for layer in list(layers.values())[:1]
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
