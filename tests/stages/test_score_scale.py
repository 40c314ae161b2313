"""Scores on the scale of the first actor's answers: measured once, the same after a resume, off by default."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.data.records import Prompt, message
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.rewards import Answer, Scored
from dovetail.stages import pipeline
from dovetail.stages.score_scale import ScoreScale
from tests.parallel.worker import run_to
from tests.rlhf.tiny import end_often, tiny_engine
from tests.stages.test_algorithms import model_of, run_of

PROMPTS = [Prompt(messages=(message("user", f"Say {i}"),)) for i in range(12)]


def engine_of(scores_of: Any) -> RLHFEngine:
    engine = tiny_engine()
    end_often(engine.roles.actor)
    engine.roles.score = lambda answers: Scored(torch.tensor(scores_of(answers)), {"reward/own": 1.0})
    return engine


def lengths(answers: list[Answer]) -> list[float]:
    return [50.0 + 3.0 * len(answer.answer_ids) for answer in answers]


def test_answers_of_the_first_actor_have_mean_zero_and_deviation_one() -> None:
    engine = engine_of(lengths)
    answers = engine.generate(PROMPTS, seed=engine.setup.seed)
    ended = [answer for answer in answers if answer.finished]
    assert 2 < len(ended) < len(answers)
    raw = lengths(ended)
    scale = ScoreScale(engine, is_on=True)
    scale.measure(PROMPTS)
    assert scale.mean == pytest.approx(statistics.mean(raw))
    assert scale.deviation == pytest.approx(statistics.pstdev(raw))
    scored = engine.roles.score(ended)
    assert float(scored.scores_S.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(scored.scores_S.std(unbiased=False)) == pytest.approx(1.0, abs=1e-3)
    assert scored.stats == {"reward/own": 1.0, "reward/unscaled_mean": pytest.approx(statistics.mean(raw))}


def test_the_scale_is_measured_once_and_saved() -> None:
    engine = engine_of(lengths)
    scale = ScoreScale(engine, is_on=True)
    scale.measure(PROMPTS)
    state = json.loads(json.dumps(scale.state_dict()))
    resumed = ScoreScale(engine_of(lambda answers: [7.0 for _ in answers]), is_on=True)
    resumed.load_state_dict(state)
    resumed.measure(PROMPTS)
    assert (resumed.mean, resumed.deviation) == (scale.mean, scale.deviation)


def test_equal_scores_give_a_mean_and_no_unit(capsys: pytest.CaptureFixture[str]) -> None:
    scale = ScoreScale(engine_of(lambda answers: [7.0 for _ in answers]), is_on=True)
    scale.measure(PROMPTS[:3])
    assert (scale.mean, scale.deviation) == (7.0, 1.0)
    assert "answers before training have the score 7" in capsys.readouterr().err


def test_off_it_leaves_the_scorer_alone() -> None:
    engine = engine_of(lengths)
    own = engine.roles.score
    ScoreScale(engine, is_on=False).measure(PROMPTS)
    assert engine.roles.score is own


def test_a_stopped_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path, "rloo", name=name, standardise_scores=True, sampling={"max_new_tokens": 8})
        for name in ("run", "stopped")
    ]
    plain = run_of(tmp_path, "rloo", name="plain")
    for config in (runs[0], plain):
        pipeline.run(config)
    run_to(("ppo", 1), runs[1])
    pipeline.run(runs[1])
    assert model_of(runs[1]) == model_of(runs[0]) != model_of(plain)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("reward/unscaled_mean" in row for row in rows)
