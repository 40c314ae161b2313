"""Attention of answers that share one prompt, which is computed once.

Responsible for: the tokens of a batch that are computed, the place of each token's result among them, and attention:
each answer attends to its prompt and to itself.
Not responsible for: marking sequences that share a prompt (batches.py), calling the model (forward.py).

The first answer of a group is computed with the prompt, as one piece: `[prompt | a1]`, `a2`, ..., `an`. On a GPU two
calls of flash attention do the work: every piece attends to itself, causally; and a2 to an attend to all of the prompt.
Their results are joined by the logarithms of the sums of their exponentials, l1 and l2: with
l = log(exp(l1) + exp(l2)), out = exp(l1 - l) out1 + exp(l2 - l) out2. The backward pass of flash attention computes
P = exp(S - l) and sum(dout * out); given the joined out and l, each call returns its exact share of the gradients
(ring attention does the same, arXiv:2310.01889). Elsewhere, and where scores have a window or a soft cap, each sequence
gets its own copy of the prompt's queries, keys and values in that layer, and only attention is computed n times.

Shapes: T tokens of the batch, U tokens that are computed, N rows taken from those, H query heads, G query heads per
key head, K head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import PackedBatch, cumulative, moved
from dovetail.model.attention import AttentionCall, PackedLayout, flash_can


def taken(x_U: Tensor, row_N: Tensor) -> Tensor:
    """Return the given rows of x, some several times; their gradients add up in float32 at least, in a fixed order."""
    rows: Tensor = _Taken.apply(x_U, row_N)  # type: ignore[no-untyped-call]
    return rows


class SharedPromptLayout:
    """The place of each computed token in a batch with shared prompts; made once per forward."""

    def __init__(self, batch: PackedBatch) -> None:
        self._device = batch.token_ids_T.device
        self._shared = batch.shared_lengths
        self._whole = PackedLayout.of(batch)
        self.pieces = PackedLayout(self._bounds(batch.own_lengths), batch.own_lengths)
        """The first sequence of each group, then the answers of the others."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Compute causal attention within each sequence; query, key and value hold the computed tokens."""
        is_plain = call.softcap is None and (call.window is None or call.window >= self._whole.max_length)
        # squeeze and not [0]: the gradient of an index is a copy into zeros.
        inputs = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
        if is_plain and flash_can(query, value):
            joined: Tensor = _JoinedAttention.apply(*inputs, self, call.scaling)  # type: ignore[no-untyped-call]
            return joined[None]
        whole = [taken(x_UHK, self.row_T).transpose(0, 1)[None] for x_UHK in inputs]
        return self._whole.attend(whole[0], whole[1], whole[2], call).index_select(1, self.kept_U)

    @cached_property
    def kept_U(self) -> Tensor:
        """The index in T of each computed token."""
        bounds = itertools.pairwise(cumulative(self._whole.lengths))
        return self._indices(
            range(a + shared, b) for (a, b), shared in zip(bounds, self._shared, strict=True)
        )

    @cached_property
    def row_T(self) -> Tensor:
        """The index in U of each token's result."""
        rows: list[range] = []
        prompt = 0
        for (start, end), shared in zip(self._piece_bounds, self._shared, strict=True):
            prompt = prompt if shared else start
            rows += [range(prompt, prompt + shared), range(start, end)]
        return self._indices(rows)

    @cached_property
    def lengths_T(self) -> Tensor:
        """The length of each computed token's sequence."""
        return self._whole.lengths_T[self.kept_U]

    @cached_property
    def within_pieces(self) -> _FlashBounds:
        """The causal call, in which each piece attends to itself."""
        cu, longest = self.pieces.cu_seqlens_S1, self.pieces.max_length
        return _FlashBounds(cu, cu, longest, longest, is_causal=True)

    @cached_property
    def to_prompts(self) -> _FlashBounds:
        """The call in which the later answers of each group attend to all of its prompt."""
        queries, keys = [len(later) for _, later in self._groups], [len(prompt) for prompt, _ in self._groups]
        # Flash attention arranges the heads of single queries in a way of its own, which a bound of 2 rules out.
        longest = max(2, *queries)
        return _FlashBounds(self._bounds(queries), self._bounds(keys), longest, max(keys), is_causal=False)

    @cached_property
    def later_N(self) -> Tensor:
        """The index in U of the tokens of the later answers."""
        return self._indices(later for _, later in self._groups)

    @cached_property
    def prompt_N(self) -> Tensor:
        """The index in U of the tokens of the shared prompts."""
        return self._indices(prompt for prompt, _ in self._groups)

    @cached_property
    def _groups(self) -> list[tuple[range, range]]:
        """The pairs (shared prompt, all later answers to it) as ranges in U."""
        groups: list[tuple[range, range]] = []
        first = 0
        is_new = True
        for (start, end), shared in zip(self._piece_bounds, self._shared, strict=True):
            if not shared:
                first, is_new = start, True
            elif is_new:
                groups.append((range(first, first + shared), range(start, end)))
                is_new = False
            else:
                prompt, later = groups[-1]
                groups[-1] = prompt, range(later.start, end)
        return groups

    @property
    def _piece_bounds(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(cumulative(self.pieces.lengths)))

    def _bounds(self, lengths: Iterable[int]) -> Tensor:
        """Return cumulative lengths, int32, on the batch's device."""
        return moved(torch.tensor(cumulative(list(lengths)), dtype=torch.int32), self._device)

    def _indices(self, ranges: Iterable[range]) -> Tensor:
        """Return the numbers of all ranges, int64, on the batch's device."""
        return moved(torch.cat([torch.arange(r.start, r.stop) for r in ranges]), self._device)


