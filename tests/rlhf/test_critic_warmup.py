"""The critic's start: unbiased values, a warm-up of its own, and an actor that waits for it."""

import copy
import math
from typing import Any

import pytest
import torch

from dovetail.batches import pack
from dovetail.config.stages import OptimizerConfig
from dovetail.rlhf import update
from dovetail.rlhf.algorithms.ppo import rewards_to_come
from dovetail.rlhf.api import PPOTrainer
from dovetail.rlhf.rollout import Collected
from dovetail.rlhf.update import CriticWarmup
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_rewards_to_come_are_the_discounted_sums_to_the_end_of_each_answer(gamma: float) -> None:
    masks = [[False, True, True, True], [False, False, True], [False, False]]
    batch = pack([[1] * len(mask) for mask in masks], masks)
    rewards = [9.0, 1.0, -2.0, 4.0, 9.0, 9.0, 0.5, 9.0, 9.0]
    expected = [0.0, 1.0 - 2.0 * gamma + 4.0 * gamma**2, -2.0 + 4.0 * gamma, 4.0, 0.0, 0.0, 0.5, 0.0, 0.0]
    found = rewards_to_come(batch, torch.tensor(rewards), gamma=gamma)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("setting", "rollouts", "bound"), [(20, 60, 6), (2, 600, 2), (20, 9, 0), (0, 600, 0), (1000, 1000, 100)]
)
def test_the_warm_up_is_bounded_by_the_setting_and_by_a_tenth_of_the_run(
    setting: int, rollouts: int, bound: int
) -> None:
    warmup = CriticWarmup.of_run(max_rollouts=setting, rollouts_of_run=rollouts)
    taken = 0
    for _ in range(rollouts):
        warmup.judge(-1.0)
        taken += not warmup.is_over
    assert taken == bound


def test_the_actor_starts_with_the_first_rollout_that_the_critic_explains(capsys: Any) -> None:
    warmup = CriticWarmup(max_rollouts=5)
    seen = []
    for explained in (-3.0, 0.15, 0.2, -9.0):
        warmup.judge(explained)
        seen.append(warmup.is_over)
    assert seen == [False, False, True, True]
    said = capsys.readouterr().err
    assert "explains 0.20 of the variance of the rewards to come after 2 rollouts of warm-up" in said
    assert len(said.splitlines()) == 1


def test_an_actor_that_starts_beside_a_critic_that_explains_nothing_is_a_warning(capsys: Any) -> None:
    warmup = CriticWarmup(max_rollouts=1)
    for explained in (-3.0, -0.5):
        warmup.judge(explained)
    assert warmup.is_over
    assert "explains -0.50" in (said := capsys.readouterr().err)
    assert "ppo.critic_optimizer.learning_rate" in said


def mean_over_actions(collected: Collected, columns: list[list[float]]) -> float:
    flat = [
        value
        for column, mask in zip(columns, per_answer(collected, "mask_T"), strict=True)
        for value, counts in zip(column, mask, strict=True)
        if counts
    ]
    return sum(flat) / len(flat)


def per_answer(collected: Collected, name: str) -> list[list[Any]]:
    experience = collected.experience
    return [part.tolist() for part in getattr(experience, name).split(list(experience.lengths))]


def to_come(collected: Collected) -> list[list[float]]:
    """By plain loops, undiscounted."""
    return [[sum(row[t:]) for t in range(len(row))] for row in per_answer(collected, "rewards_T")]


@pytest.mark.parametrize("name", ["llama", "opt-post-norm"])
def test_values_start_at_the_mean_of_the_rewards_to_come_and_are_shifted_once(name: str) -> None:
    trainer = PPOTrainer(tiny_engine(name, tiny_config()))
    collected = trainer.generate_experience(PROMPTS)
    mean = mean_over_actions(collected, per_answer(collected, "old_values_T"))
    assert mean == pytest.approx(mean_over_actions(collected, to_come(collected)), abs=1e-5)
    assert collected.stats["ppo/value_mean"] == pytest.approx(mean, abs=1e-5)
    offset = trainer.engine.roles.value_offset
    assert abs(offset) > 1e-4
    trainer.update(collected)
    later = trainer.generate_experience(PROMPTS)
    assert trainer.engine.roles.value_offset == offset
    again = trainer.engine.values(trainer.engine.pack(later.answers))
    assert torch.equal(later.experience.old_values_T, again)


