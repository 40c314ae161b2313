"""A step whose loss or gradient is not finite is left out, and a run of them ends with a diagnosis."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dovetail.batches import PackedBatch, SummedLoss
from dovetail.errors import TrainingStopped
from dovetail.training.optim import build_optimizer
from dovetail.training.step import Term
from tests.training.toy import Toy, loss_of, same_bits, step, toy_batch, weights_of


def poisoned(model: nn.Module, value: float, micro: PackedBatch) -> SummedLoss:
    loss = loss_of(model, micro)
    return replace(loss, total=loss.total * value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_the_next_one_taken(
    value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plain = Toy(), Toy()
    optimizer = build_optimizer(model, learning_rate=0.1)
    report = step(model, [Term(toy_batch(), partial(poisoned, model, value))], optimizer=optimizer, budget=9)
    assert report.skipped
    assert optimizer.skipped_in_a_row == 1
    assert same_bits(weights_of(model), weights_of(plain))
    assert "step skipped" in capsys.readouterr().err
    assert not step(model, [Term(toy_batch(), partial(loss_of, model))], optimizer=optimizer).skipped
    step(plain, [Term(toy_batch(), partial(loss_of, plain))])
    assert optimizer.skipped_in_a_row == 0
    assert same_bits(weights_of(model), weights_of(plain))  # moments and step counts are untouched too


def skip_until_stopped(model: nn.Module, loss: Callable[[PackedBatch], SummedLoss]) -> TrainingStopped:
    optimizer = build_optimizer(model, learning_rate=0.1)
    term = Term(toy_batch(), loss)
    for _ in range(4):
        assert step(model, [term], optimizer=optimizer).skipped
    with pytest.raises(TrainingStopped) as caught:
        step(model, [term], optimizer=optimizer)
    return caught.value


def test_five_skipped_steps_in_a_row_stop_the_run_with_a_diagnosis() -> None:
    model = Toy()
    before = weights_of(model)
    error = skip_until_stopped(model, partial(poisoned, model, math.nan))
    assert "5 steps in a row" in error.message
    assert "all weights are finite" in error.message
    assert "learning rate" in str(error.hint)
    assert same_bits(weights_of(model), before)


def test_the_diagnosis_names_weights_that_are_no_numbers() -> None:
    model = Toy()
    model.layer.bias.data[0] = math.nan
    assert "the first is layer.bias" in skip_until_stopped(model, partial(loss_of, model)).message


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def infinite_gradient(model: nn.Module, micro: PackedBatch) -> SummedLoss:
    loss = loss_of(model, micro)
    return replace(loss, total=_InfiniteGradient.apply(loss.total))


def test_the_diagnosis_names_gradients_when_the_loss_looks_well() -> None:
    model = Toy()
    assert (
        "gradients are not, the first is"
        in skip_until_stopped(model, partial(infinite_gradient, model)).message
    )


def nan_loss(model: nn.Module, micro: PackedBatch) -> SummedLoss:
    """No number, with a gradient that looks well."""
    loss = loss_of(model, micro)
    return replace(loss, total=loss.total + math.nan)


def one_infinite_gradient(model: Toy, micro: PackedBatch) -> SummedLoss:
    """A number, with a gradient in which one entry is infinite and none is NaN."""
    loss = loss_of(model, micro)
    return replace(loss, total=loss.total + _InfiniteGradient.apply(model.layer.bias[0]))


@pytest.mark.parametrize("loss", [nan_loss, one_infinite_gradient])
def test_either_of_loss_and_gradient_keeps_a_step_from_being_taken(
    loss: Callable[[Toy, PackedBatch], SummedLoss],
) -> None:
    model, plain = Toy(), Toy()
    optimizer = build_optimizer(model, learning_rate=0.1)
    term = Term(toy_batch(), partial(loss, model))
    assert step(model, [term], optimizer=optimizer, max_grad_norm=1.0).skipped
    step(model, [Term(toy_batch(), partial(loss_of, model))], optimizer=optimizer)
    step(plain, [Term(toy_batch(), partial(loss_of, plain))])
    assert same_bits(weights_of(model), weights_of(plain))


def test_an_fp16_loss_that_is_no_number_counts_as_an_alarm() -> None:
    model = Toy(dtype=torch.float16)
    optimizer = build_optimizer(model, learning_rate=0.1)
    step(model, [Term(toy_batch(), partial(poisoned, model, math.nan))], optimizer=optimizer)
    assert optimizer.skipped_in_a_row == 1
    assert optimizer.scaler is not None
    assert optimizer.scaler.scale == 2.0**16
