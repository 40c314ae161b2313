"""A rehearsal changes nothing, says how memory compares with the plan, and shrinks what comes too near to the limit."""

from typing import Any

import pytest
import torch

from dovetail.batches import pack
from dovetail.model.forward import language_model_loss
from dovetail.training.optim import build_optimizer
from dovetail.training.rehearsal import halve, probe_of, rehearse
from dovetail.training.step import Term, TokenBudget, gradient_step, rehearse_step
from tests.fakes import tiny_model

CPU = torch.device("cpu")


class FakeProbe:
    """A device on which each token of a micro-batch takes a GiB, and nothing else does."""

    def __init__(self, budget: TokenBudget, limit: int) -> None:
        self.budget, self.gib, self.begun = budget, limit, 0

    def begin(self) -> None:
        self.begun += 1

    def peak(self) -> int:
        return self.budget.tokens * 2**30

    def limit(self) -> int:
        return self.gib * 2**30


def rehearsed(budget: TokenBudget, limit: int, longest: int = 1) -> list[int]:
    tried: list[int] = []
    rehearse(
        lambda: tried.append(budget.tokens), probe=FakeProbe(budget, limit), what="sft: a step",
        planned=lambda: 20 * 2.0**30, shrink=lambda: halve(budget, longest),
    )  # fmt: skip
    return tried


def test_what_fits_is_run_once_and_compared_with_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    budget = TokenBudget(16)
    assert rehearsed(budget, limit=32) == [16]
    assert "sft: a step peaks at 16.00 GiB, planned 20.00 GiB (-20 %), of 32.0 GiB" in (
        capsys.readouterr().err
    )
    assert budget.tokens == 16


def test_what_comes_near_the_limit_is_halved_before_the_run_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    budget = TokenBudget(64)
    assert rehearsed(budget, limit=33) == [64, 32]
    assert budget.tokens == 32
    said = capsys.readouterr().err
    assert said.count("micro-batches halved from 64 to 32 tokens") == said.count("halved") == 1


@pytest.mark.parametrize(("may_shrink", "longest"), [(False, 1), (True, 40)])
def test_what_cannot_be_halved_is_warned_of(
    may_shrink: bool, longest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = TokenBudget(64, may_shrink=may_shrink)
    assert rehearsed(budget, limit=10, longest=longest) == [64]
    assert budget.tokens == 64
    assert "the run may run out of memory" in capsys.readouterr().err


def test_a_cpu_has_no_rehearsal() -> None:
    assert probe_of(CPU) is None


def step(model: Any, optimizer: Any, batch: Any) -> None:
    gradient_step(
        model, optimizer, [Term(batch, lambda part: language_model_loss(model, part))], max_grad_norm=1.0,
        budget=TokenBudget(16), device=CPU, learning_rate=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_the_same_to_the_bit_after_a_rehearsal(dtype: torch.dtype) -> None:
    batch = pack([[5, 6, 7, 8] * 2] * 6, [[False] + [True] * 7] * 6)
    weights = []
    for rehearses in (False, True):
        torch.manual_seed(3)
        model: Any = tiny_model("opt", dtype=dtype)
        model.config.dropout = 0.1
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.1  # so that random numbers are drawn in a step
        model.train()
        optimizer = build_optimizer(model, learning_rate=1e-2)
        step(model, optimizer, batch)
        if rehearses:
            term = Term(batch, lambda part, model=model: language_model_loss(model, part))
            rehearse_step(model, optimizer, [term], budget=TokenBudget(16), device=CPU)
            assert optimizer.gradients() == {}
        step(model, optimizer, batch)
        weights.append([weight.clone() for weight in optimizer.weights().values()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_out_of_memory_in_a_rehearsal_halves_what_the_run_takes() -> None:
    batch = pack([[5] * 8] * 8, [[False] + [True] * 7] * 8)
    model = tiny_model("opt")
    optimizer, budget = build_optimizer(model, learning_rate=1e-2), TokenBudget(64)

    def loss(part: Any) -> Any:
        if part.num_tokens > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return language_model_loss(model, part)

    rehearse_step(model, optimizer, [Term(batch, loss)], budget=budget, device=CPU)
    assert budget.tokens == 16