def test_explained_variance_is_that_of_the_rewards_to_come() -> None:
    trainer = PPOTrainer(tiny_engine("llama", tiny_config(cut_off_answers="keep_score")))
    collected = trainer.generate_experience(PROMPTS)
    pairs = [
        (g, v)
        for gs, vs, mask in zip(
            to_come(collected),
            per_answer(collected, "old_values_T"),
            per_answer(collected, "mask_T"),
            strict=True,
        )
        for g, v, counts in zip(gs, vs, mask, strict=True)
        if counts
    ]
    expected = 1 - variance([g - v for g, v in pairs]) / variance([g for g, _ in pairs])
    assert collected.stats["ppo/explained_variance"] == pytest.approx(expected, rel=1e-4)


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def warming_trainer(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> PPOTrainer:
    """A trainer of a run of 20 rollouts whose critic learns alone for two of them, whatever it explains."""
    monkeypatch.setattr(update, "ENOUGH", math.inf)
    config = tiny_config(critic_warmup_rollouts=2, **changes)
    return PPOTrainer(tiny_engine("llama", config, total_steps=20))


def test_while_the_critic_learns_alone_the_actor_and_its_average_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = warming_trainer(monkeypatch)
    before = copy.deepcopy(trainer.engine.state_dict())
    report = trainer.update(trainer.generate_experience(PROMPTS))
    after = trainer.engine.state_dict()
    assert "ppo/actor_loss" not in report.stats
    assert all(torch.equal(after["actor"][name], before["actor"][name]) for name in before["actor"])
    averages = before["ema"]["averages"]
    assert all(torch.equal(after["ema"]["averages"][name], averages[name]) for name in averages)
    assert not all(torch.equal(after["critic"][name], before["critic"][name]) for name in before["critic"])


def test_alone_the_critic_learns_the_rewards_to_come_unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    no_rate = OptimizerConfig(learning_rate=0.0, schedule="constant")
    trainer = warming_trainer(monkeypatch, critic_optimizer=no_rate, value_clip=0.01)
    collected = trainer.generate_experience(PROMPTS)
    report = trainer.update(collected)
    errors = [
        [(g - v) ** 2 / 2 for g, v in zip(gs, vs, strict=True)]
        for gs, vs in zip(to_come(collected), per_answer(collected, "old_values_T"), strict=True)
    ]
    assert report.critic_loss == pytest.approx(mean_over_actions(collected, errors), rel=1e-4)
    assert report.stats["ppo/value_clipped_fraction"] == 0.0


def test_actor_and_critic_have_warm_ups_and_schedules_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 20 rollouts, two of the critic alone: 18 steps of linear decay are left after them."""
    actor = OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=4)
    critic = OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup_steps=2)
    trainer = warming_trainer(
        monkeypatch, actor_optimizer=actor, critic_optimizer=critic, critic_warmup_learning_rate=8e-3
    )
    rows = [trainer.update(trainer.generate_experience(PROMPTS)).stats for _ in range(20)]
    assert [row["ppo/critic_learning_rate"] for row in rows[:2]] == [8e-3, 8e-3]
    assert not any("ppo/learning_rate" in row for row in rows[:2])
    actor_rates = [row["ppo/learning_rate"] for row in rows[2:]]
    assert actor_rates == pytest.approx(
        [2.5e-4, 5e-4, 7.5e-4, 1e-3, *(1e-3 * (1 - k / 14) for k in range(14))]
    )
    critic_rates = [row["ppo/critic_learning_rate"] for row in rows[2:]]
    assert critic_rates == pytest.approx([1e-3, 2e-3, *(2e-3 * (1 - k / 16) for k in range(16))])


def test_the_critics_rate_rises_over_the_first_steps_of_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = OptimizerConfig(learning_rate=2e-3, schedule="constant", warmup_steps=16)
    trainer = warming_trainer(monkeypatch, critic_optimizer=critic)
    rates = []
    for _ in range(2):
        report = trainer.update(trainer.generate_experience(PROMPTS))
        rates.append(report.stats["ppo/critic_learning_rate"])
    # Four passes over one step of six answers each.
    assert rates == pytest.approx([6e-3 * 4 / 16, 6e-3 * 8 / 16])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_that_stops_in_the_warm_up_or_after_it_goes_on_bit_for_bit(
    stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(trainer: PPOTrainer, count: int) -> None:
        for _ in range(count):
            trainer.train_rlhf(trainer.generate_experience(PROMPTS))

    straight = warming_trainer(monkeypatch, kl_target=6.0)
    steps(straight, 4)
    stopped = warming_trainer(monkeypatch, kl_target=6.0)
    steps(stopped, stop_after)
    resumed = warming_trainer(monkeypatch, kl_target=6.0)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    steps(resumed, 4 - stop_after)
    expected, found = straight.state_dict(), resumed.state_dict()
    assert (found["iteration"], found["kl_coefficient"]) == (4, expected["kl_coefficient"])
    counters = ("actor_step", "critic_step", "left_out", "warmup", "value_offset")
    assert [found["engine"][name] for name in counters] == [expected["engine"][name] for name in counters]
    for part in ("actor", "critic"):
        weights = expected["engine"][part]
        assert all(torch.equal(found["engine"][part][name], weights[name]) for name in weights)
