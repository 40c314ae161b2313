"""Read a decoder's `Architecture` off the Hugging Face modules of the families known here.

Responsible for: which parameter plays which part in OPT, GPT-2, GPT-NeoX, and in Llama with its relatives (Mistral,
SmolLM, Qwen2, Qwen3, Gemma 2 and 3, Phi-3, Granite); saying why a model cannot be read.
Not responsible for: proving that the reading is right; fused.py compares numbers before it is used.

The arguments of each layer's attention beside queries, keys and values (scaling, window, soft cap) are recorded
from one forward of the modules, because the classes differ in where they keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.engine.architecture import (
    Architecture,
    Attention,
    FeedForward,
    Join,
    Layer,
    Linear,
    Norm,
    Rotary,
)
from dovetail.engine.forward import PackedModules
from dovetail.engine.parameters import (
    UnreadableError,
    activation_of,
    halves,
    linear,
    linears,
    norm_kind,
    norm_of,
    rotary_of,
    rounded,
)
from dovetail.model.attention import AttentionCall


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes with which a layer calls attention, and its call."""

    num_heads: int
    num_key_heads: int
    width: int
    call: AttentionCall


def architecture_of(modules: PackedModules) -> Architecture:
    """Describe the model; raise UnreadableError where a part of it is not known here."""
    model, name = modules.model, modules.name
    if name not in _READERS:
        raise UnreadableError(f"{name} is not among the families that it knows")
    if modules.group.size > 1:
        raise UnreadableError("several processes hold slices of the weights")
    parameters = list(model.parameters())
    if any(type(parameter.data) is not Tensor for parameter in parameters):
        raise UnreadableError("its parameters are not plain tensors")
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) != 1:
        raise UnreadableError("its parameters differ in precision or lie on several devices")
    return _READERS[name](model, _recorded_calls(modules))


class _Recorder:
    """A layout for one token that notes how each layer calls attention."""

    def __init__(self) -> None:
        self.calls: dict[int, Heads] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Note the call, and return the value: that is attention of a token to itself alone."""
        num_heads, num_key_heads, width = query.shape[1], key.shape[1], query.shape[-1]
        self.calls[call.layer] = Heads(num_heads, num_key_heads, width, call)
        return value.repeat_interleave(num_heads // num_key_heads, dim=1).transpose(1, 2)


def _recorded_calls(modules: PackedModules) -> list[Heads]:
    """Run one token through the modules and return each layer's call of attention."""
    recorder = _Recorder()
    zero_T = torch.zeros(1, dtype=torch.long, device=next(modules.model.parameters()).device)
    with torch.no_grad(), modules.our_attention():
        modules.next_logits(zero_T, zero_T, recorder)
    return [recorder.calls[layer] for layer in sorted(recorder.calls)]


def _opt(model: Any, calls: Sequence[Heads]) -> Architecture:
    decoder = model.model.decoder
    layers = []
    for layer, heads in zip(decoder.layers, calls, strict=True):
        inner = layer.self_attn
        attention = Attention(
            call=replace(
                heads.call, scaling=heads.call.scale(heads.width) * inner.scaling
            ),  # it multiplies its queries itself
            qkv=linears(inner.q_proj, inner.k_proj, inner.v_proj),
            out=linear(inner.out_proj),
            num_heads=heads.num_heads,
            num_key_heads=heads.num_key_heads,
            width=heads.width,
        )
        feed_forward = FeedForward(
            up=linears(layer.fc1), activation=activation_of(layer.activation_fn), down=linear(layer.fc2)
        )
        layers.append((attention, feed_forward))
    norms = [
        (norm_of(layer.self_attn_layer_norm), norm_of(layer.final_layer_norm)) for layer in decoder.layers
    ]
    last = () if decoder.final_layer_norm is None else (norm_of(decoder.final_layer_norm),)
    if decoder.layers[0].do_layer_norm_before:
        first, joined = _norms_before(layers, norms, last)
    else:
        first, joined = _norms_after(layers, norms)
    return Architecture(
        embedding_VD=decoder.embed_tokens.weight.data,
        positions_PD=decoder.embed_positions.weight.data,
        position_offset=decoder.embed_positions.offset,
        project_in=None if decoder.project_in is None else linear(decoder.project_in),
        project_out=None if decoder.project_out is None else linear(decoder.project_out),
        norm_kind=norm_kind(model),
        first=first,
        layers=joined,
    )


