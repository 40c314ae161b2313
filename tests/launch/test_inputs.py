"""Two machines are made to differ in one thing, which must be what is named."""

from pathlib import Path
from typing import Any

import pytest

from dovetail.config.run import RunConfig
from dovetail.launch.inputs import Inputs, inputs_of
from tests.stages.runs import tiny_run


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a process works, with all its files; every process knows them by the same names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("def score(answer): return 1.0\n")
    return tmp_path


def run(**changes: Any) -> RunConfig:
    ppo = {"reward_function": "judge.py:score", **changes.pop("ppo", {})}
    return tiny_run(Path(), ppo=ppo, **changes)


def inputs(config: RunConfig) -> Inputs:
    return inputs_of(config, look_at_files=True)


def test_the_same_command_and_files_do_not_differ(machine: Path) -> None:
    first = inputs(run())
    assert inputs(run()).difference(first) is None
    own = {"output_dir": "/scratch/run", "tracking": {"tensorboard": True}, "data": {"cache_dir": "/scratch"}}
    assert inputs(run(**own)).difference(first) is None


def test_a_setting_is_named_with_both_values(machine: Path) -> None:
    first = inputs(run())
    assert inputs(run(ppo={"gamma": 0.9})).difference(first) == "ppo.gamma = 0.9 (rank 0: 1.0)"
    with_adapter = inputs(run(actor={"lora": {"rank": 8}})).difference(first)
    assert with_adapter == "actor.lora = not set (rank 0: None)"


@pytest.mark.parametrize(
    "name", ["judge.py", "data/ppo-train.jsonl", "data/texts.jsonl", "model-llama/model.safetensors"]
)
def test_a_file_that_differs_is_named_also_when_its_size_does_not(machine: Path, name: str) -> None:
    config = run()
    first = inputs(config)
    file = machine / name
    content = file.read_bytes()
    file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    told = str(inputs(config).difference(first))
    assert told.startswith(f"{name}: {len(content):,} bytes, hash ")
    assert told.count(f"{len(content):,} bytes, hash ") == 2
    file.unlink()
    assert str(inputs(config).difference(first)).startswith(f"{name}: no such file (rank 0: ")


def test_only_the_first_process_of_a_machine_reads(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run()
    monkeypatch.setenv("LOCAL_RANK", "1")
    neighbour = inputs_of(config)
    assert neighbour.files is None
    assert neighbour.difference(inputs(config)) is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert inputs_of(config) == inputs(config)


def test_what_lies_on_the_hub_has_no_file_here(machine: Path) -> None:
    local, on_the_hub = (
        run(),
        run(actor={"path": "facebook/opt-125m"}, reward_model={"path": "facebook/opt-350m"}),
    )
    seen, left = (set(inputs(config).files or ()) for config in (local, on_the_hub))
    assert seen - left == {f"model-llama/{file.name}" for file in Path("model-llama").iterdir()}


def test_a_chat_template_is_a_file_only_where_it_names_one(machine: Path) -> None:
    (machine / "chat.jinja").write_text("{{ messages[0].content }}")
    assert "chat.jinja" in (inputs(run(actor={"chat_template": "chat.jinja"})).files or ())
    in_words = inputs(run(actor={"chat_template": "{{ messages[0].content }}" + "问" * 200}))
    assert in_words.files == inputs(run()).files
