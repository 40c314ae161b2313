"""Packed toy batches as every other part of the system makes them.

Responsible for: `Experience` records with ragged prompts and answers, and policies that are plain tables, so
that a gradient can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
