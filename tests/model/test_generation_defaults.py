"""Generation configs: values without their mode are repaired, stop tokens are all kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dovetail.model.generation_defaults import declared_stop_ids, repaired
from dovetail.model.load import load_causal_lm
from dovetail.model.save import save_model
from tests.fakes import byte_tokenizer, tiny_model


def values(config: GenerationConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        # what needs sampling says that the model samples
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"min_p": 0.05}, {"do_sample": True, "min_p": 0.05}),
        ({"typical_p": 0.9, "top_k": 7}, {"do_sample": True, "typical_p": 0.9, "top_k": 7}),
        ({"epsilon_cutoff": 3e-4}, {"do_sample": True, "epsilon_cutoff": 3e-4}),
        # what needs beams does nothing without a number of them
        ({"early_stopping": True}, {}),
        ({"length_penalty": 2.0, "max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"top_k": 7, "early_stopping": True}, {"do_sample": True, "top_k": 7}),
        # greedy, and said to be
        ({"do_sample": False, "temperature": 0.9}, {"do_sample": False}),
        ({"temperature": 0.0, "top_p": 0.6}, {}),
        # the id of nothing
        ({"pad_token_id": -1, "eos_token_id": [5, 6]}, {"eos_token_id": [5, 6]}),
    ],
)
def test_a_value_without_its_mode_is_repaired_so_that_transformers_saves_it(
    tmp_path: Path, given: dict[str, Any], kept: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="invalid"):
        GenerationConfig(**given).save_pretrained(tmp_path)
    config, change = repaired(GenerationConfig(**given))
    assert values(config) == kept
    assert change is not None
    changed = given.keys() - kept.keys() or given.keys() & {"temperature", "top_p", "top_k", "min_p"}
    assert all(name in change for name in changed)
    config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 4]},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 0.8},
        {"max_new_tokens": 64, "repetition_penalty": 1.1},
    ],
)
def test_a_sound_config_stays_as_it_is(given: dict[str, Any]) -> None:
    config = GenerationConfig(**given)
    assert repaired(config) == (config, None)
    assert values(config) == given


def test_a_model_with_such_a_config_is_repaired_when_loaded_and_can_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    model = load_causal_lm(tmp_path / "given", dtype=torch.float32, device="cpu")
    assert "temperature, top_p without do_sample: do_sample = true is added" in capsys.readouterr().err
    save_model(model, byte_tokenizer(), tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.9, 0.6)


def test_all_stop_tokens_that_a_model_declares_count_and_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [10, 11]
    assert declared_stop_ids(model) == (10, 11)
    save_model(model, byte_tokenizer(), tmp_path / "saved", stop_token_ids=(256, 11))
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [256, 11, 10]


@pytest.mark.parametrize(("declared", "kept"), [(None, ()), (999, ()), ([256, 999], (256,)), (-1, ())])
def test_what_no_row_of_the_embedding_stands_for_is_no_stop_token(
    declared: Any, kept: tuple[int, ...]
) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = declared
    model.config.eos_token_id = None
    assert declared_stop_ids(model) == kept