@dataclass(frozen=True, slots=True)
class _FlashBounds:
    """The places of queries and keys in one call of flash attention over packed sequences."""

    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    is_causal: bool

    def forward(
        self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """Return (out [N, H, K], logarithms of the sums of exponentials [H, N] in float32)."""
        out_NHK, log_sums_HN, *_ = torch.ops.aten._flash_attention_forward(
            query_NHK, key_NHK, value_NHK, *self._arguments(), return_debug_mask=False, scale=scaling
        )
        return out_NHK, log_sums_HN

    def backward(
        self,
        grad_NHK: Tensor,
        inputs: list[Tensor],
        out_NHK: Tensor,
        log_sums_HN: Tensor,
        scaling: float | None,
    ) -> list[Tensor]:
        """Return the gradients of (query, key, value), given out and logarithms of the softmax over all keys."""
        no_dropout = torch.zeros(
            2, dtype=torch.uint64, device=grad_NHK.device
        )  # the state of its generator, unread
        return list(
            torch.ops.aten._flash_attention_backward(
                grad_NHK,
                *inputs,
                out_NHK,
                log_sums_HN,
                *self._arguments(),
                no_dropout,
                no_dropout[:0],
                scale=scaling,
            )
        )

    def _arguments(self) -> tuple[Any, ...]:
        return self.cu_queries, self.cu_keys, self.longest_query, self.longest_key, 0.0, self.is_causal


class _JoinedAttention(torch.autograd.Function):
    """Attention of packed pieces to themselves and of later answers to their prompts, joined."""

    @staticmethod
    def forward(
        ctx: Any,
        query_UHK: Tensor,
        key_UHK: Tensor,
        value_UHK: Tensor,
        layout: SharedPromptLayout,
        scaling: float | None,
    ) -> Tensor:
        out_UHK, log_sums_HU = layout.within_pieces.forward(query_UHK, key_UHK, value_UHK, scaling)
        later_N, prompt_N = layout.later_N, layout.prompt_N
        to_prompt_NHK, to_prompt_HN = layout.to_prompts.forward(
            query_UHK[later_N], key_UHK[prompt_N], value_UHK[prompt_N], scaling
        )
        to_itself_NHK, to_itself_HN = out_UHK[later_N], log_sums_HU[:, later_N]
        joined_HN = torch.logaddexp(to_prompt_HN, to_itself_HN)
        joined_NHK = to_prompt_NHK * _share(to_prompt_HN, joined_HN) + to_itself_NHK * _share(
            to_itself_HN, joined_HN
        )
        out_UHK.index_copy_(0, later_N, joined_NHK.to(out_UHK.dtype))
        log_sums_HU.index_copy_(1, later_N, joined_HN)
        ctx.save_for_backward(query_UHK, key_UHK, value_UHK, out_UHK, log_sums_HU)
        ctx.layout, ctx.scaling = layout, scaling
        return out_UHK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out_UHK, log_sums_HU = ctx.saved_tensors
        layout: SharedPromptLayout = ctx.layout
        grad_UHK = grads[0].contiguous()
        own = layout.within_pieces.backward(grad_UHK, inputs, out_UHK, log_sums_HU, ctx.scaling)
        later_N, prompt_N = layout.later_N, layout.prompt_N
        rows = later_N, prompt_N, prompt_N
        shared = layout.to_prompts.backward(
            grad_UHK[later_N],
            [x_UHK[row_N] for x_UHK, row_N in zip(inputs, rows, strict=True)],
            out_UHK[later_N],
            log_sums_HU[:, later_N].contiguous(),
            ctx.scaling,
        )
        for own_UHK, shared_NHK, row_N in zip(own, shared, rows, strict=True):
            own_UHK.index_copy_(0, row_N, own_UHK[row_N] + shared_NHK)
        return (*own, None, None)


def _share(log_sums_HN: Tensor, joined_HN: Tensor) -> Tensor:
    """Return the share that one of two calls has in the softmax over the keys of both, [N, H, 1]."""
    return (log_sums_HN - joined_HN).exp().T[..., None]


class _Taken(torch.autograd.Function):
    """Rows of a tensor, some of them several times."""

    @staticmethod
    def forward(ctx: Any, x_U: Tensor, row_N: Tensor) -> Tensor:
        ctx.save_for_backward(row_N)
        ctx.num_rows = len(x_U)
        return x_U.index_select(0, row_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (row_N,) = ctx.saved_tensors
        grad_N = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        grad_U = grad_N.new_zeros(ctx.num_rows, *grad_N.shape[1:])
        # On GPUs it sorts the rows; index_add_ would add in any order.
        return grad_U.index_put_((row_N,), grad_N, accumulate=True).to(grads[0].dtype), None
