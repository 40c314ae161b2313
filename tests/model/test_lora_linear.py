"""The adapted layer against the same arithmetic in plain torch, and against peft's own layer."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from dovetail.model.lora_linear import AdaptedLinear


def layer(
    kind: type[Linear], *, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> Linear:
    torch.manual_seed(0)
    base = nn.Linear(5, 7, bias=bias, dtype=dtype).requires_grad_(False)
    settings = LoraConfig(r=3, lora_alpha=6.0, lora_dropout=dropout)
    made = kind(base, "default", config=settings, r=3, lora_alpha=6.0)
    generator = torch.Generator().manual_seed(1)
    for part in (made.lora_A["default"], made.lora_B["default"]):
        part.weight.data = torch.randn(part.weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_values_and_gradients_are_those_of_the_sum(bias: bool, shape: tuple[int, ...]) -> None:
    made = layer(AdaptedLinear, bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    base, down, up = made.get_base_layer(), made.lora_A["default"].weight, made.lora_B["default"].weight
    y = made(x)
    assert y.grad_fn.name().startswith("_LowRankSum") or y.grad_fn.next_functions[0][0].name().startswith(
        "_LowRankSum"
    )
    found = torch.autograd.grad((y * slope).sum(), (x, down, up))
    weight = base.weight + 2.0 * up @ down  # alpha / rank = 2
    expected_y = torch.einsum("oi,...i->...o", weight, x) + (base.bias if bias else 0.0)
    expected = torch.autograd.grad((expected_y * slope).sum(), (x, down, up))
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_no_less_exact_than_pefts_layer(dtype: torch.dtype) -> None:
    x = torch.randn(64, 5, dtype=torch.float64)
    ours, pefts = layer(AdaptedLinear, dtype=dtype), layer(Linear, dtype=dtype)
    wide = layer(Linear)
    wide.load_state_dict(ours.state_dict())
    exact = wide(x.to(dtype).double())
    error = {
        name: float((made(x.to(dtype)).double() - exact).norm())
        for name, made in (("ours", ours), ("peft", pefts))
    }
    assert error["ours"] <= 1.01 * error["peft"]


def test_with_dropout_peft_computes_and_in_evaluation_we_do() -> None:
    ours, pefts = layer(AdaptedLinear, dropout=0.5), layer(Linear, dropout=0.5)
    x = torch.randn(4, 5, dtype=torch.float64)
    outputs = []
    for made in (ours, pefts):
        torch.manual_seed(3)
        outputs.append(made.train()(x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], ours.eval()(x))
    torch.testing.assert_close(ours.eval()(x), pefts.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_base_that_learns_keeps_its_gradient() -> None:
    made = layer(AdaptedLinear)
    made.get_base_layer().weight.requires_grad_(True)
    made(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    assert made.get_base_layer().weight.grad is not None
