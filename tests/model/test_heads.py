"""Centring: the mean becomes zero, and scores move as little as possible against each other."""

import pytest
import torch

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model.forward import last_hidden_states, last_scores
from dovetail.model.heads import centre_on, final_layer_norm
from dovetail.model.scalar import scalar_model_from
from tests.fakes import TINY, tiny_model
from tests.tolerance import assert_near

NUM_DEMONSTRATIONS = 40
ENDS_IN_BIASED_NORM = {"opt", "gpt2", "gpt-neox"}


def demonstrations(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (NUM_DEMONSTRATIONS,), generator=generator).tolist()
    rows = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return pack(rows, [[False] * length for length in lengths])


def scalar(name, dtype=torch.float64):
    return scalar_model_from(tiny_model(name, dtype=dtype), seed=2, pad_token_id=257).requires_grad_(False)


def centre(model):
    batch = demonstrations()
    return centre_on(model, last_hidden_states(model, batch), last_scores(model, batch))


@pytest.mark.parametrize("name", TINY)
def test_the_mean_over_the_demonstrations_becomes_zero(name):
    model = scalar(name)
    before = last_scores(model, demonstrations()).mean()
    record = centre(model)
    after = last_scores(model, demonstrations()).mean()
    dtype = torch.float32 if name.startswith("gemma") else torch.float64
    assert_near(torch.tensor(record.mean_before, dtype=torch.float64), before)
    assert_near(after, 0.0, dtype=dtype)
    assert_near(after, record.mean_after, dtype=dtype)


@pytest.mark.parametrize("name", sorted(ENDS_IN_BIASED_NORM))
def test_where_a_norm_has_a_bias_every_score_of_any_text_moves_alike(name):
    model, others = scalar(name), demonstrations(seed=9)
    before = last_scores(model, others)
    record = centre(model)
    assert_near(last_scores(model, others) - before, torch.full_like(before, -record.mean_before))
    assert record.disturbance == 0.0


def by_hand(hidden, shift):
    """The least varying of 2,000 random directions with mean 1, as variance of the projections."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2000, hidden.shape[1], generator=generator, dtype=torch.float64)
    projections = hidden @ directions.T
    scaled = projections / projections.mean(dim=0)
    return float((scaled * shift).var(dim=0, correction=0).min())


@pytest.mark.parametrize("name", sorted(set(TINY) - ENDS_IN_BIASED_NORM))
def test_elsewhere_the_shift_varies_less_than_along_any_direction_tried(name):
    model = scalar(name)
    hidden = last_hidden_states(model, demonstrations())
    before = last_scores(model, demonstrations())
    record = centre(model)
    moved = last_scores(model, demonstrations()) - before
    variance = float(moved.var(correction=0))
    assert variance < by_hand(hidden, record.mean_before)
    assert_near(
        torch.tensor(record.disturbance * abs(record.mean_before)), variance**0.5, dtype=torch.float32
    )


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_half_precision_is_centred_to_its_own_rounding(name):
    model = scalar(name, dtype=torch.bfloat16)
    centre(model)
    assert_near(last_scores(model, demonstrations()).mean(), 0.0, dtype=torch.bfloat16)


def test_what_ends_each_backbone_is_found_out():
    for name in TINY:
        norm = final_layer_norm(scalar(name))
        assert (norm is not None) == (name in ENDS_IN_BIASED_NORM), name


def test_one_demonstration_is_enough():
    model, one = scalar("llama"), pack([[1, 2, 3]], [[False] * 3])
    record = centre_on(model, last_hidden_states(model, one), last_scores(model, one))
    assert_near(torch.tensor(record.mean_after, dtype=torch.float64), 0.0)


def test_no_demonstrations_are_refused():
    with pytest.raises(ModelError, match="no demonstrations"):
        centre_on(scalar("llama"), torch.zeros(0, 32), torch.zeros(0))


def test_hidden_states_of_zero_are_refused():
    with pytest.raises(ModelError, match="all zero"):
        centre_on(scalar("llama"), torch.zeros(3, 32), torch.ones(3))
