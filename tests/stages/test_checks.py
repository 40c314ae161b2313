"""What is refused before the first stage, in one pass, whatever stage would have met it."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError, DataError, DovetailError, ModelError
from dovetail.model.save import save_model
from dovetail.parallel.world import ALONE, World
from dovetail.stages import pipeline
from dovetail.stages.checks import refuse
from tests.fakes import byte_tokenizer, tiny_model
from tests.stages.runs import save_tiny_model, tiny_run, write_rows
from tests.stages.test_bad_input import SCORED
from tests.stages.test_pipeline import reversed_byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def source(path: Path, *stages: str) -> dict[str, Any]:
    return {"path": str(path), "stages": list(stages) or None, "held_out": False}


def with_blend(config: RunConfig, *more: dict[str, Any], without: str) -> RunConfig:
    """The run with other sources in the place of those of one stage."""
    values = config.model_dump(mode="json")
    kept = [item for item in values["data"]["blend"] if without not in item["stages"]]
    values["data"]["blend"] = [*kept, *more]
    return RunConfig.model_validate(values)


def chatml_model(folder: Path) -> Path:
    """A model whose chat template uses two tokens that its embedding has no rows for."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|unused|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    save_model(tiny_model(), tokenizer, folder)
    return folder


def rows_without_comparisons(folder: Path, config: RunConfig) -> RunConfig:
    rows = write_rows(folder / "only-prompts.jsonl", [{"prompt": f"a{i}"} for i in range(4)])
    return with_blend(config, source(rows, "reward"), without="reward")


def broken_row(folder: Path, config: RunConfig) -> RunConfig:
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    return with_blend(config, source(folder / "broken.jsonl", "ppo"), without="ppo")


def no_shard(folder: Path, config: RunConfig) -> RunConfig:
    """The reward model's index names a file that was never copied."""
    model = save_tiny_model(folder / "cut-off")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return changed(config, reward_model={"path": str(model)})


def changed(config: RunConfig, **groups: Any) -> RunConfig:
    values = config.model_dump(mode="json")
    for name, value in groups.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


