import pytest
import torch

from dovetail.errors import CheckpointError
from dovetail.training.weights import load_trained, trained_weights
from tests.training.toy import Toy, same_bits, weights_of


def test_trained_weights_come_back_and_frozen_ones_are_left_alone() -> None:
    one, other = Toy(), Toy(seed=1)
    for model in (one, other):
        model.embedding.requires_grad_(False)
    frozen = other.embedding.weight.detach().clone()
    load_trained(other, trained_weights(one))
    assert torch.equal(other.embedding.weight, frozen)
    assert torch.equal(other.layer.weight, one.layer.weight)
    load_trained(one, trained_weights(one))
    assert same_bits(weights_of(one), weights_of(Toy()))


def test_weights_of_another_model_are_refused() -> None:
    saved = trained_weights(Toy())
    with pytest.raises(CheckpointError, match=r"another model: embedding\.weight"):
        load_trained(Toy(width=16), saved)
    del saved["norm.bias"]
    with pytest.raises(CheckpointError, match=r"another model: norm\.bias"):
        load_trained(Toy(), saved)