def _gpt2(model: Any, calls: Sequence[Heads]) -> Architecture:
    decoder = model.transformer
    if any(hasattr(layer, "crossattention") for layer in decoder.h):
        raise UnreadableError("it has cross-attention")
    layers = [
        (
            _attention(heads, linears(layer.attn.c_attn), layer.attn.c_proj),
            FeedForward(
                up=linears(layer.mlp.c_fc),
                activation=activation_of(layer.mlp.act),
                down=linear(layer.mlp.c_proj),
            ),
        )
        for layer, heads in zip(decoder.h, calls, strict=True)
    ]
    norms = [(norm_of(layer.ln_1), norm_of(layer.ln_2)) for layer in decoder.h]
    first, joined = _norms_before(layers, norms, (norm_of(decoder.ln_f),))
    return Architecture(
        embedding_VD=decoder.wte.weight.data,
        positions_PD=decoder.wpe.weight.data,
        norm_kind=norm_kind(model),
        first=first,
        layers=joined,
    )


def _gpt_neox(model: Any, calls: Sequence[Heads]) -> Architecture:
    decoder = model.gpt_neox
    rotary = rotary_of(decoder.rotary_emb)
    layers = [
        (
            replace(
                _attention(
                    heads,
                    linears(layer.attention.query_key_value),
                    layer.attention.dense,
                    rotary=rotary,
                ),
                is_interleaved=True,
            ),
            FeedForward(
                up=linears(layer.mlp.dense_h_to_4h),
                activation=activation_of(layer.mlp.act),
                down=linear(layer.mlp.dense_4h_to_h),
            ),
        )
        for layer, heads in zip(decoder.layers, calls, strict=True)
    ]
    norms = [
        (norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)) for layer in decoder.layers
    ]
    last = (norm_of(decoder.final_layer_norm),)
    if decoder.layers[0].use_parallel_residual:
        first, joined = _in_parallel(layers, norms, last)
    else:
        first, joined = _norms_before(layers, norms, last)
    return Architecture(
        embedding_VD=decoder.embed_in.weight.data, norm_kind=norm_kind(model), first=first, layers=joined
    )


def _llama_like(model: Any, calls: Sequence[Heads]) -> Architecture:
    decoder = model.model
    layers = []
    for layer, heads in zip(decoder.layers, calls, strict=True):
        inner, mlp = layer.self_attn, layer.mlp
        if hasattr(inner, "qkv_proj"):
            qkv, up, activation = linears(inner.qkv_proj), halves(linear(mlp.gate_up_proj)), mlp.activation_fn
        else:
            qkv = linears(inner.q_proj, inner.k_proj, inner.v_proj)
            up, activation = linears(mlp.gate_proj, mlp.up_proj), mlp.act_fn
        attention = _attention(
            heads,
            qkv,
            inner.o_proj,
            rotary=rotary_of(decoder.rotary_emb, getattr(inner, "layer_type", None)),
            query_norm=getattr(inner, "q_norm", None),
            key_norm=getattr(inner, "k_norm", None),
        )
        feed_forward = FeedForward(up=up, activation=activation_of(activation), down=linear(mlp.down_proj))
        layers.append((attention, feed_forward))
    has_branch_norms = hasattr(decoder.layers[0], "pre_feedforward_layernorm")
    before = "pre_feedforward_layernorm" if has_branch_norms else "post_attention_layernorm"
    norms = [(norm_of(layer.input_layernorm), norm_of(getattr(layer, before))) for layer in decoder.layers]
    first, joined = _norms_before(layers, norms, (norm_of(decoder.norm),))
    if has_branch_norms:
        joined = tuple(
            replace(
                layer,
                attention_join=Join(
                    branch_norm=norm_of(module.post_attention_layernorm), norms=layer.attention_join.norms
                ),
                feed_forward_join=Join(
                    branch_norm=norm_of(module.post_feedforward_layernorm),
                    norms=layer.feed_forward_join.norms,
                ),
            )
            for layer, module in zip(joined, decoder.layers, strict=True)
            if layer.attention_join is not None
        )
    return Architecture(
        embedding_VD=decoder.embed_tokens.weight.data,
        embedding_scale=_embedding_scale(decoder),
        norm_kind=norm_kind(model),
        first=first,
        layers=joined,
        residual_multiplier=getattr(decoder.layers[0], "residual_multiplier", 1.0),
    )


