"""Attention over packed sequences, registered with transformers under the name "dovetail".

Responsible for: the registered function, switching a model to it, and causal attention inside each sequence
of a packed batch (flash attention on GPUs; on CPUs one sequence after the other; else, as with soft-capped scores,
a padded rectangle, which a batch of equal lengths is without padding).
Not responsible for: calling the model (forward.py), or attention to cached keys (engine/).

The one seam: every forward passes an object `layout`; whatever it is, its `attend` does the work. Training
and scoring pass a `PackedLayout`; the engine passes layouts of its own that also keep keys and values.

Attention dropout does not exist here (the loaders turn all dropout off).

Shapes: T packed tokens, S sequences, L longest sequence, H query heads, G query heads per key head,
K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.batches import PackedBatch
from dovetail.errors import ModelError
from dovetail.model.rope import give_sequences_their_rope

ATTENTION_NAME = "dovetail"

# What some classes hand to attention beyond the arguments below, and what would be wrong to leave out.
_UNKNOWN_TERMS = ("position_bias", "s_aux")


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The layer that asks for attention, and the numbers of its scores."""

    layer: int = 0
    scaling: float | None = None
    """The factor of query times key; None = 1 / sqrt(head width)."""
    window: int | None = None
    """The number of last tokens that a token attends to, itself included; None = all."""
    softcap: float | None = None
    """The bound of a score, which approaches it as a tanh does (Gemma 2); None = no bound."""

    def scale(self, width: int) -> float:
        """Return the factor for heads of this width."""
        return width**-0.5 if self.scaling is None else self.scaling


class Layout(Protocol):
    """The object that a forward passes as `layout`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Return [1, T, H, K] for query [1, H, T, K], key and value [1, H / G, T, K]."""
        ...


