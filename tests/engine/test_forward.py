"""What the engine learns of a model before it generates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dovetail.engine import HybridEngine
from dovetail.engine.forward import PackedModules
from dovetail.engine.kv_cache import KVShape
from dovetail.errors import GenerationError
from dovetail.model.forward import context_of, vocabulary_of
from tests.fakes import TINY, tiny_model


@pytest.mark.parametrize("name", TINY)
def test_the_probe_finds_what_every_layer_stores(name: str) -> None:
    model = tiny_model(name, dtype=torch.bfloat16)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert PackedModules(model).kv_shape() == KVShape(config.num_hidden_layers, heads, width, torch.bfloat16)
    assert context_of(model) == 512
    assert vocabulary_of(model) == 258


def test_a_layer_that_does_not_ask_our_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    assert PackedModules(model).kv_shape() is None
    with pytest.warns(UserWarning, match="padded batches"), HybridEngine(model).generating():
        pass


def test_a_model_without_a_language_head_is_refused() -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_model().config)
    with pytest.raises(GenerationError, match="LlamaForSequenceClassification has no language-model head"):
        HybridEngine(model)
