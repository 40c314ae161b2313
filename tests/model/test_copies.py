"""A copy has the same numbers and nothing else in common."""

import copy
import pickle

import pytest
import torch

from dovetail.batches import pack
from dovetail.model.copies import copy_of
from dovetail.model.forward import hidden_states, plain_model
from dovetail.model.lora import add_lora
from dovetail.model.scalar import scalar_model_from
from dovetail.parallel.shard import shard_model, sharding_of
from dovetail.parallel.world import ALONE, World
from tests.fakes import TINY, tiny_model

BATCH = pack([[1, 2, 3], [4, 5]], [[False] * 3, [False] * 2])


def adapted():
    return add_lora(tiny_model(), rank=2, alpha=2, seed=0)


def critic():
    return scalar_model_from(tiny_model("opt"), seed=0, pad_token_id=257)


@pytest.mark.parametrize("make", [*(lambda name=name: tiny_model(name) for name in TINY), adapted, critic])
def test_a_copy_computes_the_same_and_shares_no_memory(make):
    model = make()
    wanted = hidden_states(model, BATCH)
    wanted.sum().backward()
    copied = copy_of(model)
    assert torch.equal(hidden_states(copied, BATCH), wanted)
    places = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert places.isdisjoint(tensor.data_ptr() for tensor in copied.state_dict().values())
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert other.grad is None
        assert one.requires_grad == other.requires_grad


def test_tied_weights_stay_tied():
    copied = copy_of(tiny_model("qwen2"))
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight


def test_gradient_hooks_stay_behind():
    model, calls = tiny_model(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    hidden_states(copy_of(model), BATCH).sum().backward()
    assert calls == []


def test_a_copy_has_a_config_of_its_own():
    model = tiny_model()
    copied = copy_of(model)
    copied.config.pad_token_id = 1
    assert model.config.pad_token_id == 257
    assert copied.base_model.config is copied.config


@pytest.mark.parametrize("make", [tiny_model, adapted])
@pytest.mark.parametrize("copied", [copy_of, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_of_several_processes_belongs_to_this_one_alone(make, copied):
    model = make()
    shard_model(model, stage=0, world=World(1, 2, is_group=True), device=torch.device("cpu"))
    other = copied(model)
    assert (sharding_of(other).world, sharding_of(other).layout.is_sharded) == (ALONE, False)
    assert sharding_of(model).world.size == 2
    assert sharding_of(plain_model(model)).layout is sharding_of(model).layout
