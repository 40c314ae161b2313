"""Log-probabilities: of the right token, under the policy that sampled, in enough digits."""

import math
from itertools import pairwise

import pytest
import torch

from dovetail.batches import pack
from tests.conformance.subject import maths
from tests.conformance.toys import layout
from tests.tolerance import assert_near

BIGRAMS = [[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]]
"""BIGRAMS[v][w] = probability that token w follows token v."""


def test_logits_score_the_token_after_them():
    """The logits at a position are those of the next token; shifted by one, this table gives other
    numbers."""
    ids = [2, 0, 0, 1, 1, 2]
    logits_TV = torch.tensor([BIGRAMS[v] for v in ids], dtype=torch.float64).log() + 3.0
    logprobs = maths.logprobs_of(logits_TV[:-1], torch.tensor(ids[1:]))
    assert_near(logprobs, [math.log(BIGRAMS[v][w]) for v, w in pairwise(ids)])


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_sampling_temperature_divides_the_logits(temperature):
    """Log-probabilities are those of the distribution sampled from, so the ratio before any step is 1."""
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0], dtype=torch.float64)
    weights = [math.exp(z / temperature) for z in logits.tolist()]
    sampled_from = [math.log(w / sum(weights)) for w in weights]
    recomputed = maths.logprobs_of(logits.expand(4, 4), torch.arange(4), temperature)
    assert_near(recomputed, sampled_from)


def test_entropy_is_that_of_the_tempered_policy():
    """Entropy divides by the temperature as well, or it would speak of a policy that never answered."""
    logits = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
    weights = [math.exp(z / 0.6) for z in logits[0].tolist()]
    expected = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    assert_near(maths.entropy_of(logits, 0.6), [expected])


def test_log_softmax_of_bfloat16_logits_is_taken_in_float32():
    """From the same bfloat16 logits, log-probabilities agree with float64 to 1e-4; in bfloat16 they do
    not."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = (4 * torch.randn(64, 5000, generator=generator)).bfloat16()
    ids = torch.randint(0, 5000, (64,), generator=generator)
    exact = maths.logprobs_of(logits_TV.double(), ids)
    assert (maths.logprobs_of(logits_TV, ids) - exact).abs().max() < 1e-4
    rounded = logits_TV.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    assert (rounded - exact).abs().max() > 1e-3  # the test can tell


def test_positions_restart_with_every_packed_sequence():
    """Position ids in a packed batch are 0, 1, 2, ... for each sequence, as if it stood alone."""
    plan = layout([(3, 2), (1, 1), (2, 4)])
    packed = pack(plan.sequences, plan.masks)
    assert packed.position_ids_T().tolist() == [p for ids in plan.sequences for p in range(len(ids))]


@pytest.mark.parametrize("token", [0, 1, 256, 257])
def test_which_tokens_count_depends_on_positions_and_never_on_token_values(token):
    """An answer may contain the pad or end token anywhere: bounds and masks come from lengths."""
    plan = layout([(3, 2), (1, 4)], token=token)
    packed = pack(plan.sequences, plan.masks)
    assert packed.mask_T.tolist() == [False] * 3 + [True] * 2 + [False] + [True] * 4
    assert maths.cu_actions(packed.mask_T, packed.cu_seqlens_S1).tolist() == [0, 2, 6]
