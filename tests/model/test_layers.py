"""The first few layers that show every kind stand for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from dovetail.model.layers import few_layers, layer_list
from dovetail.model.probe import probe
from tests.model.test_probe import SHAPE, qwen2_moe, random_model


def long_model(config_class: Any, **changes: Any) -> Any:
    return random_model(config_class(**{**SHAPE, "num_hidden_layers": 12, **changes}))


KINDS = ["full_attention"] * 4 + ["sliding_attention"] + ["full_attention"] * 7


@pytest.mark.parametrize(
    ("model", "few"),
    [
        (long_model(LlamaConfig), 2),
        (long_model(Gemma3TextConfig, head_dim=8, sliding_window=8, layer_types=KINDS), 5),
    ],
    ids=["all alike", "a window in the fifth"],
)
def test_one_layer_of_each_kind_is_left_and_all_come_back(model: Any, few: int) -> None:
    before = [name for name, _ in model.named_modules()]
    with few_layers(model, lambda: model(torch.tensor([[1, 2]]))):
        found = layer_list(model)
        assert found is None or len(found[1]) == few
        assert len(model.model.layers) == few
    assert [name for name, _ in model.named_modules()] == before


def test_a_model_that_needs_all_its_layers_keeps_them() -> None:
    model = long_model(LlamaConfig)

    def run() -> None:
        assert len(model.model.layers) == 12

    with few_layers(model, run):
        assert len(model.model.layers) == 12


@pytest.mark.filterwarnings("ignore:.*padded")
def test_a_fault_of_one_kind_of_layer_is_found() -> None:
    config = qwen2_moe(24)
    config.num_hidden_layers, config.layer_types = 12, KINDS
    assert probe(random_model(config)).way == "padded"
