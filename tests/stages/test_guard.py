"""What a rollout is warned of, when a run ends, and which model is the best."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.config.stages import PpoConfig
from dovetail.errors import TrainingStopped
from dovetail.stages import guard
from dovetail.stages.guard import (
    Best,
    Guard,
    has_collapsed,
    warnings_of_the_policy,
    warnings_of_the_reward,
)

FIRST = {"entropy_nats_per_token": 2.0, "distinct_fraction": 1.0, "answer_tokens": 40.0}
HEALTHY = {
    "ppo/entropy_nats_per_token": 1.8,
    "ppo/distinct_fraction": 0.9,
    "ppo/answer_tokens": 35.0,
    "ppo/kl_nats_per_answer": 2.0,
    "ppo/kl_nats_per_token": 0.05,
    "ppo/cut_off_fraction": 0.02,
    "ppo/score_mean": 0.4,
    "ppo/score_std": 1.0,
    "ppo/score_clipped_fraction": 0.0,
}
COLLAPSED = {"ppo/entropy_nats_per_token": 0.03, "ppo/distinct_fraction": 0.2}


def warnings_of(row: dict[str, float], config: PpoConfig) -> dict[str, str]:
    return warnings_of_the_reward(row, config) | warnings_of_the_policy(row, FIRST)


def test_a_healthy_rollout_has_no_warning() -> None:
    assert warnings_of(HEALTHY, PpoConfig()) == {}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("KL", {"ppo/kl_nats_per_token": 2.7, "ppo/kl_nats_per_answer": 16.0}, "2.70 nats per token (16.0 per"),
        ("negative KL", {"ppo/kl_nats_per_answer": -1.2}, "-1.20 nats per answer"),
        ("entropy", {"ppo/entropy_nats_per_token": 0.6}, "from 2.00 to 0.60 nats"),
        ("distinct answers", {"ppo/distinct_fraction": 0.3}, "only 30% of the answers differ"),
        ("length", {"ppo/answer_tokens": 9.0}, "40 tokens at the start and have 9 now"),
        ("length", {"ppo/answer_tokens": 130.0}, "40 tokens at the start and have 130 now"),
        ("cut off", {"ppo/cut_off_fraction": 0.4}, "40% of the answers reached ppo.sampling.max_new_tokens = 256"),
        ("all cut off", {"ppo/cut_off_fraction": 1.0}, "ppo.cut_off_answers=keep_score"),
        ("equal scores", {"ppo/score_std": 0.0}, "all answers have the score 0.4"),
        ("clipped scores", {"ppo/score_clipped_fraction": 0.2}, "20% of the scores lie beyond ppo.score_clip = 5"),
    ],
)  # fmt: skip
def test_each_sign_of_trouble_is_named_with_its_figures(
    name: str, change: dict[str, float], words: str
) -> None:
    found = warnings_of(HEALTHY | change, PpoConfig())
    assert list(found) == [name]
    assert words in found[name]


def test_where_cut_off_answers_keep_their_score_all_of_them_still_teach() -> None:
    config = PpoConfig(cut_off_answers="keep_score")
    assert "all cut off" not in warnings_of(HEALTHY | {"ppo/cut_off_fraction": 1.0}, config)


def test_a_warning_is_given_once_and_again_when_it_has_lasted(capsys: Any) -> None:
    watch = Guard(PpoConfig())
    for step in range(1, 31):
        trouble = {"ppo/cut_off_fraction": 0.5} if step >= 2 else {}
        watch.check(HEALTHY | trouble, step=step)
    said = [line for line in capsys.readouterr().err.splitlines() if "reached" in line]
    assert len(said) == 2
    assert "rollout 2:" in said[0]
    assert "rollout 22:" in said[1]


def test_a_rollout_of_which_nothing_was_learnt_is_warned_of_all_the_same(capsys: Any) -> None:
    row = HEALTHY | {"ppo/cut_off_fraction": 1.0}
    del row["ppo/entropy_nats_per_token"]
    Guard(PpoConfig(cut_off_answers="leave_out")).check(row, step=1)
    assert "so all are left out and nothing is learnt" in capsys.readouterr().err


def test_one_phrase_for_every_prompt_ends_the_run_after_three_rollouts() -> None:
    watch = Guard(PpoConfig())
    watch.check(HEALTHY, step=1)
    watch.check(HEALTHY | COLLAPSED, step=2)
    watch.check(HEALTHY, step=3)  # it came back
    watch.check(HEALTHY | COLLAPSED, step=4)
    resumed = Guard(PpoConfig())
    resumed.load_state_dict(watch.state_dict())
    resumed.check(HEALTHY | COLLAPSED, step=5)
    with pytest.raises(TrainingStopped, match=r"rollout 6: .*nearly the same answer.*20% distinct answers"):
        resumed.check(HEALTHY | COLLAPSED, step=6)


def test_short_answers_that_were_never_diverse_are_no_collapse() -> None:
    """Yes and no from the first rollout on: what counts is what was lost."""
    first = {"entropy_nats_per_token": 0.3, "distinct_fraction": 0.03, "answer_tokens": 2.0}
    now = {"entropy_nats_per_token": 0.02, "distinct_fraction": 0.03}
    assert not has_collapsed(now, first)
    assert has_collapsed({"entropy_nats_per_token": 0.03, "distinct_fraction": 0.2}, FIRST)


@pytest.mark.parametrize(("kl", "stops"), [(49.0, False), (51.0, True)])
def test_a_kl_beyond_the_stop_ends_the_run_at_once(kl: float, stops: bool) -> None:
    watch = Guard(PpoConfig(kl_stop=50.0))
    row = HEALTHY | {"ppo/kl_nats_per_answer": kl}
    if stops:
        with pytest.raises(TrainingStopped, match=r"51\.0 nats per answer, above ppo\.kl_stop = 50"):
            watch.check(row, step=1)
    else:
        watch.check(row, step=1)


def held_out(objective: float, kl: float = 2.0, **changes: float) -> dict[str, float]:
    return {
        "ppo/held_out_objective": objective,
        "ppo/held_out_reward": 100.0 - objective,  # what the raw score says does not count
        "ppo/held_out_kl_nats_per_answer": kl,
        **{f"ppo/held_out_{name}": value for name, value in (FIRST | changes).items()},
    }


def test_the_best_model_is_that_of_the_highest_objective_within_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(guard, "save_model", lambda *given, **_: saved.append(given[2]))
    engine: Any = SimpleNamespace(
        roles=SimpleNamespace(actor=None, chat=SimpleNamespace(stop_token_ids=())), tokenizer=None
    )
    best = Best(tmp_path, kl_limit=20.0)
    phrase = {"entropy_nats_per_token": 0.03, "distinct_fraction": 0.1}
    offers = [
        (held_out(-0.5), True),
        (held_out(-0.6), False),
        (held_out(0.7), True),
        (held_out(2.0, kl=20.5), False),
        (held_out(3.0, kl=float("nan")), False),
        (held_out(2.4, **phrase), False),
        (held_out(float("nan")), False),
        (held_out(0.8), True),
        ({}, False),
    ]
    for step, (judged, is_kept) in enumerate(offers):
        before = len(saved)
        best.offer(judged, engine, step=step)
        assert (len(saved) > before) == is_kept, step
    assert (best.objective, best.step) == (0.8, 7)
    said = capsys.readouterr().err
    assert "KL 20.5 nats per answer is above ppo.kl_limit = 20" in said
    assert "answers nearly the same to all held-out prompts" in said


def test_a_critic_s_loss_out_of_all_proportion_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    Guard(PpoConfig()).check({**HEALTHY, "ppo/critic_loss": 3e6}, step=4)
    assert "warning: ppo/critic_loss is 3e+06 at step 4" in capsys.readouterr().err
