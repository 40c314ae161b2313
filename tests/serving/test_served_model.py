"""What the paths on the command line stand for, and adapters that share their base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dovetail.engine import HybridEngine, Sampling
from dovetail.errors import ConfigError, ModelError
from dovetail.model.load import load_causal_lm, save_model
from dovetail.serving.served_model import EngineSettings, load_models
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.live import Live, live

SETTINGS = EngineSettings(device="cpu", max_running=4, cache_tokens=1024)


def saved(folder: Path, seed: int = 0) -> Path:
    save_model(tiny_model(seed=seed), byte_tokenizer(), folder)
    return folder


def names(*paths: object) -> list[str]:
    return [model.name for model in load_models([str(path) for path in paths], SETTINGS)]


def test_a_run_stands_for_all_its_finished_chat_models_the_best_first(tmp_path: Path) -> None:
    saved(tmp_path / "run/sft/model")
    saved(tmp_path / "run/ppo/model", seed=1)
    saved(tmp_path / "run/ppo/model_ema", seed=2)
    other = saved(tmp_path / "other")
    run = tmp_path / "run"
    assert names(run) == ["ppo", "ppo-ema", "sft"]
    assert names(run, other) == ["run-ppo", "run-ppo-ema", "run-sft", "other"]
    assert names(f"mine={run}", f"base={other}") == ["mine", "mine-ppo-ema", "mine-sft", "base"]


def test_a_name_taken_twice_is_refused(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a/model"), saved(tmp_path / "b/model")
    with pytest.raises(ConfigError, match="two models are called 'model'") as caught:
        load_models([str(first), str(second)], SETTINGS)
    assert caught.value.hint == f"name one yourself: dovetail serve other={second}"


def test_models_of_one_run_answer_each_with_its_own_weights(tmp_path: Path) -> None:
    saved(tmp_path / "run/sft/model")
    saved(tmp_path / "run/ppo/model", seed=1)
    with live(load_models([str(tmp_path / "run")], SETTINGS)) as server:
        assert answers(server, "sft", "ppo") == [greedy(tiny_model()), greedy(tiny_model(seed=1))]


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """Random LoRA weights, large enough to change every answer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted: Any = get_peft_model(load_causal_lm(base, dtype=torch.float32, device="cpu"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def greedy(model: Any) -> str:
    """The likeliest answer to hello, by the engine itself."""
    tokenizer = byte_tokenizer()
    with HybridEngine(model).generating() as generate:
        ids = tokenizer("hello")["input_ids"]
        (answer,) = generate(
            [ids], Sampling(max_new_tokens=12, temperature=0, stop_token_ids=(256,)), seeds=[0]
        )
    return str(tokenizer.decode(answer.token_ids, skip_special_tokens=True))


def answers(server: Live, *models: str) -> list[str]:
    return [
        server.post("/v1/completions", model=name, prompt="hello", max_tokens=12, temperature=0).json()[
            "choices"
        ][0]["text"]
        for name in models
    ]


def test_adapters_share_the_weights_of_their_base_and_answer_as_themselves(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    folders = [adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    models = load_models([str(folder) for folder in (*folders, base)], SETTINGS)
    weights = [model.thread._engine.model.model.layers[0].self_attn.k_proj.weight for model in models]
    assert len({weight.data_ptr() for weight in weights}) == 1
    expected = [
        greedy(
            PeftModel.from_pretrained(load_causal_lm(base, dtype=torch.float32, device="cpu"), str(folder))
        )
        for folder in folders
    ]
    assert expected[0] != expected[1]
    with live(models) as server:
        assert answers(server, "one", "two", "base", "one") == [*expected, greedy(tiny_model()), expected[0]]


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    folder = adapter(saved(tmp_path / "base"), tmp_path / "one", 0)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base model") as caught:
        load_models([str(folder)], SETTINGS)
    assert "merged model" in str(caught.value.hint)


def damage_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def widen_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.cat([weight, weight]) for name, weight in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_config, "cannot be loaded: Expecting property name"),
        (remove_weights, "no adapter_model.safetensors"),
        (widen_weights, "cannot be loaded: "),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = adapter(saved(tmp_path / "base"), tmp_path / "one", 0)
    damage(folder)
    with pytest.raises(ModelError, match=says) as caught:
        load_models([str(folder)], SETTINGS)
    assert str(folder) in caught.value.message