def _embedding_scale(decoder: Any) -> float:
    """Read the factor of embeddings; Gemma rounds it to the weights' precision, Granite does not."""
    embedding = decoder.embed_tokens
    if hasattr(embedding, "scalar_embed_scale"):
        return rounded(embedding.scalar_embed_scale, embedding.weight.dtype)
    return float(getattr(decoder, "embedding_multiplier", 1.0))


_READERS: dict[str, Callable[[Any, Sequence[Heads]], Architecture]] = {
    "OPTForCausalLM": _opt,
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    "LlamaForCausalLM": _llama_like,
    "MistralForCausalLM": _llama_like,
    "Qwen2ForCausalLM": _llama_like,
    "Qwen3ForCausalLM": _llama_like,
    "Gemma2ForCausalLM": _llama_like,
    "Gemma3ForCausalLM": _llama_like,
    "Phi3ForCausalLM": _llama_like,
    "GraniteForCausalLM": _llama_like,
}


def _norms_before(
    branches: Sequence[tuple[Attention, FeedForward]],
    norms: Sequence[tuple[Norm, Norm]],
    last: tuple[Norm, ...],
) -> tuple[Join, tuple[Layer, ...]]:
    """Arrange the usual order: a norm before each branch (`norms`, two a layer), and one at the end."""
    followed = [*((before,) for before, _ in norms[1:]), last]
    layers = tuple(
        Layer(
            attention=attention,
            attention_join=Join(norms=(before_feed_forward,)),
            feed_forward=feed_forward,
            feed_forward_join=Join(norms=following),
        )
        for (attention, feed_forward), (_, before_feed_forward), following in zip(
            branches, norms, followed, strict=True
        )
    )
    return Join(norms=norms[0][:1]), layers


def _norms_after(
    branches: Sequence[tuple[Attention, FeedForward]], norms: Sequence[tuple[Norm, Norm]]
) -> tuple[Join, tuple[Layer, ...]]:
    """Arrange OPT-350M's order: a norm of the stream after each branch is added."""
    layers = tuple(
        Layer(
            attention=attention,
            attention_join=Join(norms=(after_attention,), keeps_normed=True),
            feed_forward=feed_forward,
            feed_forward_join=Join(norms=(after_feed_forward,), keeps_normed=True),
        )
        for (attention, feed_forward), (after_attention, after_feed_forward) in zip(
            branches, norms, strict=True
        )
    )
    return Join(), layers


def _in_parallel(
    branches: Sequence[tuple[Attention, FeedForward]],
    norms: Sequence[tuple[Norm, Norm]],
    last: tuple[Norm, ...],
) -> tuple[Join, tuple[Layer, ...]]:
    """Arrange GPT-NeoX's order: both branches read the same stream, through a norm each."""
    layers = tuple(
        Layer(
            attention=attention,
            attention_join=None,
            feed_forward=feed_forward,
            feed_forward_join=Join(norms=following),
        )
        for (attention, feed_forward), following in zip(branches, [*norms[1:], last], strict=True)
    )
    return Join(norms=norms[0]), layers


def _attention(
    heads: Heads,
    qkv: tuple[Linear, ...],
    out: nn.Module,
    *,
    rotary: Rotary | None = None,
    query_norm: nn.Module | None = None,
    key_norm: nn.Module | None = None,
) -> Attention:
    return Attention(
        call=heads.call,
        qkv=qkv,
        out=linear(out),
        num_heads=heads.num_heads,
        num_key_heads=heads.num_key_heads,
        width=heads.width,
        query_norm=None if query_norm is None else norm_of(query_norm),
        key_norm=None if key_norm is None else norm_of(key_norm),
        rotary=rotary,
    )
