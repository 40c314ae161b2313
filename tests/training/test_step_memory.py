"""What is read off a loaded model: its architecture, its states, and what autograd really keeps of it."""

from dataclasses import replace

import pytest
import torch

from dovetail.batches import pack
from dovetail.model.forward import hidden_states
from dovetail.model.lora import add_lora
from dovetail.model.scalar import scalar_model_from
from dovetail.planning.architecture import Architecture
from dovetail.planning.memory import activation_bytes, needed_bytes, total
from dovetail.training.step_memory import architecture_of, held_as
from tests.fakes import tiny_model


def test_the_numbers_are_read_off_any_model() -> None:
    model = tiny_model("llama")
    found = architecture_of(model)
    assert found == Architecture(
        num_layers=2,
        width=32,
        query_width=32,
        key_width=16,
        inner_width=64,
        vocabulary=258,
        inner_copies=4,
        has_rms_norms=True,
    )
    reward_model = scalar_model_from(model, seed=0, pad_token_id=None)
    assert architecture_of(reward_model) == replace(found, vocabulary=0)
    opt = architecture_of(tiny_model("opt"))
    assert (opt.inner_width, opt.inner_copies, opt.has_rms_norms) == (64, 1, False)


@pytest.mark.parametrize(
    ("dtype", "is_averaged", "per_weight"),
    [
        (torch.bfloat16, False, 4 + 8),
        (torch.bfloat16, True, 4 + 8 + 4),
        (torch.float32, False, 8),
        (torch.float32, True, 8 + 4),
    ],
)
def test_state_counts_trained_weights_alone(dtype: torch.dtype, is_averaged: bool, per_weight: int) -> None:
    model = tiny_model("opt").to(dtype).requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    held = held_as(model, is_averaged=is_averaged)
    num = model.lm_head.weight.numel()
    assert total(held.states()) == num * per_weight
    several = total(held.training(1, 3, is_checkpointed=False))
    assert needed_bytes([held], tokens=1) == num * per_weight + several
    assert held.training(1, 3, is_checkpointed=False)[f"{held.role} gradients"] == 4 * num


def test_adapters_need_state_for_themselves_alone() -> None:
    model = add_lora(tiny_model(), rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0)
    held = held_as(model)
    assert total(held.states()) == 2 * (32 * 2 + 2 * 32) * 8
    assert held.training(1, 3, is_checkpointed=False)[f"{held.role} gradients"] == 2 * (32 * 2 + 2 * 32) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["opt", "opt-post-norm", "gpt-neox", "llama", "qwen2", "mistral", "phi3", "qwen3", "gpt2", "gemma3"],
)
def test_the_estimate_is_near_what_autograd_keeps(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    batch = pack([[1] * 64] * 4, [[False] * 64] * 4)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, batch)
    really = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    headless = replace(architecture_of(model), vocabulary=0)
    estimate = activation_bytes(headless, tokens=256, element_bytes=dtype.itemsize, is_checkpointed=False)
    assert estimate == pytest.approx(really, rel=0.15)
