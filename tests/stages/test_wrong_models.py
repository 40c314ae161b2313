"""Models that do not go with their tokenizer, their config or the run's lengths: the right words, and no IndexError."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
)

from dovetail.cli.main import main
from dovetail.config.load import dump
from dovetail.config.run import RunConfig
from dovetail.errors import CheckpointError, ConfigError, ModelError
from dovetail.model.load import expect_rows_for
from dovetail.model.save import save_model
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.stages import pipeline
from tests.fakes import TINY, byte_tokenizer, tiny_model
from tests.stages.runs import tiny_run
from tests.stages.test_bad_input import SCORED
from tests.stages.test_pipeline import reversed_byte_tokenizer

TWO_STEPS: dict[str, Any] = {stage: {"max_steps": 2} for stage in ("sft", "reward", "ppo")}
FEW_ROWS = {"vocab_size": 200, "pad_token_id": None}
"""The byte tokenizer has 258 tokens, of which padding alone is never in a text."""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run_command


def recipe(config: RunConfig, folder: Path) -> str:
    """The configuration as a file for the command line."""
    file = folder / "recipe.yaml"
    file.write_text(dump(config), encoding="utf-8")
    return str(file)


def saved_with(
    folder: Path, name: str, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any
) -> str:
    """A tiny model whose config has these changes, with the byte tokenizer."""
    save_model(changed_model(name, **changes), tokenizer or byte_tokenizer(), folder)
    return str(folder)


def changed_model(name: str, **changes: Any) -> PreTrainedModel:
    config = TINY[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config)


def test_an_actor_without_room_for_prompt_and_answer_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    lengths: dict[str, Any] = {**SCORED, "sampling": {"max_new_tokens": 300}}
    with pytest.raises(ConfigError, match=r"make 556 tokens; the context of the actor is 512"):
        pipeline.run(tiny_run(tmp_path, stages=("ppo",), ppo=lengths))
    assert not (tmp_path / "run/ppo").exists()


@pytest.mark.parametrize("setting", ["generation", "training"])
def test_more_processes_for_a_model_than_there_are_are_refused_before_anything_is_trained(
    tmp_path: Path, setting: str
) -> None:
    config = tiny_run(tmp_path, tensor_parallel={setting: 2})
    with pytest.raises(ConfigError, match=f"{setting} = 2: the run's 1 process cannot form groups of 2"):
        pipeline.run(config)
    assert not (tmp_path / "run/sft").exists()


def test_offload_in_a_process_that_shards_nothing_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ConfigError, match=r"offload\.actor = true, but this process is not one of a group"
    ) as caught:
        pipeline.run(tiny_run(tmp_path, offload={"actor": True}))
    assert "torchrun --nproc-per-node 1" in str(caught.value.hint)
    assert not (tmp_path / "run/sft").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_reward_model_with_a_shorter_context_is_told_before_anything_is_trained(
    tmp_path: Path, name: str
) -> None:
    limit = "n_positions" if name == "gpt2" else "max_position_embeddings"
    short = saved_with(tmp_path / "short", name, **{limit: 64})
    config = tiny_run(
        tmp_path, reward_model={"path": short}, data={"max_tokens": 64, "max_prompt_tokens": 60}, **TWO_STEPS
    )
    with pytest.raises(
        ConfigError, match=r"= 60 and .* = 8 make 68 tokens; the context of the reward model is 64"
    ):
        pipeline.run(config)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_of_another_tokenizer_with_a_shorter_context_is_told(tmp_path: Path) -> None:
    short = saved_with(tmp_path / "short", "gpt2", reversed_byte_tokenizer(), n_positions=38)
    config = tiny_run(tmp_path, reward_model={"path": short}, data={"max_tokens": 38}, **TWO_STEPS)
    with pytest.raises(ModelError, match=r"has \d+ tokens; the context of the reward model \(GPT2.*\) is 38"):
        pipeline.run(config)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_names_the_tokens_that_the_model_has_no_row_for(tmp_path: Path, stage: str) -> None:
    small = saved_with(tmp_path / "small", "llama", **FEW_ROWS)
    config = tiny_run(
        tmp_path, stages=(stage,), actor={"path": small}, reward_model={"path": small}, ppo=SCORED
    )
    with pytest.raises(ModelError, match=r"small has 200 rows, .*: 57 in all, the first 200, '"):
        pipeline.run(config)


def test_chat_names_the_tokens_that_the_model_has_no_row_for(run: Run, tmp_path: Path) -> None:
    small = saved_with(tmp_path / "small", "llama", **FEW_ROWS)
    code, out, err = run("chat", small, "-p", "hello", "--device", "cpu")
    assert (code, out) == (2, "")
    assert f"error: the model's embedding of {small} has 200 rows" in err
    assert "hint: take the tokenizer that belongs to the model" in err


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_engine_names_the_tokens_that_a_model_given_as_a_module_has_no_row_for(role: str) -> None:
    small = changed_model("llama", **FEW_ROWS)
    actor = small if role == "actor" else tiny_model()
    critic = None if role == "actor" else small
    with pytest.raises(ModelError, match="has 200 rows"):
        RLHFEngine(
            actor_model=actor,
            critic_model=critic,
            tokenizer=byte_tokenizer(),
            total_steps=1,
            reward=lambda answers: [0.0] * len(answers),
            setup=Setup(device="cpu"),
        )


def test_added_tokens_without_a_row_do_no_harm_but_the_end_token_does() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    expect_rows_for(tokenizer, tiny_model(), "tiny")
    tokenizer.eos_token = "<|image|>"
    with pytest.raises(ModelError, match=r"1 in all, the first 258, '<\|image\|>'"):
        expect_rows_for(tokenizer, tiny_model(), "tiny")


def test_an_end_token_that_the_model_does_not_know_is_told_on_the_command_line(
    run: Run, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path)
    edit_json(Path(config.actor.path) / "tokenizer_config.json", eos_token="<|stop|>")
    code, _, err = run("sft", recipe(config, tmp_path))
    assert code == 2
    assert "has 258 rows, and its tokenizer has ids beyond them: 1 in all, the first 258, '<|stop|>'" in err
    assert "hint: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 1}, "it has no place for model.layers.1."),
        ({"num_hidden_layers": 3}, "has no weights for model.layers.2."),
        ({"intermediate_size": 96}, "the config asks for 32 x 96"),
        ({"vocab_size": 300}, "258 x 32, the config asks for 300 x 32"),
    ],
)
@pytest.mark.parametrize("command", ["sft", "reward", "chat"])
def test_a_config_that_contradicts_its_weights_is_told_on_the_command_line(
    run: Run, tmp_path: Path, command: str, changes: dict[str, int], reason: str
) -> None:
    config = tiny_run(tmp_path)
    model = config.actor.path
    edit_json(Path(model) / "config.json", **changes)
    what = (model, "-p", "hello", "--device", "cpu") if command == "chat" else (recipe(config, tmp_path),)
    code, _, err = run(command, *what)
    assert code == 2
    assert "error: " in err
    assert model in err
    assert reason in err
    assert "hint: " in err
    assert "Traceback" not in err


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens_trains_and_talks(
    run: Run, tmp_path: Path
) -> None:
    wide = saved_with(tmp_path / "wide", "llama", vocab_size=320)
    config = tiny_run(tmp_path, actor={"path": wide}, reward_model={"path": wide}, **TWO_STEPS)
    assert run("train", recipe(config, tmp_path))[0] == 0
    assert run("chat", config.output_dir, "-p", "hello", "--device", "cpu", "--max-new-tokens", "40")[0] == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert [summary[stage]["steps"] for stage in ("sft", "reward", "ppo")] == [2, 2, 2]


def test_a_padding_token_without_a_row_is_no_obstacle(tmp_path: Path) -> None:
    no_row_for_padding = saved_with(tmp_path / "model", "llama", vocab_size=257, pad_token_id=None)
    path = {"path": no_row_for_padding}
    pipeline.run(tiny_run(tmp_path, actor=path, reward_model=path, **TWO_STEPS))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/reward/model")
    assert saved.config.pad_token_id not in (None, 256)
    assert saved.config.pad_token_id < saved.get_input_embeddings().num_embeddings


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_model_that_cannot_be_written_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = tiny_run(tmp_path, stages=(stage,), ppo=SCORED)

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("this tokenizer has no file format")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuses)
    with pytest.raises(CheckpointError, match="this tokenizer has no file format"):
        pipeline.run(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert list((tmp_path / "run" / stage).iterdir()) == []


@pytest.mark.parametrize("role", ["actor", "reward_model"])
def test_a_model_of_another_kind_is_refused_before_anything_is_written(tmp_path: Path, role: str) -> None:
    T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder models are not supported"):
        pipeline.run(tiny_run(tmp_path, **{role: {"path": str(tmp_path / "t5")}}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["chat", "export"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_added_tokens_that_the_template_writes_need_rows(
    run: Run, tmp_path: Path, command: str, role: str
) -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.role == '" + role + "' %}<|mark|>{% endif %}"
        "{{ m.content + '<|end|>' }}{% endfor %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tiny_model().save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    arguments = ["-p", "hello", "--device", "cpu"] if command == "chat" else [str(tmp_path / "out")]
    code, _, err = run(command, str(tmp_path / "small"), *arguments)
    assert code == 2
    assert "small has 258 rows" in err
    assert "the first 258, '<|mark|>'" in err