class PackedLayout:
    """The place of each sequence in one packed batch; made once per forward and shared by all layers."""

    def __init__(self, cu_seqlens_S1: Tensor, lengths: tuple[int, ...]) -> None:
        self.cu_seqlens_S1 = cu_seqlens_S1
        self.lengths = lengths
        self.max_length = max(lengths)
        self._window_masks: dict[int, Tensor] = {}

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedLayout:
        """Return the layout of a batch, on its device."""
        return cls(batch.cu_seqlens_S1, batch.lengths)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Compute causal attention within each sequence; a window counts the token itself."""
        if call.window is not None and call.window >= self.max_length:
            call = replace(call, window=None)
        is_plain = call.softcap is None and call.window is None
        if (
            call.softcap is None
            and flash_can(query, value)
            and not (is_plain and self._trains_a_rectangle(query, key))
        ):
            return flash_attention(query, key, value, self, self, call)
        if call.softcap is None and not query.is_cuda:
            return self._one_by_one(query, key, value, call)
        query_SHLK, key_SHLK, value_SHLK = self.padded(query), self.padded(key), self.padded(value)
        allowed_LL = None if is_plain else self._window_mask(call.window or self.max_length)
        out_SHLK = padded_attention(query_SHLK, key_SHLK, value_SHLK, call, allowed=allowed_LL)
        return self.packed(out_SHLK)

    def _trains_a_rectangle(self, query: Tensor, key: Tensor) -> bool:
        """Return whether several sequences of one length are trained on.

        torch has a faster kernel for them than flash attention, but takes up to a second to prepare it for each new
        shape. Outside of training, and with one sequence, shapes change too often.
        """
        return (
            query.requires_grad
            and self.is_rectangular
            and len(self.lengths) > 1
            and query.shape[1] == key.shape[1]
        )

    def _one_by_one(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Attend in each sequence alone: on a CPU calls are cheap, and half a rectangle or more is padding."""
        parts = [torch.split_with_sizes(x, self.lengths, dim=2) for x in (query, key, value)]
        mask_LL = None
        if call.window is not None:
            # As numbers, once: of a bool mask, each call would make and keep a copy in numbers.
            mask_LL = query.new_zeros(self.max_length, self.max_length)
            mask_LL.masked_fill_(~self._window_mask(call.window), -torch.inf)
        out_1HTK = [
            scaled_dot_product_attention(
                query_1HLK,
                key_1HLK,
                value_1HLK,
                attn_mask=None if mask_LL is None else mask_LL[:length, :length],
                is_causal=mask_LL is None,
                scale=call.scaling,
                enable_gqa=True,
            )
            for query_1HLK, key_1HLK, value_1HLK, length in zip(*parts, self.lengths, strict=True)
        ]
        return torch.cat(out_1HTK, dim=2).transpose(1, 2)

    def padded(self, x: Tensor) -> Tensor:
        """Pad [1, H, T, K] to [S, H, L, K], sequences aligned left; real tokens never see the padding."""
        x_THK = x.squeeze(0).transpose(0, 1)
        if not self.is_rectangular:
            x_THK = _Pad.apply(x_THK, *self.padding_indices)  # type: ignore[no-untyped-call]
        x_SLHK = x_THK.view(len(self.lengths), self.max_length, *x_THK.shape[1:])
        return x_SLHK.transpose(1, 2)

    def packed(self, x_SHLK: Tensor) -> Tensor:
        """Pack [S, H, L, K] to [1, T, H, K]: the inverse of `padded`, with tokens before heads."""
        x_THK = x_SHLK.transpose(1, 2).flatten(0, 1)
        if not self.is_rectangular:
            x_THK = _Unpad.apply(x_THK, self.padding_indices[1])  # type: ignore[no-untyped-call]
        return x_THK[None]

    @cached_property
    def lengths_T(self) -> Tensor:
        """The length of each token's sequence."""
        lengths_S = self.cu_seqlens_S1.diff().long()
        return lengths_S.repeat_interleave(lengths_S, output_size=sum(self.lengths))

    @cached_property
    def is_rectangular(self) -> bool:
        """All sequences have one length, so that they need no padding and no copies."""
        return min(self.lengths) == self.max_length

    @cached_property
    def padding_indices(self) -> tuple[Tensor, Tensor]:
        """The pair (for each place of the padded rectangle, a token of its sequence; for each token, its place)."""
        device = self.cu_seqlens_S1.device
        starts_S = self.cu_seqlens_S1[:-1].long()
        lengths_S = self.cu_seqlens_S1[1:].long() - starts_S
        columns_L = torch.arange(self.max_length, device=device)
        token_SL = starts_S[:, None] + torch.minimum(columns_L, lengths_S[:, None] - 1)
        # Token t of sequence s sits in row s, column t - start of s.
        first_place_S = torch.arange(len(self.lengths), device=device) * self.max_length - starts_S
        num_tokens = sum(self.lengths)
        place_T = first_place_S.repeat_interleave(lengths_S, output_size=num_tokens)
        return token_SL.flatten(), place_T + torch.arange(num_tokens, device=device)

    def _window_mask(self, window: int) -> Tensor:
        """Return the mask, bool [L, L], True where a token may attend: the last `window` tokens, itself included."""
        if window not in self._window_masks:
            ones_LL = torch.ones(
                self.max_length, self.max_length, dtype=torch.bool, device=self.cu_seqlens_S1.device
            )
            self._window_masks[window] = ones_LL.tril() & ones_LL.triu(1 - window)
        return self._window_masks[window]


def packed_attention(  # noqa: PLR0913 -- the signature is that of transformers
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as `layout` says; transformers calls this in every attention layer. Masks and dropout are ignored."""
    if layout is None:
        raise ModelError(
            "a model that was switched to packed attention was called without a `layout`",
            hint='call it through dovetail.model.forward, or model.set_attn_implementation("sdpa") first',
        )
    for name in _UNKNOWN_TERMS:
        if others.get(name) is not None:
            raise ModelError(f"{type(module).__name__} adds `{name}` to attention, which packing cannot do")
    call = AttentionCall(getattr(module, "layer_idx", 0), scaling, sliding_window, softcap)
    return layout.attend(query, key, value, call), None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch a model (not peft-wrapped) to the registered function; the saved config does not remember it."""
    if model.config._attn_implementation != ATTENTION_NAME:
        give_sequences_their_rope(model.base_model)
        model.set_attn_implementation(ATTENTION_NAME)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asking: PackedLayout,
    asked: PackedLayout,
    call: AttentionCall,
) -> Tensor:
    """Compute causal attention of packed queries to packed keys of the same sequences, their last tokens aligned.

    query [1, H, T, K] lies as `asking` says, key and value [1, H / G, T', K] as `asked` does; [1, T, H, K].
    """
    # squeeze and not [0]: the gradient of an index is a copy into zeros.
    query_THK, key_THK, value_THK = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # The operator behind torch.nn.attention.varlen, whose Python takes longer than the kernel.
    out_THK, *_ = torch.ops.aten._flash_attention_forward(
        query_THK,
        key_THK,
        value_THK,
        asking.cu_seqlens_S1,
        asked.cu_seqlens_S1,
        asking.max_length,
        asked.max_length,
        dropout_p=0.0,
        is_causal=call.window is None,
        return_debug_mask=False,
        scale=call.scaling,
        window_size_left=-1 if call.window is None else call.window - 1,  # the token itself is not counted
        window_size_right=0,
    )
    assert isinstance(out_THK, Tensor)
    return out_THK[None]


