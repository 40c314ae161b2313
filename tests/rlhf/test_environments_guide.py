"""The code in docs/environments.md runs, as text and as settings."""

import re
from pathlib import Path
from typing import Any

import pytest

from dovetail.config.load import load
from dovetail.rlhf.environments import load_environment
from tests.rlhf.test_tool_calls import called, played, replies_in

GUIDE = (Path(__file__).parents[2] / "docs/environments.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python (\w+\.py)\n(.*?)```", GUIDE, re.DOTALL))


def environment_of(folder: Path, file: str, name: str) -> Any:
    (folder / file).write_text(FILES[file], encoding="utf-8")
    return load_environment(f"{folder / file}:{name}")


def test_the_game_is_won_by_its_hints(tmp_path: Path) -> None:
    answer = played(environment_of(tmp_path, "my_game.py", "GuessTheNumber"), ["no idea", "9", "1"])
    assert answer.episode is not None
    assert answer.episode.failure is None
    assert [turn["content"] for turn in answer.messages if turn["role"] == "user"][1:] == [
        "That is no number. Guess again.", "My number is lower than 9.",
    ]  # fmt: skip
    assert answer.finished
    assert answer.episode.rewards[-1][1] == 1.0


@pytest.mark.parametrize(("file", "name"), [("my_tools.py", "TOOLS"), ("my_graded_tools.py", "Dictionary")])
def test_the_tools_are_described_and_called(file: str, name: str, tmp_path: Path) -> None:
    environment = environment_of(tmp_path, file, name)
    call = called("look_up", word="cat") if name == "Dictionary" else called("calculate", expression="1 + 1")
    answer = played(environment, [call, "It is 5."])
    assert replies_in(answer) == (["felis"] if name == "Dictionary" else ["None"])
    assert answer.episode is not None
    if name == "Dictionary":
        assert answer.episode.rewards[-1][1] == 1.0


def test_the_commands_give_settings_that_exist() -> None:
    commands = re.findall(r"dovetail ppo my_recipe.yaml (.*)", GUIDE)
    assert len(commands) == 2
    for command in commands:
        environment = load("opt-1.3b", command.split()).ppo.environment
        assert environment is not None
        assert environment.source in command


def test_the_table_of_limits_shows_the_defaults() -> None:
    environment = load("opt-1.3b", ["ppo.environment=a.py:B"]).ppo.environment
    assert environment is not None
    assert f"`ppo.environment.max_turns` ({environment.max_turns})" in GUIDE
    assert f"`ppo.environment.time_limit` ({environment.time_limit:g})" in GUIDE
