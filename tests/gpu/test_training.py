"""Gradient steps on a GPU that a CPU cannot show: fp16 with loss scaling, and activations computed again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.batches import PackedBatch, pack
from dovetail.model.forward import language_model_loss
from dovetail.model.lora import add_lora
from dovetail.training.optim import build_optimizer
from dovetail.training.step import StepReport, Term, TokenBudget, gradient_step
from tests.engine.test_hybrid import prompts_of
from tests.fakes import TINY, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CUDA = torch.device("cuda")


def batch_of() -> PackedBatch:
    ids = prompts_of()
    return pack(ids, [[i > 0 for i in range(len(row))] for row in ids])


def learn(model: Any, *, steps: int, optimizer: Any = None) -> list[StepReport]:
    optimizer = optimizer or build_optimizer(model, learning_rate=1e-2)
    return [
        gradient_step(
            model,
            optimizer,
            [Term(batch_of(), partial(language_model_loss, model))],
            max_grad_norm=1.0,
            budget=TokenBudget(128),
            device=CUDA,
            learning_rate=1e-2,
        )
        for _ in range(steps)
    ]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", TINY)
def test_fp16_with_loss_scaling_learns_what_float32_learns(name: str, rank: int) -> None:
    losses = {}
    for dtype in (torch.float32, torch.float16):
        model: Any = tiny_model(name, dtype=dtype).cuda().train()
        if rank:
            model = add_lora(model, rank=rank, alpha=2 * rank, seed=0)
        optimizer = build_optimizer(model, learning_rate=1e-2)
        reports = [report for report in learn(model, steps=30, optimizer=optimizer) if not report.skipped]
        assert len(reports) >= 20  # the first ones may look for the loss scale
        losses[dtype] = [report.loss for report in reports[:20]]
        if dtype == torch.float16:
            assert optimizer.scaler is not None
            assert optimizer.scaler.scale > 1
            assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert losses[torch.float16][-1] < losses[torch.float16][0] - 0.2
    torch.testing.assert_close(
        torch.tensor(losses[torch.float16]), torch.tensor(losses[torch.float32]), atol=0.1, rtol=0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_activations_computed_again_give_the_same_gradients(name: str, dtype: torch.dtype) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        model = tiny_model(name, dtype=dtype).cuda().train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = language_model_loss(model, batch_of().to(CUDA))
        loss.total.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-4, rtol=1e-4)


def test_activations_computed_again_take_less_memory() -> None:
    peaks = []
    for again in (False, True):
        model = tiny_model("llama", dtype=torch.bfloat16).cuda().train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        long = pack([[i % 250 for i in range(120)] for _ in range(300)], [[True] * 120] * 300).to(CUDA)
        torch.cuda.reset_peak_memory_stats()
        language_model_loss(model, long).total.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