LATE: dict[str, tuple[Callable[[Path, RunConfig], RunConfig], type[DovetailError], str]] = {
    "stage 2's file is missing": (
        lambda folder, config: with_blend(config, source(folder / "pears.jsonl", "reward"), without="reward"),
        DataError,
        r"pears\.jsonl: there is no such file",
    ),
    "stage 2 has no comparisons": (
        rows_without_comparisons,
        DataError,
        "no row is left to train the stage reward",
    ),
    "stage 3's file is broken": (broken_row, DataError, r"broken\.jsonl line 2"),
    "the plain text is missing": (
        lambda folder, config: changed(
            config, data={"pretraining": [{"path": "wiki.txt.jsonl", "text": "text"}]}
        ),
        DataError,
        r"wiki\.txt\.jsonl",
    ),
    "the reward model is missing": (
        lambda folder, config: changed(config, reward_model={"path": str(folder / "nowhere")}),
        ModelError,
        "nowhere does not exist",
    ),
    "a shard of the reward model is missing": (
        no_shard,
        ModelError,
        "lacks the weights model-00002-of-00002",
    ),
    "the reward function is missing": (
        lambda folder, config: changed(config, ppo={"reward_function": f"{folder}/none.py:score"}),
        ConfigError,
        r"ppo\.reward_function",
    ),
    "a task's file is missing": (
        lambda folder, config: changed(config, ppo={"eval_tasks": (f"squad={folder}/none.jsonl",)}),
        DataError,
        "none.jsonl: there is no such file",
    ),
    "a task compares models": (
        lambda folder, config: changed(config, ppo={"eval_tasks": ("prompts.jsonl",)}),
        ConfigError,
        "a task that compares finished models",
    ),
    "two tasks have one name": (
        lambda folder, config: changed(config, ppo={"eval_tasks": [f"text={folder}/data/texts.jsonl"] * 2}),
        ConfigError,
        "two tasks of this name",
    ),
    "the batch does not divide into groups": (
        lambda folder, config: config.model_copy(
            update={"algorithm": "grpo", "ppo": config.ppo.model_copy(update={"batch_size": 12})}
        ),
        ConfigError,
        "is not divisible by the 8 answers to each prompt",
    ),
    "the algorithm is missing": (
        lambda folder, config: config.model_copy(update={"algorithm": f"{folder}/none.py:Mine"}),
        ConfigError,
        "cannot be loaded",
    ),
    "answers are too long": (
        lambda folder, config: changed(config, ppo={"sampling": {"max_new_tokens": 300}}),
        ConfigError,
        "make 556 tokens; the context of the actor is 512",
    ),
    "an adapter of the reward model has no layer": (
        lambda folder, config: changed(config, reward_model={"lora": {"target_modules": ["q_porj"]}}),
        ModelError,
        "has no linear layer named q_porj",
    ),
    "the device is not there": (
        lambda folder, config: changed(config, device="cuda:99"),
        ConfigError,
        "device = 'cuda:99'",
    ),
    "a package is missing": (
        lambda folder, config: changed(config, tracking={"wandb_project": "mine"}),
        ConfigError,
        "needs the package wandb",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_what_a_late_stage_would_meet_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    change, kind, message = LATE[case]
    config = change(tmp_path, tiny_run(tmp_path))
    with pytest.raises(DovetailError, match=message) as caught:
        pipeline.run(config)
    assert type(caught.value) is kind
    assert not (tmp_path / "run").exists()


def test_all_problems_are_listed_at_once_each_with_its_hint(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    config = with_blend(tiny_run(tmp_path), source(tmp_path / "pears.jsonl", "reward"), without="reward")
    config = changed(
        config, actor={"path": str(tmp_path / "nowhere")}, device="mps", ppo={"reward_function": "x"}
    )

    def also() -> None:
        raise ConfigError("two GPUs are missing")

    with pytest.raises(ConfigError) as caught:
        refuse(config, ALONE, also)
    lines = caught.value.message.splitlines()
    assert lines[0] == "5 problems, found before anything was started:"
    wanted = [
        "two GPUs",
        "device = 'mps'",
        "pears.jsonl",
        "nowhere does not exist",
        "ppo.reward_function = 'x'",
    ]
    assert [wanted[i] in line for i, line in enumerate(lines[1:])] == [True] * 5
    assert "(did you mean" in lines[3]


def test_a_run_that_can_come_to_its_end_is_let_through(tmp_path: Path) -> None:
    refuse(tiny_run(tmp_path, ppo={**SCORED, "reward_function_weight": 0.5}), ALONE)
    assert not (tmp_path / "run").exists()


def test_what_no_stage_needs_is_not_looked_for(tmp_path: Path) -> None:
    nowhere = {"path": str(tmp_path / "nowhere")}
    refuse(tiny_run(tmp_path, stages=("sft",), reward_model=nowhere, ppo={"reward_function": "x"}), ALONE)
    refuse(tiny_run(tmp_path, stages=("reward",), actor=nowhere, ppo={"reward_function": "x"}), ALONE)
    refuse(tiny_run(tmp_path, stages=("sft", "ppo"), reward_model=nowhere, ppo=SCORED), ALONE)


def test_a_finished_stage_needs_neither_its_rows_nor_its_start(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    for stage in ("sft", "reward"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "done").touch()
    (tmp_path / "run/config.yaml").write_text("# fingerprint: none")
    save_tiny_model(tmp_path / "run/sft/model")
    save_tiny_model(tmp_path / "run/reward/model")
    gone = changed(config, actor={"path": "./gone"}, reward_model={"path": "./gone"})
    gone = with_blend(with_blend(gone, without="sft"), without="reward")
    with pytest.raises(DovetailError, match="was edited"):  # and nothing else
        refuse(gone, ALONE)


def test_a_reward_model_of_other_tokens_may_have_a_shorter_context(tmp_path: Path) -> None:
    short = save_tiny_model(tmp_path / "short", "gpt2", tokenizer=reversed_byte_tokenizer())
    config = AutoConfig.from_pretrained(short)
    config.n_positions = 64
    config.save_pretrained(short)
    refuse(tiny_run(tmp_path, reward_model={"path": str(short)}), ALONE)


@pytest.mark.parametrize("role", ["actor", "reward_model"])
def test_tokens_of_the_chat_template_without_a_row_are_named(tmp_path: Path, role: str) -> None:
    model = chatml_model(tmp_path / "chatml")
    with pytest.raises(ModelError, match=r"has 258 rows.*: 2 in all, the first 258, '<\|im_start\|>'"):
        refuse(tiny_run(tmp_path, **{role: {"path": str(model)}}), ALONE)
    resized = AutoModelForCausalLM.from_pretrained(model)
    resized.resize_token_embeddings(261)
    save_model(resized, AutoTokenizer.from_pretrained(model), tmp_path / "resized")
    refuse(tiny_run(tmp_path, **{role: {"path": str(tmp_path / "resized")}}), ALONE)


def test_a_token_without_a_row_in_the_texts_is_named_before_the_first_step(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|wide|>"])
    model = save_tiny_model(tmp_path / "wide", tokenizer=tokenizer)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "response": f"b <|wide|> {i}"} for i in range(4)]
    )
    config = with_blend(tiny_run(tmp_path, stages=("sft",), actor={"path": str(model)}), without="sft")
    with pytest.raises(ModelError, match=r"row of the stage sft holds the token id 258, .* has 258 rows"):
        pipeline.run(with_blend(config, source(rows, "sft"), without="sft"))


def test_an_actor_with_the_head_of_a_reward_model_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "scalar")
    config = AutoConfig.from_pretrained(model)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(model)
    with pytest.raises(ModelError, match="not a causal language model"):
        refuse(tiny_run(tmp_path, stages=("ppo",), actor={"path": str(model)}, ppo=SCORED), ALONE)


def test_sizes_of_tensor_parallel_groups_are_looked_at_for_the_models_in_use(tmp_path: Path) -> None:
    three = {"training": 3}
    with pytest.raises(ConfigError, match=r"tensor_parallel\.training = 3: .*actor's 4 attention heads"):
        refuse(tiny_run(tmp_path, stages=("sft",), tensor_parallel=three), World(size=3))
    other = save_tiny_model(tmp_path / "other", "opt")
    with pytest.raises(ConfigError, match=r"the actor's 4 .*\n.*the reward model's 4") as caught:
        refuse(tiny_run(tmp_path, tensor_parallel=three, reward_model={"path": str(other)}), World(size=3))
    assert "2 problems" in caught.value.message


def test_the_reward_function_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "judge.py").write_text("def score(answers):\n    return [0.0] * len(answers)\n")
    refuse(tiny_run(tmp_path, stages=("ppo",), ppo={"reward_function": "~/judge.py:score"}), ALONE)


def test_a_gpu_is_not_asked_for_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        refuse(tiny_run(tmp_path, device="cuda"), ALONE)
    refuse(tiny_run(tmp_path, device="auto"), ALONE)