def padded_attention(
    query_SHLK: Tensor,
    key_SHLK: Tensor,
    value_SHLK: Tensor,
    call: AttentionCall,
    *,
    allowed: Tensor | None,
) -> Tensor:
    """Compute attention over a padded rectangle, [S, H, L, K].

    allowed: bool, broadcast to [S, H, L, L'], True where a token may attend; None = causal, without a window or cap.
    """
    if call.softcap is None:
        return _sdpa(query_SHLK, key_SHLK, value_SHLK, scaling=call.scaling, allowed=allowed)
    assert allowed is not None
    return _softcapped(
        query_SHLK,
        key_SHLK,
        value_SHLK,
        scale=call.scale(query_SHLK.shape[-1]),
        softcap=call.softcap,
        allowed=allowed,
    )


def flash_can(query: Tensor, value: Tensor) -> bool:
    """Return whether flash attention can run: on a GPU, half precision, one head width, a multiple of 8 up to 256."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
    )


def _sdpa(
    query_SHLK: Tensor, key_SHLK: Tensor, value_SHLK: Tensor, *, scaling: float | None, allowed: Tensor | None
) -> Tensor:
    return scaled_dot_product_attention(
        query_SHLK,
        _for_each_query_head(key_SHLK, query_SHLK.shape[1]),
        _for_each_query_head(value_SHLK, query_SHLK.shape[1]),
        attn_mask=allowed,
        is_causal=allowed is None,
        scale=scaling,
    )


def _softcapped(
    query_SHLK: Tensor,
    key_SHLK: Tensor,
    value_SHLK: Tensor,
    *,
    scale: float,
    softcap: float,
    allowed: Tensor,
) -> Tensor:
    """Compute softmax(c * tanh(q k / c)) v, softmax in float32 at least (Gemma 2, arXiv:2408.00118, section 2)."""
    keys = _for_each_query_head(key_SHLK, query_SHLK.shape[1])
    scores_SHLL = torch.tanh(query_SHLK @ keys.transpose(2, 3) * (scale / softcap)) * softcap
    scores_SHLL = scores_SHLL.masked_fill(~allowed, -torch.inf)
    float_type = torch.promote_types(scores_SHLL.dtype, torch.float32)
    weights_SHLL = scores_SHLL.softmax(dim=-1, dtype=float_type).to(query_SHLK.dtype)
    return weights_SHLL @ _for_each_query_head(value_SHLK, query_SHLK.shape[1])


def _for_each_query_head(x_SHLK: Tensor, num_heads: int) -> Tensor:
    """Repeat the key heads so that each query head has its own, which every kernel behind SDPA can read."""
    groups = num_heads // x_SHLK.shape[1]
    return x_SHLK if groups == 1 else x_SHLK.repeat_interleave(groups, dim=1)


class _Pad(torch.autograd.Function):
    """The rows of a packed tensor, laid out as a padded rectangle.

    Backward is a plain gather and not index_select's scatter-add: the rows that fill the rectangle never reach
    a real token, so their gradient is zero and need not be added: faster, and the same every time on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_place: Tensor, place_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(place_of_token)
        return x.index_select(0, token_of_place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_of_token,) = ctx.saved_tensors
        return grads[0].index_select(0, place_of_token), None, None


class _Unpad(torch.autograd.Function):
    """The real rows of a padded rectangle; backward leaves zeros in the places that only filled it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(place_of_token)
        ctx.num_places = x.shape[0]
        return x.index_select(0, place_of_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place_of_token,) = ctx.saved_tensors
        grad_x = grads[0].new_zeros(ctx.num_places, *grads[0].shape[1:])
        return grad_x.index_copy_(0, place_of_token, grads[0]), None


def has_attention_switch(model: PreTrainedModel) -> bool:
    """Return whether the class declares that its attention can be replaced."""
    return bool(getattr(model, "_supports_attention_backend", False) and model._can_set_attn_implementation())


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, lambda *_, **__: None)
