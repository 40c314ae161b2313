"""The planner counts the weights that transformers makes, of every shape that comes with the package."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from dovetail.errors import ConfigError
from dovetail.model.lora import add_lora
from dovetail.planning.architecture import catalogue, catalogue_name, shape_from_config, shape_of
from dovetail.training.step_memory import architecture_of
from tests.fakes import TINY


def made(auto: Any, fields: dict[str, Any], **changes: Any) -> Any:
    """transformers' model of a configuration, without memory."""
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(**fields), **changes)


def num_weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", catalogue())
def test_weights_are_those_of_transformers(name: str) -> None:
    assert shape_of(name).num_weights == num_weights(made(AutoModelForCausalLM, catalogue()[name]))


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "gpt2", "pythia-70m", "llama-3.2-1b", "qwen2.5-0.5b",
                                  "qwen3-0.6b", "gemma-2-2b", "gemma-3-1b", "phi-3-mini", "smollm2-135m"])  # fmt: skip
def test_scalar_models_adapters_and_the_numbers_of_a_layer_are_those_of_transformers(name: str) -> None:
    shape, fields = shape_of(name), catalogue()[name]
    scalar = made(AutoModelForSequenceClassification, {**fields, "num_labels": 1})
    assert shape.num_scalar_weights == num_weights(scalar)
    model = made(AutoModelForCausalLM, fields)
    assert shape.architecture == architecture_of(model)
    adapted = add_lora(model, rank=4, alpha=4, seed=0)
    learning = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert shape.num_adapter_weights(4) == learning


@pytest.mark.parametrize("name", TINY)
def test_a_config_file_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(TINY[name]())
    for given in (tmp_path, tmp_path / "config.json"):
        shape = shape_of(str(given))
        assert shape.num_weights == num_weights(model)
        assert shape.architecture == architecture_of(model)


@pytest.mark.parametrize(("change", "kind"), [
    ({"attention_bias": True, "mlp_bias": True}, "llama"), ({"enable_bias": False}, "opt"),
    ({"tie_word_embeddings": False}, "opt"), ({"tie_word_embeddings": True}, "llama"),
])  # fmt: skip
def test_fields_that_change_the_count_are_obeyed(change: dict[str, Any], kind: str) -> None:
    fields = {**TINY[kind]().to_dict(), **change}
    shape = shape_from_config(fields, "changed", where="changed")
    assert shape.num_weights == num_weights(made(AutoModelForCausalLM, fields))


def test_a_picture_model_is_read_by_its_text_part(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert shape_of(str(tmp_path)).num_weights == shape_of("gemma-3-4b").num_weights


@pytest.mark.parametrize(("given", "meant"), [
    ("facebook/opt-1.3b", "opt-1.3b"), ("Qwen/Qwen3-8B-Base", "qwen3-8b"), ("openai-community/gpt2-xl", "gpt2-xl"),
    ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
    ("google/gemma-2-9b-it", "gemma-2-9b"), ("EleutherAI/pythia-1.4b-deduped", "pythia-1.4b"),
    ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"), ("gpt2", "gpt2"), ("opt-13", None),
    ("facebook/opt-1.3bb", None),
])  # fmt: skip
def test_a_hub_name_means_a_shape(given: str, meant: str | None) -> None:
    assert catalogue_name(given) == meant


def test_what_has_no_shape_is_refused_with_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"opt-1\.4b: no such folder") as caught:
        shape_of("opt-1.4b")
    assert "did you mean opt-1.3b?" in str(caught.value.hint)
    for text, problem in (
        ("[]", "holds list, not an object"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "bloom"}', "model_type = bloom"),
        ('{"model_type": "llama", "hidden_size": "big"}', "hidden_size = 'big' is not a number"),
        ('{"model_type": "qwen3"}', "has no hidden_size"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=problem) as caught:
            shape_of(str(tmp_path))
        assert str(tmp_path / "config.json") in caught.value.message
