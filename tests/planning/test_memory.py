"""The memory of a process: worked by hand, and against the tensors that torch really holds."""

from typing import Any

import pytest
import torch

from dovetail.batches import SummedLoss, pack
from dovetail.engine.kv_cache import KVArena, KVShape, pages_for
from dovetail.model.forward import language_model_loss
from dovetail.model.lora import add_lora
from dovetail.planning.architecture import Architecture
from dovetail.planning.memory import (
    Held,
    activation_bytes,
    cache_bytes,
    head_bytes,
    layer_elements,
    merged,
    needed_bytes,
    total,
)
from dovetail.training.optim import Ema, build_optimizer
from dovetail.training.step import Term, TokenBudget, gradient_step
from dovetail.training.step_memory import held_as
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
    assert head_bytes(LLAMA_8B, tokens=10_000, element_bytes=2) == 1.5 * 2**30 + weight
    assert head_bytes(LLAMA_8B, tokens=10_000, element_bytes=2, is_trained=False) == 1.5 * 2**30
    assert head_bytes(CLASSIC, tokens=10_000) == 0


def bytes_of(tensors: Any) -> int:
    """Bytes of distinct memory."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen3", "gemma3"])
def test_weights_and_states_are_those_that_torch_holds(name: str, dtype: torch.dtype, lora: bool) -> None:
    model: Any = tiny_model(name, dtype=dtype)
    if lora:
        model = add_lora(model, rank=2, alpha=2, seed=0)
    optimizer = build_optimizer(model, learning_rate=1e-3)
    average = Ema(model, decay=0.9, optimizer=optimizer)
    held = held_as(model, is_averaged=True)
    assert total(held.resident()) == bytes_of(model.parameters())
    named = {item.removeprefix(f"{held.role} "): size for item, size in held.states().items()}
    states = optimizer.state_dict()["parameters"].values()
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    assert named["moments"] == bytes_of(moments)
    assert named["moving average"] == bytes_of(average.averages().values())
    masters = bytes_of(state["master"] for state in states if "master" in state)
    assert named.get("master weights", 0) == masters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gradients_are_those_that_torch_holds_before_and_after_the_last_pass(
    dtype: torch.dtype, micro_batches: int
) -> None:
    model = tiny_model("opt", dtype=dtype)
    optimizer = build_optimizer(model, learning_rate=0.0)
    batch = pack([[5] * 8] * micro_batches, [[False] + [True] * 7] * micro_batches)
    before: list[int] = []

    def loss(part: Any) -> SummedLoss:
        before.append(bytes_of(optimizer.gradients().values()))
        return language_model_loss(model, part)

    after: list[int] = []
    clear = optimizer.zero_grad
    optimizer.zero_grad = lambda: (after.append(bytes_of(optimizer.gradients().values())), clear())[1]  # type: ignore[method-assign]
    gradient_step(
        model, optimizer, [Term(batch, loss)], max_grad_norm=1.0, budget=TokenBudget(8), device=torch.device("cpu"),
        learning_rate=0.0,
    )  # fmt: skip
    held = held_as(model)
    few, many = (
        held.training(1, micro_batches, is_checkpointed=False),
        held.training(10**9, micro_batches, is_checkpointed=False),
    )
    assert few[f"{held.role} gradients"] == after[-1]
    assert many[f"{held.role} gradients"] == before[-1]


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3"])
def test_the_cache_is_as_large_as_the_arena(name: str) -> None:
    model = tiny_model(name)
    held = held_as(model)
    of = held.architecture
    shape = KVShape(of.num_layers, of.key_width // 8, 8, torch.float32)
    for tokens in (1, 64, 65, 200):
        arena = KVArena(shape, 3 * pages_for(tokens), torch.device("cpu"))
        assert 3 * cache_bytes(of, tokens=tokens, element_bytes=4) == bytes_of(arena._storage)


def of_weights(**changes: Any) -> Held:
    """A million trained weights without activations to speak of."""
    given = {"role": "actor", "architecture": CLASSIC, "num_weights": 1e6, "num_trained": 1e6}
    return Held(**{**given, **changes})


def test_a_sharded_model_holds_its_part_and_gathers_the_rest() -> None:
    shared = of_weights(stage=1, shard_size=4)
    assert shared.resident() == {"actor weights": 0.5e6}
    assert total(shared.states()) == 12e6 / 4
    assert shared.gathered() == {"actor weights, gathered": 1.5e6}
    assert of_weights(stage=3, shard_size=4).gathered() == {"actor weights, gathered": 2e6 * 2 / 24}
    gradients = "actor gradients"
    assert shared.training(1, 3, is_checkpointed=False)[gradients] == 4e6  # whole, until they are reduced
    assert of_weights(stage=2, shard_size=4).training(1, 3, is_checkpointed=False)[gradients] == 1e6


def test_what_is_offloaded_is_in_the_host_s_memory() -> None:
    offloaded = of_weights(stage=3, is_offloaded=True, is_averaged=True)
    assert offloaded.resident() == offloaded.states() == {}
    assert total(offloaded.on_host()) == (2 + 4 + 8 + 4 + 4) * 1e6
    assert offloaded.training(1, 3, is_checkpointed=False)["actor gradients"] == 0


def test_a_step_needs_the_states_of_all_and_one_pass_at_a_time() -> None:
    small, large = of_weights(role="critic"), of_weights(num_weights=2e6, num_trained=2e6)
    passes = total(large.training(1000, 3, is_checkpointed=False))
    assert needed_bytes([small, large], tokens=1000) == 12e6 + 24e6 + passes


def test_items_of_one_name_are_added_up() -> None:
    assert merged([{"a": 1.0, "b": 0.0}, {"a": 2.0}]) == {"a": 3.0}
