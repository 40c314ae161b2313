import pytest
import torch
from torch import nn

from dovetail.errors import CheckpointError
from dovetail.training.optim import Ema, build_optimizer
from tests.training.toy import Toy, same_bits, weights_of


def test_the_average_follows_its_definition() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    ema = Ema(model, decay=0.9)
    expected = float(model.weight.detach())
    for value in (1.0, -2.0, 0.5):
        model.weight.data.fill_(value)
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    assert float(ema.state_dict()["averages"]["weight"]) == pytest.approx(expected, rel=1e-12)


def test_a_bf16_models_average_moves_by_less_than_bf16_can_tell() -> None:
    """10,000 updates of 1e-4 each: the float32 average keeps up, one kept in bf16 would not have moved."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    model = model.bfloat16()
    optimizer = build_optimizer(model, learning_rate=1e-4)
    ema = Ema(model, decay=0.99, optimizer=optimizer)
    in_bf16, expected, weight = torch.ones((), dtype=torch.bfloat16), 1.0, 1.0
    master = optimizer.weights()["weight"]
    for _ in range(10_000):
        weight += 1e-4
        expected = 0.99 * expected + 0.01 * weight
        master.fill_(weight)
        ema.update()
        in_bf16 = in_bf16 + 0.01 * (torch.tensor(weight).bfloat16() - in_bf16)
    average = ema.state_dict()["averages"]["weight"]
    assert average.dtype == torch.float32
    error = abs(float(average) - expected)
    assert error < 1e-3 * abs(float(in_bf16) - expected)


def test_without_an_optimizer_a_bf16_model_is_averaged_in_float32() -> None:
    model = Toy(dtype=torch.bfloat16)
    ema = Ema(model, decay=0.5)
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    ema.update()
    for name, parameter in model.named_parameters():
        expected = (before[name].float() + parameter.detach().float()) / 2
        torch.testing.assert_close(ema.state_dict()["averages"][name], expected)


def test_frozen_weights_are_not_averaged() -> None:
    model = Toy()
    model.embedding.requires_grad_(False)
    assert "embedding.weight" not in Ema(model, decay=0.9).state_dict()["averages"]


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    model = Toy()
    one = Ema(model, decay=0.9)
    model.layer.weight.data.add_(1.0)
    one.update()
    other = Ema(model, decay=0.9)
    other.load_state_dict(one.state_dict())
    for ema in (one, other):
        ema.update()
    assert same_bits(one.state_dict()["averages"], other.state_dict()["averages"])


def test_the_average_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="on one side only"):
        Ema(nn.Linear(2, 2), decay=0.9).load_state_dict(Ema(Toy(), decay=0.9).state_dict())
