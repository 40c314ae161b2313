"""Packed toy batches as every other part of the system makes them.

Responsible for: `Experience` records with ragged prompts and answers, and language models that are plain tables, so
that each number of theirs can be written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from dovetail.batches import Experience, pack

LENGTHS = ((3, 5), (1, 1), (4, 2), (2, 9), (6, 3), (1, 7), (2, 4))
"""(prompt, answer) lengths of seven answers: a number that no even micro-batch count divides."""


@dataclass(frozen=True)
class Layout:
    """Where prompts and answers lie."""

    sequences: list[list[int]]
    masks: list[list[bool]]


def layout(lengths: Sequence[tuple[int, int]], *, token: int = 1) -> Layout:
    """Sequences of `token`, prompt first; actions marked."""
    return Layout(
        sequences=[[token] * (prompt + answer) for prompt, answer in lengths],
        masks=[[False] * prompt + [True] * answer for prompt, answer in lengths],
    )


def experience(seed: int = 0) -> Experience:
    """Seven answers with random columns in float64; prompts hold NaN wherever nothing may look."""
    generator = torch.Generator().manual_seed(seed)
    plan = layout(LENGTHS)
    num_tokens = sum(len(ids) for ids in plan.sequences)
    ids = torch.randint(0, 11, (num_tokens,), generator=generator).split([len(s) for s in plan.sequences])
    packed = pack([row.tolist() for row in ids], plan.masks)

    def column(scale: float = 1.0) -> Tensor:
        values_T = scale * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
        return values_T.masked_fill(~packed.mask_T, float("nan"))

    return Experience(
        token_ids_T=packed.token_ids_T,
        cu_seqlens_S1=packed.cu_seqlens_S1,
        lengths=packed.lengths,
        mask_T=packed.mask_T,
        target_counts=packed.target_counts,
        sampled_logprobs_T=column(),
        old_logprobs_T=column(),
        reference_logprobs_T=column(),
        old_values_T=column(),
        rewards_T=column(),
        advantages_T=column(),
        returns_T=column(2.0),
        scores_S=torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64),
        finished_S=torch.tensor([i % 3 != 0 for i in range(len(LENGTHS))]),
    )


def actions_of(column_T: Tensor, mask_T: Tensor) -> list[float]:
    """The marked entries of a column as Python floats."""
    return [x for x, counts in zip(column_T.tolist(), mask_T.tolist(), strict=True) if counts]


def table_model(logits: Tensor) -> LlamaForCausalLM:
    """A causal language model whose logits after token v are row v of a table [states, vocabulary].

    It has no layers, and the hidden state of token v is the unit vector v.
    """
    num_states, vocabulary = logits.shape
    model = LlamaForCausalLM(_without_layers(vocabulary, num_states)).to(logits.dtype)
    _show_tokens(model.model, num_states)
    model.lm_head.weight.data.zero_()[:, :num_states] = logits.T
    return model.eval()


def value_model(values: Tensor) -> LlamaForSequenceClassification:
    """A scalar model whose value at token v is entry v of a row."""
    config = _without_layers(len(values), len(values))
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).to(values.dtype)
    _show_tokens(model.model, len(values))
    model.score.weight.data.zero_()[0, : len(values)] = values
    return model.eval()


def _without_layers(vocabulary: int, num_states: int) -> LlamaConfig:
    width = num_states + num_states % 2
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        rms_norm_eps=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _show_tokens(backbone: Any, num_states: int) -> None:
    """Unit vectors, which the norm stretches by the root of their width and its weight takes back."""
    embedding, width = backbone.embed_tokens.weight.data, backbone.config.hidden_size
    embedding.zero_()[range(num_states), range(num_states)] = 1.0
    embedding[num_states:, 0] = 1.0
    backbone.norm.weight.data.fill_(width**-0.5)
