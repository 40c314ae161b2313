"""Stages 2 and 3 learn what they are there for, from several seeds: a wrong sign anywhere shows here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dovetail.stages import pipeline
from tests.stages.runs import tiny_run, write_rows

WORDS = [a + b for b in "aiou" for a in "bdfgklmnprst"]
NOUNS = ("tea", "sea", "dog", "hat", "sun", "cup", "ink", "oak")
GOOD, BAD = ("yes {}!", "{}!", "oh {}!"), ("no {}?", "{}?", "oh {}?")
SEEDS = (0, 1, 2)


def pairs(nouns: Sequence[str]) -> list[dict[str, str]]:
    """Each good answer against each bad one."""
    return [
        {"prompt": f"Say {noun}", "chosen": good.format(noun), "rejected": bad.format(noun)}
        for noun in nouns
        for good in GOOD
        for bad in BAD
    ]


def sources(folder: Path, stage: str, learnt: list[Any], held_out: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "path": str(write_rows(folder / f"{stage}-{name}.jsonl", rows)),
            "stages": [stage],
            "held_out": name == "held_out",
        }
        for name, rows in (("learnt", learnt), ("held_out", held_out))
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_model_tells_good_answers_from_bad_ones_to_prompts_it_has_not_seen(
    seed: int, tmp_path: Path
) -> None:
    blend = sources(tmp_path, "reward", pairs(WORDS[:36]), pairs(WORDS[36:]))
    optimizer = {"learning_rate": 3e-3, "schedule": "linear"}
    settings = {"batch_size": 8, "max_steps": 40, "epochs": 20.0, "save_every": 40, "eval_every": 40}
    config = tiny_run(
        tmp_path,
        stages=("reward",),
        seed=seed,
        data={"blend": blend},
        reward=settings | {"optimizer": optimizer},
    )
    pipeline.run(config)
    results = json.loads((tmp_path / "run/summary.json").read_text())["reward"]
    assert results["accuracy"] > 0.8


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_raises_the_objective_that_it_trains_from_the_weights_of_stage_1(
    seed: int, tmp_path: Path
) -> None:
    """Paid for the letter e, less the KL to what stage 1 left, on prompts that nothing learns from."""
    judge = tmp_path / "judge.py"
    judge.write_text("def score(answers):\n    return [float(a.text.count('e')) for a in answers]\n")
    answers = [{"prompt": f"Say {noun}", "response": f"{noun} eh"} for noun in NOUNS[:6]]
    prompts = [{"prompt": row["prompt"]} for row in answers]
    blend = [
        *sources(tmp_path, "sft", answers, answers[:1]),
        *sources(tmp_path, "ppo", prompts, [{"prompt": f"Say {noun}"} for noun in NOUNS for _ in range(4)]),
    ]
    rate = {"learning_rate": 3e-3, "schedule": "constant"}
    ppo = {
        "batch_size": 16,
        "max_steps": 12,
        "eval_every": 12,
        "save_every": 12,
        "reward_function": f"{judge}:score",
        "actor_optimizer": rate,
        "critic_optimizer": rate,
        "cut_off_answers": "keep_score",
    }
    sft = {"max_steps": 30, "epochs": 20.0, "eval_every": 30, "save_every": 30, "optimizer": rate}
    data = {"blend": blend, "pretraining": []}
    pipeline.run(tiny_run(tmp_path, stages=("sft", "ppo"), seed=seed, data=data, sft=sft, ppo=ppo))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "ppo/held_out_objective" in row]
    first, last = rows[0]["ppo/held_out_objective"], rows[-1]["ppo/held_out_objective"]
    assert last > first + 0.3
