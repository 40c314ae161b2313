"""The examples of docs/rewards.md, run."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dovetail.config.load import check
from dovetail.config.yaml_source import read_yaml
from dovetail.rlhf.reward_functions import load_reward_function
from dovetail.rlhf.verifiers.builtin import VERIFIERS
from tests.rlhf.test_reward_functions import answers

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```", GUIDE, re.MULTILINE)


def block(name: str) -> str:
    (text,) = (text for _, file, text in BLOCKS if file == name)
    return str(text)


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        ("number", [1.0, 0.0]),
        ("my_rewards.py:score", [0.0, 0.0]),
        ("my_rewards.py:brevity", [-0.28, -0.04]),
        ("my_rewards.py:shape", [1.0, 0.0]),
        ("my_rewards.py:half_right", [1.0, 0.0]),
    ],
)
def test_the_functions_of_the_guide_score_its_rows(
    function: str, scores: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(block("my_rewards.py"), encoding="utf-8")
    rows = [json.loads(line) for line in block("sums.jsonl").splitlines()]
    given = answers(["So it is <answer>42</answer>", "It is 2"], rows)
    found = load_reward_function(function)(given)
    assert found.stats == {f"reward/{function.rpartition(':')[2]}_failures": 0.0}
    assert found.scores_S.tolist() == pytest.approx(scores, abs=0.05)


def test_the_recipes_of_the_guide_name_functions_that_exist() -> None:
    recipes = [text for language, _, text in BLOCKS if language == "yaml"]
    named = [term for text in recipes for term in check(read_yaml(text, "guide").values).ppo.reward_function]
    assert [(term.function, term.weight, term.time_limit, term.fallback) for term in named[1:]] == [
        ("number", 1.0, 300.0, None),
        ("my_rewards.py:shape", 0.2, 300.0, None),
        ("my_rewards.py:brevity", 0.1, 10.0, -1.0),
    ]
    assert all(term.function in VERIFIERS or f"def {term.function[14:]}(" in GUIDE for term in named)
    assert yaml.safe_load(recipes[0])["ppo"] == {"reward_function": "number"}


def test_the_table_of_verifiers_is_whole() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \| `\w+` \|", GUIDE, re.MULTILINE)) == sorted(VERIFIERS)


def test_the_judge_of_the_guide_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_judge.py").write_text(block("my_judge.py"), encoding="utf-8")
    assert load_reward_function("my_judge.py:helpful").label == "helpful"
