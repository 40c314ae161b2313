"""Tasks during training: the figures of `dovetail eval` on the finished model."""

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.rlhf.tasks.named import parse_task
from dovetail.rlhf.tasks.subject import Drawing
from dovetail.serving.inference.comparison import compare, contestants
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run, write_rows


def test_the_last_figures_of_training_are_those_of_the_finished_model(tmp_path: Path) -> None:
    squad = write_rows(
        tmp_path / "dev.v2.jsonl",
        [
            {"question": "Who?", "context": "It was Ann.", "answers": ["Ann"], "is_impossible": False},
            {"question": "When?", "context": "It was Ann.", "answers": [], "is_impossible": True},
        ],
    )
    text = write_rows(tmp_path / "wiki.jsonl", [{"text": "A dovetail joint."}, {"text": "Wood and glue."}])
    function = tmp_path / "mine.py"
    function.write_text("def odd(completion):\n    return len(completion) % 2\n")
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"Say {i}"} for i in range(5)])
    specs = [f"squad={squad}", f"text={text}", f"{function}:odd={prompts}"]
    config = tiny_run(tmp_path, ppo={"eval_tasks": specs, "eval_every": 2})
    pipeline.run(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "ppo/squad_dev_f1" in row]
    assert [row["step"] for row in judged] == [0, 2, 3]
    models = contestants([str(tmp_path / "run" / "ppo" / "model")])
    found = compare(
        models, [parse_task(spec) for spec in specs], Drawing(max_new_tokens=8), limit=256, device="cpu"
    )
    expected = {
        f"ppo/{parse_task(result.task).short}_{figure}": round(value, 5)
        for result in found
        for own in result.figures.values()
        for figure, value in own.items()
    }
    assert {"ppo/squad_dev_f1", "ppo/text_wiki_perplexity", "ppo/odd_p_accuracy"} <= expected.keys()
    assert {name: round(judged[-1][name], 5) for name in expected} == expected
    assert judged[-1]["ppo/text_wiki_nats_per_token"] != judged[0]["ppo/text_wiki_nats_per_token"]


def test_a_run_compared_with_its_start_repeats_the_last_evaluation_of_training(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, ppo={"eval_every": 2})
    pipeline.run(config)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "ppo/held_out_reward" in row)
    prompts, _ = compare(contestants([str(run)]), [], Drawing(max_new_tokens=8), limit=256, device="cpu")
    found = prompts.figures["ppo"]
    assert abs(found["kl_nats_per_answer"]) > 1e-4
    for name in ("reward", "kl_nats_per_answer", "entropy_nats_per_token", "answer_tokens", "distinct_2"):
        assert found[name] == pytest.approx(last[f"ppo/held_out_{name}"], rel=1e-4), name


@pytest.mark.parametrize("changes", [{"algorithm": "dpo", "stages": ("dpo",)}, {"stages": ("sft",)}])
def test_a_run_without_ppo_is_compared_on_the_prompts_of_its_own_held_out_rows(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tiny_run(tmp_path, **changes)
    kept = {"dpo": "reward", "sft": "sft"}[config.stages[-1]]
    blend = tuple(source for source in config.data.blend if source.stages == (kept,))
    pipeline.run(config.model_copy(update={"data": config.data.model_copy(update={"blend": blend})}))
    prompts, *_ = compare(
        contestants([str(tmp_path / "run")]), [], Drawing(max_new_tokens=8), limit=256, device="cpu"
    )
    assert (prompts.task, prompts.num_rows) == ("held-out prompts", 4)
    assert list(prompts.figures) == [config.stages[-1]]
