"""Log-probabilities: of the right token, under the policy that sampled, in enough digits."""

import math
from itertools import pairwise

import pytest
import torch

from dovetail.batches import pack
from tests.conformance.subject import forward, maths
from tests.conformance.toys import layout, table_model, value_model
from tests.tolerance import assert_near

BIGRAMS = [[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]]
"""BIGRAMS[v][w] = probability that token w follows token v."""


def marked(sequences):
    """A packed batch in which every token but the first of each sequence counts."""
    return pack(sequences, [[False] + [True] * (len(ids) - 1) for ids in sequences])


def logs_of(rows):
    """A language model with these probabilities of the next token; the constant in its logits changes nothing."""
    return table_model(torch.tensor(rows, dtype=torch.float64).log() + 3.0)


def test_logits_score_the_token_after_them():
    """The logits at a position are those of the next token; shifted by one, this table gives other numbers."""
    sequences = [[2, 0, 0, 1, 1, 2], [1, 0], [0, 2, 2]]
    batch = marked(sequences)
    found = forward.token_logprobs(logs_of(BIGRAMS), batch).logprobs_T
    expected = [math.log(BIGRAMS[v][w]) for ids in sequences for v, w in pairwise(ids)]
    assert_near(found[batch.mask_T], expected)
    assert not found[~batch.mask_T].any()


def test_the_cross_entropy_of_texts_is_minus_the_sum_of_their_log_probabilities():
    """Supervised fine-tuning and mixture training score the next token, too, at a temperature of 1."""
    sequences = [[2, 0, 0, 1, 1, 2], [1, 0], [0, 2, 2]]
    expected = -sum(math.log(BIGRAMS[v][w]) for ids in sequences for v, w in pairwise(ids))
    assert_near(forward.cross_entropy(logs_of(BIGRAMS), marked(sequences)), expected)


def test_a_value_is_that_of_the_state_in_which_a_token_was_chosen():
    """The critic is read at the token before, as the logits are; a score at the last token of all."""
    model = value_model(torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64))
    batch = marked([[2, 0, 0, 1], [1, 0]])
    assert_near(forward.token_values(model, batch), [0.0, 3.0, 0.5, 0.5, 0.0, -2.0])
    assert_near(forward.last_scores(model, batch), [-2.0, 0.5])


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_sampling_temperature_divides_the_logits(temperature):
    """Log-probabilities are those of the distribution sampled from, so the ratio before any step is 1."""
    logits = [2.0, 0.5, -1.0, 0.0]
    weights = [math.exp(z / temperature) for z in logits]
    sampled_from = [math.log(w / sum(weights)) for w in weights]
    batch = marked([[0, token] for token in range(4)])
    model = table_model(torch.tensor([logits] * 4, dtype=torch.float64))
    found = forward.token_logprobs(model, batch, temperature=temperature)
    assert_near(found.logprobs_T[batch.mask_T], sampled_from)


def test_entropy_is_that_of_the_tempered_policy():
    """Entropy divides by the temperature as well, or it would speak of a policy that never answered."""
    logits = [2.0, 0.5, -1.0]
    weights = [math.exp(z / 0.6) for z in logits]
    expected = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    batch = marked([[0, 1]])
    model = table_model(torch.tensor([logits] * 3, dtype=torch.float64))
    found = forward.token_logprobs(model, batch, temperature=0.6, with_entropy=True)
    assert_near(found.entropy_T[batch.mask_T], [expected])


def test_log_softmax_of_a_bfloat16_model_is_taken_in_float32():
    """From the same bfloat16 weights, log-probabilities agree with float64 to 1e-4; in bfloat16 they do not."""
    generator = torch.Generator().manual_seed(0)
    table = (4 * torch.randn(8, 5000, generator=generator)).bfloat16()
    ids = torch.randint(0, 5000, (64,), generator=generator).tolist()
    batch = marked([[i % 8, token] for i, token in enumerate(ids)])
    found = forward.token_logprobs(table_model(table), batch).logprobs_T[batch.mask_T]
    exact, rounded = (logits.log_softmax(-1) for logits in (table.double(), table))
    expected = torch.stack([exact[i % 8, token] for i, token in enumerate(ids)])
    assert (found - expected).abs().max() < 1e-4
    wrong = torch.stack([rounded[i % 8, token] for i, token in enumerate(ids)])
    assert (wrong - expected).abs().max() > 1e-3  # the test can tell


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
