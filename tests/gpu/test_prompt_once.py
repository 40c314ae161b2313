"""Shared prompts through flash attention's own operators: as near to float64 as packed sequences are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.batches import PackedBatch
from dovetail.model.attention import AttentionCall, PackedLayout
from dovetail.model.forward import token_logprobs
from dovetail.model.shared_prompts import SharedPromptLayout
from tests.fakes import TINY, tiny_model
from tests.model.test_shared_prompts import GROUPS, both

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CUDA = torch.device("cuda")
LONG = {
    "ragged": [(200, (30, 1, 129, 64)), (1, (2, 5)), (70, (40,)), (130, (1, 1))],
    "single tokens": [(257, (1, 1, 1)), (3, (1, 1))],
    "one group": [(1024, (100,) * 8)],
}


def error(got: Tensor, exact: Tensor) -> float:
    """The relative error in the 2-norm."""
    got, exact = got.detach().cpu().double(), exact.detach()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-12))


def expect_as_near(ours: list[Tensor], packed: list[Tensor], exact: list[Tensor]) -> None:
    """No tensor is much farther from the exact one than that of packed sequences."""
    for number, (one, other, wanted) in enumerate(zip(ours, packed, exact, strict=True)):
        assert error(one, wanted) <= 1.5 * error(other, wanted) + 2e-3, f"tensor {number}"


@pytest.mark.parametrize("groups", LONG.values(), ids=LONG)
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("call", [AttentionCall(), AttentionCall(scaling=0.05), AttentionCall(window=20)])
def test_outputs_and_gradients_are_as_near_as_those_of_packed_sequences(
    groups: Any, num_key_heads: int, width: int, call: AttentionCall
) -> None:
    shared, plain = both(groups)
    layout = SharedPromptLayout(shared)
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        drawn = torch.randn(1, len(layout.kept_U), num_heads, width, generator=generator)
        return drawn.bfloat16().transpose(1, 2)

    parts = [draw(num_heads) for num_heads in (4, num_key_heads, num_key_heads)]
    slope = draw(4).transpose(1, 2)

    def apart(batch: PackedBatch, inputs: list[Tensor]) -> Tensor:
        whole = [x[:, :, layout.row_T.to(x.device)] for x in inputs]
        out = PackedLayout.of(batch).attend(whole[0], whole[1], whole[2], call)
        return out[:, layout.kept_U.to(out.device)]

    def results(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, inputs, slope.to(out))]

    exact = [x.double().requires_grad_() for x in parts]
    there = [x.to(CUDA).requires_grad_() for x in parts]
    ours = SharedPromptLayout(shared.to(CUDA)).attend(there[0], there[1], there[2], call)
    packed = apart(plain.to(CUDA), there)
    expect_as_near(results(ours, there), results(packed, there), results(apart(plain, exact), exact))


@pytest.mark.parametrize("name", TINY)
def test_models_learn_as_nearly_as_from_packed_sequences(name: str) -> None:
    shared, plain = both(GROUPS["ragged"])
    exact = tiny_model(name, dtype=torch.bfloat16).double()
    model = tiny_model(name, dtype=torch.bfloat16).cuda()
    found = [results(exact, plain)]
    found += [results(model, batch.to(CUDA)) for batch in (plain, shared)]
    flat = [torch.cat([part.flatten().double().cpu() for part in parts[1:]]) for parts in found]
    expect_as_near([found[2][0], flat[2]], [found[1][0], flat[1]], [found[0][0], flat[0]])


def results(model: Any, batch: PackedBatch) -> list[Tensor]:
    """The log-probabilities of the answers, and the gradients of their weighted sum."""
    logprobs_T = token_logprobs(model, batch).logprobs_T
    slope = torch.linspace(-1, 1, batch.num_tokens, dtype=logprobs_T.dtype, device=logprobs_T.device)
    gradients = torch.autograd.grad((logprobs_T * slope).sum(), list(model.parameters()), allow_unused=True)
    return [logprobs_T, *(g for g in gradients if g is not None)]
