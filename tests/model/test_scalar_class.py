"""Reward models of architectures for which transformers has no class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    MambaConfig,
    OlmoeConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from dovetail.batches import pack
from dovetail.model.forward import last_scores
from dovetail.model.load import expect_reward_head, load_scalar_model
from dovetail.model.save import save_model
from dovetail.model.scalar import new_score_weight
from tests.fakes import byte_tokenizer
from tests.tolerance import assert_near

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": None,
}
CONFIGS: list[PretrainedConfig] = [
    CohereConfig(**SIZES),
    GraniteConfig(**SIZES),
    ApertusConfig(**SIZES),
    OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    MambaConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=256, pad_token_id=257
    ),
]
ROWS = [[1, 2, 3, 4, 256], [7, 8, 256]]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.filterwarnings("ignore:.*its batches are padded:RuntimeWarning")
def test_a_backbone_without_a_class_of_its_own_scores_with_our_head_and_comes_back(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    assert config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actor = AutoModelForCausalLM.from_config(config).eval()
    actor.save_pretrained(tmp_path / "actor")
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "pad_token_id": 257}
    model = load_scalar_model(tmp_path / "actor", seed=5, **options)
    with torch.no_grad():
        hidden = [actor.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
        expected = torch.stack(hidden) @ new_score_weight(32, seed=5)[0]
        batch = pack(ROWS, [[False] * len(row) for row in ROWS])
        if config.model_type != "mamba":  # whose output lacks what the generic class reads
            assert_near(model(torch.tensor([ROWS[0]])).logits[0], expected[:1])
        assert_near(last_scores(model, batch), expected)
    save_model(model, byte_tokenizer(), tmp_path / "reward")
    expect_reward_head(tmp_path / "reward")
    again = load_scalar_model(tmp_path / "reward", seed=99, **options)
    with torch.no_grad():
        assert_near(last_scores(again, batch), expected)
