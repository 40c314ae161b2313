"""The memory of a step: worked by hand, and against what autograd really keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dovetail.batches import pack
from dovetail.model.forward import hidden_states
from dovetail.model.lora import add_lora
from dovetail.model.scalar import scalar_model_from
from dovetail.training.step_memory import (
    Architecture,
    activation_bytes,
    architecture_of,
    head_bytes,
    layer_elements,
    state_bytes,
)
from tests.fakes import tiny_model

CLASSIC = Architecture(
    num_layers=24,
    width=2048,
    query_width=2048,
    key_width=2048,
    inner_width=8192,
    vocabulary=0,
    inner_copies=2,
    has_rms_norms=False,
)
LLAMA_8B = Architecture(
    num_layers=32,
    width=4096,
    query_width=4096,
    key_width=1024,
    inner_width=14336,
    vocabulary=128256,
    inner_copies=4,
    has_rms_norms=True,
)


def test_a_classic_layer_keeps_thirty_two_bytes_of_each_number_of_its_width() -> None:
    """Korthikanti et al.: s b h (34 + 5 a s / h), less the two bytes of dropout masks and the stored scores."""
    assert 2 * layer_elements(CLASSIC) == 32 * 2048


def test_a_gated_layer_with_grouped_heads_worked_by_hand() -> None:
    assert layer_elements(LLAMA_8B) == 8 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336


def test_activations_worked_by_hand() -> None:
    whole = activation_bytes(CLASSIC, tokens=1000, element_bytes=2, is_checkpointed=False)
    assert whole == (24 * 16 + 3) * 2048 * 1000 * 2
    less = activation_bytes(CLASSIC, tokens=1000, element_bytes=2, is_checkpointed=True)
    assert less == (24 + 16 + 3) * 2048 * 1000 * 2


def test_the_head_holds_one_chunk_of_logits_or_all_if_they_are_fewer() -> None:
    weight = 8 * 128256 * 4096
    assert head_bytes(LLAMA_8B, tokens=100) == 2 * 4 * 100 * 128256 + weight
    assert head_bytes(LLAMA_8B, tokens=10_000) == 2 * 2**30 + weight
    assert head_bytes(CLASSIC, tokens=10_000) == 0


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
        (torch.bfloat16, False, 4 + 8 + 4),
        (torch.bfloat16, True, 4 + 8 + 4 + 4),
        (torch.float32, False, 8 + 4),
        (torch.float32, True, 8 + 4 + 4),
    ],
)
def test_state_counts_trained_weights_alone(dtype: torch.dtype, is_averaged: bool, per_weight: int) -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 3, bias=False)).to(dtype)
    model[0].requires_grad_(False)
    assert state_bytes(model, is_averaged=is_averaged) == 30 * per_weight


def test_adapters_need_state_for_themselves_alone() -> None:
    model = add_lora(tiny_model(), rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0)
    assert state_bytes(model, is_averaged=False) == 2 * (32 * 2 + 2 * 32) * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "opt-post-norm", "gpt-neox", "llama", "qwen2", "mistral", "phi3"])
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
