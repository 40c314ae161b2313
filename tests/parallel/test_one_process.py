"""One process that shards comes to what one comes to that does not, bit for bit, and copies nothing for it."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.batches import pack
from dovetail.errors import ConfigError, ModelError
from dovetail.model.forward import language_model_loss
from dovetail.model.lora import add_lora
from dovetail.model.shards import is_shard, whole
from dovetail.parallel.shard import shard_model, sharding_of
from dovetail.parallel.world import ALONE, World, joined
from dovetail.planning.memory import total
from dovetail.training.optim import Optimizer
from dovetail.training.step import StepReport, Term, TokenBudget, gradient_step
from dovetail.training.step_memory import held_as
from tests.fakes import tiny_model
from tests.parallel.group import new_store

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    store = new_store()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with joined(CPU) as found:
        yield found


def three_steps(model: Any) -> list[StepReport]:
    """Of three micro-batches each."""
    rows = [[1 + i % 7] * (3 + i) for i in range(6)]
    batch = pack(rows, [[True] * len(row) for row in rows])
    optimizer = Optimizer(model, learning_rate=1e-3)
    return [
        gradient_step(
            model,
            optimizer,
            [Term(batch, partial(language_model_loss, model))],
            max_grad_norm=1.0,
            budget=TokenBudget(13),
            device=CPU,
            learning_rate=1e-3,
        )
        for _ in range(3)
    ]


def weights_of(model: Any) -> dict[str, Tensor]:
    sharding_of(model).reshard()
    return {name: whole(weight).clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [False, True])
def test_steps_are_those_of_a_plain_model(world: World, stage: int, dtype: torch.dtype, lora: bool) -> None:
    plain: Any = tiny_model().to(dtype)
    if lora:
        plain = add_lora(plain, rank=2, alpha=4, seed=0)
    sharded = copy.deepcopy(plain)
    shard_model(sharded, stage=stage, world=world, device=CPU)
    assert all(is_shard(parameter) for parameter in sharded.parameters())
    assert three_steps(sharded) == three_steps(plain)
    found, expected = weights_of(sharded), weights_of(plain)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)])
@pytest.mark.parametrize("lora", [False, True])
def test_offloaded_steps_are_those_of_a_plain_model(
    world: World, stage: int, dtype: torch.dtype, lora: bool
) -> None:
    plain: Any = tiny_model().to(dtype)
    if lora:
        plain = add_lora(plain, rank=2, alpha=4, seed=0)
    offloaded = copy.deepcopy(plain)
    shard_model(offloaded, stage=stage, world=world, device=CPU, offload=True)
    assert not sharding_of(offloaded).layout.computes_on_shards
    assert three_steps(offloaded) == three_steps(plain)
    expected = weights_of(plain)
    for name, weight in weights_of(offloaded).items():
        assert torch.equal(weight, expected[name]), name


def test_what_stages_gather_for_a_pass_is_counted(world: World) -> None:
    num_weights = sum(weight.numel() for weight in tiny_model().parameters())
    found = []
    for stage in (1, 2, 3):
        model = tiny_model().to(torch.bfloat16)
        shard_model(model, stage=stage, world=world, device=CPU, offload=True)
        held = held_as(model)
        gradients = held.training(1, 3, is_checkpointed=False)[f"{held.role} gradients"]
        found.append((total(held.gathered()), gradients))
    # The shards are in the host's memory: all weights come (of two layers), at stage 1 whole float32 gradients.
    assert found == [(2 * num_weights, 4 * num_weights), (2 * num_weights, 0), (2 * num_weights, 0)]


def test_layers_that_are_not_found_are_not_sharded_as_one(world: World) -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 modules"):
        shard_model(model, stage=3, world=world, device=CPU, offload=True)


def test_what_is_not_sharded_cannot_be_offloaded(world: World) -> None:
    with pytest.raises(ConfigError, match="its ZeRO stage is 0"):
        shard_model(tiny_model(), stage=0, world=world, device=CPU, offload=True)
    with pytest.raises(ConfigError, match="not one of a group") as caught:
        shard_model(tiny_model(), stage=3, world=ALONE, device=CPU, offload=True)
    assert "torchrun" in str(caught.value.hint)


def test_the_weights_that_compute_are_the_shards(world: World) -> None:
    model: Any = tiny_model()
    shard_model(model, stage=3, world=world, device=CPU)
    shards = {name: shard.to_local().data_ptr() for name, shard in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    assert not any(is_shard(weight) for weight in model.parameters())
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == shards


class Names(TorchDispatchMode):
    """Of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_operator_of_fsdp_or_of_the_group_runs_in_a_step(world: World, stage: int) -> None:
    model: Any = tiny_model()
    shard_model(model, stage=stage, world=world, device=CPU)
    with Names() as seen:
        three_steps(model)
    assert "aten::native_layer_norm" in seen.names or "aten::mm" in seen.names
    assert not [name for name in seen.names if name.startswith(("fsdp::", "c10d::", "_c10d_functional::"))]
