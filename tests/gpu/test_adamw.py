"""The one-pass update on a GPU against the definition in float64 and against torch's own."""

import math

import pytest
import torch
from torch import nn

from dovetail.training.optim import Optimizer
from tests.gpu.test_waits import waits_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SHAPES = [(5,), (4096,), (4097,), (3, 7), (129, 1000)]


def weights(dtype: torch.dtype) -> nn.Module:
    """Sizes below, at and above a block."""
    torch.manual_seed(0)
    model = nn.Module()
    for index, shape in enumerate(SHAPES):
        model.register_parameter(
            f"weight{index}", nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype))
        )
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    sum((p * torch.randn_like(p)).sum() for p in model.parameters()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_update_is_adamw(dtype: torch.dtype) -> None:
    model = weights(dtype)
    optimizer = Optimizer(model, learning_rate=0.01, weight_decay=0.1)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in expected.items()}
    v = {name: torch.zeros_like(w) for name, w in expected.items()}
    for t in range(1, 5):
        give_gradients(model, t)
        if t == 2:
            give_gradients(model, t)  # the sum of two is float32
        gradients = {name: g.double() for name, g in optimizer.gradients().items()}
        assert all(group.one_pass is not None for group in optimizer._groups)
        optimizer.step(torch.tensor(0.25, device="cuda", dtype=torch.float64))
        optimizer.zero_grad()
        for name, gradient in gradients.items():  # arXiv:1711.05101, algorithm 2
            g = gradient * 0.25
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            decay = 0.1 if expected[name].ndim > 1 else 0.0
            step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * step
    for name, weight in optimizer.weights().items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=2e-6, atol=2e-7)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), optimizer.weights()[name].to(dtype))
        assert float(optimizer.state_dict()["parameters"][name]["step"]) == 4.0


def test_a_scale_that_is_no_number_leaves_everything_as_it_is() -> None:
    model = weights(torch.bfloat16)
    optimizer = Optimizer(model, learning_rate=0.01, weight_decay=0.1)
    for scale in (1.0, math.nan):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        saved = {
            name: {key: t.clone() for key, t in state.items()}
            for name, state in optimizer.state_dict()["parameters"].items()
        }
        give_gradients(model, 0)
        optimizer.step(torch.tensor(scale, device="cuda"))
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        for key, tensor in optimizer.state_dict()["parameters"][name].items():
            assert torch.equal(tensor, saved[name][key])


def test_a_weight_at_an_odd_address_takes_the_other_path_to_the_same_weights() -> None:
    """Up to rounding: torch adds up in another order."""
    values = torch.randn(1001, device="cuda")
    plain, odd = nn.Module(), nn.Module()
    plain.weight, odd.weight = nn.Parameter(values[1:].clone()), nn.Parameter(values[1:])
    optimizers = [Optimizer(model, learning_rate=0.01) for model in (plain, odd)]
    assert [o._groups[0].one_pass is None for o in optimizers] == [False, True]
    for model, optimizer in zip((plain, odd), optimizers, strict=True):
        for seed in range(3):
            give_gradients(model, seed)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(plain.weight, odd.weight, rtol=1e-6, atol=1e-7)


def test_a_weight_without_gradient_stays_with_its_moments_and_count() -> None:
    model = weights(torch.bfloat16)
    optimizer = Optimizer(model, learning_rate=0.01, weight_decay=0.1)
    before = model.weight3.detach().clone()
    (model.weight4 * 2.0).sum().backward()
    optimizer.step()
    states = optimizer.state_dict()["parameters"]
    assert torch.equal(model.weight3, before)
    assert [float(states[f"weight{i}"]["step"]) for i in (3, 4)] == [0.0, 1.0]
    assert float(states["weight3"]["exp_avg"].abs().max()) == 0.0
    assert float(states["weight4"]["exp_avg"].abs().min()) > 0.0


def test_a_step_does_not_wait_for_the_device() -> None:
    model = weights(torch.bfloat16)
    optimizer = Optimizer(model, learning_rate=0.01)
    scale = torch.full((), 0.5, device="cuda", dtype=torch.float64)
    for step in (lambda: optimizer.step(scale), lambda: waits_of(lambda: optimizer.step(scale))):
        give_gradients(model, 0)
        waits = step()  # the first compiles
        optimizer.zero_grad()
    assert waits == 0
