"""The results of a stage on the screen, and warnings of those that cannot be right."""

import json
import math
from pathlib import Path

import pytest

from dovetail.stages import pipeline, supervised
from dovetail.stages.verdict import LossWatch, doubts_of, is_absurd, shown
from dovetail.training.step import StepReport
from tests.stages.runs import tiny_run


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("ppo", [("accuracy", "reward"), ("held_out_pairs", "reward"), ("held_out_reward", "ppo")]),
        ("dpo", [("accuracy", "dpo"), ("held_out_pairs", "dpo"), ("held_out_loss", "dpo")]),
    ],
)
def test_every_result_of_the_summary_is_on_the_screen_too(
    algorithm: str,
    expected: list[tuple[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_run(tmp_path, algorithm=algorithm)
    pipeline.run(config)
    lines = capsys.readouterr().err.splitlines()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for stage in config.stages:
        title = pipeline.TITLES[stage]
        for name, value in summary[stage].items():
            if name != "steps":
                text = f"{name.replace('_', ' ')} {value:.4g}"
                assert any(line.startswith(f"{title}: ") and text in line for line in lines), text
    for name, stage in expected:
        assert name in summary[stage]


@pytest.mark.parametrize(
    ("accuracy", "pairs", "said"),
    [
        (0.5, 100, "not to be told from guessing (0.5, give or take 0.100)"),
        (0.599, 100, "not to be told from guessing"),
        (0.601, 100, None),
        (0.52, 10_000, None),
        (0.75, 4, "accuracy 0.750 on 4 held-out pairs is not to be told from guessing"),
        (0.39, 100, "prefers what people rejected"),
        (1.0, 9, None),
    ],
)
def test_an_accuracy_within_two_standard_errors_of_a_coin_is_doubted(
    accuracy: float, pairs: float, said: str | None
) -> None:
    assert 2 * math.sqrt(0.5 * 0.5 / pairs) == pytest.approx(1 / math.sqrt(pairs))
    doubts = list(doubts_of({"accuracy": accuracy, "held_out_pairs": pairs, "held_out_loss": 0.69}))
    assert len(doubts) == (said is not None)
    assert said is None or said in doubts[0]


def test_a_stage_without_held_out_rows_says_that_nothing_is_known() -> None:
    assert "no rows are held out" in shown({})
    assert list(doubts_of({})) == []
    assert list(doubts_of({"accuracy": 0.5})) == []


@pytest.mark.parametrize(
    ("name", "value", "is_so"),
    [
        ("sft/loss", 3e6, True),
        ("held_out_loss", 12.4, False),
        ("held_out_text_loss", math.nan, True),
        ("reward/loss", math.inf, True),
        ("ppo/critic_loss", 900.0, False),
        ("ppo/critic_loss", 3e6, True),
        ("ppo/actor_loss", -400.0, True),
        ("score_mean", 3e6, False),
    ],
)
def test_a_loss_out_of_all_proportion_is_absurd(name: str, value: float, is_so: bool) -> None:
    assert is_absurd(name, value) is is_so
    assert bool(list(doubts_of({name: value}))) is is_so


def test_each_loss_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = LossWatch()
    for step in range(1, 4):
        watch.see({"sft/loss": 2.0 if step == 1 else 5e6, "sft/grad_norm": 1e9}, step=step)
    err = capsys.readouterr().err
    assert err.count("warning: sft/loss is 5e+06 at step 2") == err.count("warning: ") == 1


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_whose_loss_is_in_the_millions_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    report = StepReport(
        loss=4e6,
        losses={},
        stats={},
        maxima={},
        grad_norm=1.0,
        learning_rate=0.0,
        skipped=False,
        num_tokens=8,
    )
    monkeypatch.setattr(supervised, "gradient_step", lambda *given, **named: report)
    pipeline.run(tiny_run(tmp_path, stages=(stage,)))
    assert f"warning: {stage}/loss is 4e+06 at step 1" in capsys.readouterr().err
