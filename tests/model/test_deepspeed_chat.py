"""Reward models of DeepSpeed-Chat, scored as it scores them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model.forward import last_scores
from dovetail.model.load import expect_reward_head, load_causal_lm, load_scalar_model
from dovetail.model.save import save_model
from tests.fakes import TINY, byte_tokenizer
from tests.tolerance import assert_near

ROWS = [[1, 2, 3, 4, 256], [7, 8, 256]]
HERE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def written(folder: Path, name: str, prefix: str, kind: str = "bin") -> Tensor:
    """A reward model as DeepSpeed-Chat writes it; returns the score of each row, a row at a time."""
    config = TINY[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = AutoModel.from_config(config).eval()
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)
        head = nn.Linear(width, 1, bias=False)
    state = {f"{prefix}.{key}": weight for key, weight in backbone.state_dict().items()}
    state["v_head.weight"] = head.weight.detach()
    folder.mkdir(exist_ok=True)
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        halves = [dict(list(state.items())[0::2]), dict(list(state.items())[1::2])]
        places = {}
        for i, half in enumerate(halves):
            torch.save(half, folder / f"pytorch_model-{i}.bin")
            places |= dict.fromkeys(half, f"pytorch_model-{i}.bin")
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config.architectures = ["SomethingForCausalLM"]  # of the model that it was made from
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return torch.stack([head(backbone(torch.tensor([row]))[0])[0, -1, 0] for row in ROWS])


@pytest.mark.parametrize(
    ("name", "prefix", "kind"),
    [
        ("opt", "rwtranrsformer", "bin"),
        ("opt-post-norm", "rwtransformer", "bin"),
        ("llama", "rwtransformer", "safetensors"),
        ("gpt2", "rwtranrsformer", "sharded"),
        ("gpt-neox", "rwtransformer", "sharded"),
    ],
)
def test_a_reward_model_of_deepspeed_chat_gives_its_scores_and_is_saved_as_one_of_transformers(
    tmp_path: Path, name: str, prefix: str, kind: str
) -> None:
    theirs = written(tmp_path / "old", name, prefix, kind)
    expect_reward_head(tmp_path / "old")
    model = load_scalar_model(tmp_path / "old", **HERE, seed=0, pad_token_id=257)
    batch = pack(ROWS, [[False] * len(row) for row in ROWS])
    assert_near(last_scores(model, batch).detach(), theirs)
    save_model(model, byte_tokenizer(), tmp_path / "new")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        assert_near(torch.stack([again(torch.tensor([row])).logits[0, 0] for row in ROWS]), theirs)


def test_a_value_head_beside_a_language_model_is_no_such_reward_model(tmp_path: Path) -> None:
    from tests.fakes import tiny_model

    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = {**model.state_dict(), "v_head.weight": torch.ones(1, 32)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="without a reward head"):
        expect_reward_head(tmp_path)
    load_causal_lm(tmp_path, **HERE)


def test_one_that_lacks_its_head_is_told(tmp_path: Path) -> None:
    written(tmp_path, "llama", "rwtransformer")
    state = torch.load(tmp_path / "pytorch_model.bin")
    state.pop("v_head.weight")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_scalar_model(tmp_path, **HERE, seed=0, pad_token_id=257)
