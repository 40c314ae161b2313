"""Slices against ones cut by hand from weights laid out by head, and the sizes that are possible."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, LlamaConfig

from dovetail.errors import ConfigError
from dovetail.model.lora import add_lora
from dovetail.parallel.grid import expect_even_groups
from dovetail.parallel.tensor_plan import (
    TRAINING,
    Place,
    expect_divisible,
    generation_partitions,
    slice_bytes,
)
from dovetail.parallel.world import World
from tests.fakes import TINY, tiny_model

HEADS, KEY_HEADS, WIDTH, HEAD = 4, 2, 32, 8
"""Of tests/fakes.py."""
SIZES = (2, 4)


def slices(name: str, weight: str, size: int) -> list[Tensor]:
    """What each process of a group holds of a weight of a tiny model."""
    model = tiny_model(name)
    whole = model.get_parameter(weight)
    return [generation_partitions(model, Place(rank, size))[weight].of(whole) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_gpt2s_fused_projection_is_cut_by_heads_within_query_key_and_value(size: int) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    by_head = tiny_model("gpt2").get_parameter(name).view(WIDTH, 3, HEADS, HEAD)
    for rank, found in enumerate(slices("gpt2", name, size)):
        mine = [head for head in range(HEADS) if head * size // HEADS == rank]
        assert torch.equal(found, by_head[:, :, mine].reshape(WIDTH, -1))


@pytest.mark.parametrize("size", SIZES)
def test_gpt_neox_keeps_query_key_and_value_of_a_head_together(size: int) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    by_head = tiny_model("gpt-neox").get_parameter(name).view(HEADS, 3 * HEAD, WIDTH)
    for rank, found in enumerate(slices("gpt-neox", name, size)):
        mine = [head for head in range(HEADS) if head * size // HEADS == rank]
        assert torch.equal(found, by_head[mine].reshape(-1, WIDTH))


@pytest.mark.parametrize(("size", "key_heads"), [(2, [[0], [1]]), (4, [[0], [0], [1], [1]])])
def test_heads_of_keys_are_divided_or_repeated_and_follow_their_queries(
    size: int, key_heads: list[list[int]]
) -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    whole = tiny_model("phi3").get_parameter(name)
    query, key, value = whole.split([HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD])
    for rank, found in enumerate(slices("phi3", name, size)):
        queries = [head for head in range(HEADS) if head * size // HEADS == rank]
        assert {head * KEY_HEADS // HEADS for head in queries} == set(key_heads[rank])
        expected = [query.view(HEADS, HEAD, WIDTH)[queries]]
        expected += [kind.view(KEY_HEADS, HEAD, WIDTH)[key_heads[rank]] for kind in (key, value)]
        assert torch.equal(found, torch.cat(expected).reshape(-1, WIDTH))
    separate = slices("llama", "model.layers.0.self_attn.k_proj.weight", size)
    keys = (
        tiny_model("llama")
        .get_parameter("model.layers.0.self_attn.k_proj.weight")
        .view(KEY_HEADS, HEAD, WIDTH)
    )
    for rank, found in enumerate(separate):
        assert torch.equal(found, keys[key_heads[rank]].reshape(-1, WIDTH))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TINY)
def test_every_number_of_a_cut_weight_has_its_place_and_biases_of_row_layers_are_added_once(
    name: str, size: int
) -> None:
    model = tiny_model(name)
    has_key_heads = getattr(model.config, "num_key_value_heads", HEADS) == KEY_HEADS
    partitions = [generation_partitions(model, Place(rank, size)) for rank in range(size)]
    assert len({frozenset(found) for found in partitions}) == 1
    for weight, first in partitions[0].items():
        num = model.get_parameter(weight).shape[first.dim]
        held = Counter(
            i
            for found in partitions
            for start, length in found[weight].pieces
            for i in range(start, start + length)
        )
        assert held.keys() == set(range(num)), weight
        repeats = size // KEY_HEADS if has_key_heads and size > KEY_HEADS else 1
        assert set(held.values()) <= {1, repeats}, weight
        assert len({found[weight].length for found in partitions}) == 1, weight


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_the_vocabulary_are_padded_to_equal_multiples_of_eight(size: int) -> None:
    embedding = tiny_model("llama").get_parameter("model.embed_tokens.weight")
    found = slices("llama", "model.embed_tokens.weight", size)
    held = len(found[0])
    assert held % 8 == 0
    padded = torch.cat(found)
    assert torch.equal(padded[: len(embedding)], embedding)
    assert not padded[len(embedding) :].any()
    assert 0 < len(padded) - len(embedding) < 8 * size


def test_more_processes_than_rows_leave_some_with_zeros_alone() -> None:
    assert [Place(rank, 4).vocabulary(10) for rank in range(4)] == [
        (0, 8, 0),
        (8, 2, 6),
        (10, 0, 8),
        (10, 0, 8),
    ]


@pytest.mark.parametrize("name", TINY)
def test_adapters_are_cut_where_their_layer_is(name: str) -> None:
    model = add_lora(tiny_model(name), rank=4, alpha=8, seed=0).get_base_model()
    partitions = generation_partitions(model, Place(1, 2))
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        base, down, up = (
            f"{path}.{key}.weight" for key in ("base_layer", "lora_A.default", "lora_B.default")
        )
        assert not (down in partitions and up in partitions)
        assert (base in partitions) == (down in partitions or up in partitions)
        if base in partitions:
            found = (up if up in partitions else down, base)
            lengths = {partitions[key].length for key in found}
            assert len(lengths) == 1


@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt-post-norm"])
def test_the_bytes_of_slices_are_those_of_the_tensors_cut(name: str, size: int) -> None:
    model = tiny_model(name, dtype=torch.bfloat16)
    partitions = generation_partitions(model, Place(0, size)) if size > 1 else {}
    held = [
        partitions[key].of(weight) if key in partitions else weight
        for key, weight in model.named_parameters()
    ]
    assert slice_bytes(model, size) == sum(tensor.numel() * 2 for tensor in held)


def _llama(**changes: Any) -> LlamaConfig:
    shape = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 96, "hidden_size": 96}
    return LlamaConfig(**(shape | changes))


@pytest.mark.parametrize(
    ("config", "size", "told", "way_out"),
    [
        (_llama(), 5, "12 attention heads cannot be divided by 5", "one of 1, 2, 4, 12"),
        (
            _llama(),
            6,
            "4 key heads can be neither divided by 6 nor repeated evenly",
            "one of 1, 2, 4, 12",
        ),
        (_llama(intermediate_size=90), 4, "width 90 cannot be divided by 4", "one of 1, 2"),
        (
            BloomConfig(),
            2,
            "no plan to divide the layers of the model, of type bloom",
            "tensor_parallel.generation=1",
        ),
    ],
)
def test_sizes_that_do_not_divide_a_model_are_refused_with_those_that_do(
    config: Any, size: int, told: str, way_out: str
) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel.generation = {size}: .*{told}") as caught:
        expect_divisible(config, size)
    assert way_out in str(caught.value.hint)
    expect_divisible(config, 1)


@pytest.mark.parametrize(
    ("size", "told"),
    [(6, "the critic's 4 key heads cannot be divided by 6"), (5, "the critic's 12 attention")],
)
def test_sizes_that_do_not_divide_a_model_to_train_are_refused(size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel.training = {size}: {told}") as caught:
        expect_divisible(_llama(), size, setting=TRAINING, model="the critic")
    assert "tensor_parallel.training to one of 1, 2, 4" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no plan to divide the layers of the critic, of type bloom"):
        expect_divisible(BloomConfig(), 2, setting=TRAINING, model="the critic")


def test_processes_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(ConfigError, match="the run's 6 processes cannot form groups of 4") as caught:
        expect_even_groups(World(0, 6, is_group=True), 4)
    assert "one of 1, 2, 3, 6" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="the run's 1 process cannot form groups of 2"):
        expect_even_groups(World(), 2)
