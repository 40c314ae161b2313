"""A run that stops and goes on ends where one that never stopped does, to the last bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.batches import PackedBatch, SummedLoss
from dovetail.runs.checkpoint import Checkpoints
from dovetail.training.optim import Ema, build_optimizer
from dovetail.training.step import Term, TokenBudget, gradient_step, learning_rate_at
from dovetail.training.weights import load_trained, trained_weights
from tests.training.toy import Toy, loss_of, same_bits, toy_batch

TOTAL = 6


def noisy_loss(model: nn.Module, generator: torch.Generator, micro: PackedBatch) -> SummedLoss:
    """As a model with dropout: every call draws."""
    loss = loss_of(model, micro)
    return SummedLoss(loss.total * (0.5 + torch.rand((), generator=generator)), loss.count)


def train(folder: Path, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Up to `steps` of TOTAL steps, from the newest checkpoint; each call stands for a process of its own."""
    model = Toy(seed=5, dtype=dtype)
    optimizer = build_optimizer(model, learning_rate=1.0, weight_decay=0.01, eps=1e-5)
    ema = Ema(model, decay=0.9, optimizer=optimizer)
    generator = torch.Generator().manual_seed(7)
    checkpoints = Checkpoints(folder)
    start = 0
    if (found := checkpoints.latest()) is not None:
        start, state = found
        load_trained(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        generator.set_state(state["random"])
    for step in range(start, steps):
        rate = learning_rate_at(
            step, peak=0.02, schedule="cosine", warmup_steps=2, total_steps=TOTAL, final_fraction=0.1
        )
        gradient_step(
            model,
            optimizer,
            [Term(toy_batch(step), partial(noisy_loss, model, generator))],
            max_grad_norm=1.0,
            budget=TokenBudget(12),
            device=torch.device("cpu"),
            learning_rate=rate,
        )
        ema.update()
        state = {
            "model": trained_weights(model),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "random": generator.get_state(),
        }
        checkpoints.save(step + 1, state)
    tensors: dict[str, Tensor] = {}
    flatten(state, "", tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def flatten(value: Any, name: str, into: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        into[name] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            flatten(item, f"{name}/{key}", into)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    stop: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", TOTAL, dtype)
    halfway = train(tmp_path / "halves", stop, dtype)
    resumed = train(tmp_path / "halves", TOTAL, dtype)
    assert len(whole) > 20
    assert same_bits(whole, resumed)
    assert not same_bits(whole, halfway)
