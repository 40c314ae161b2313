"""How answers that reached the length limit count: penalised, by their own score, or not at all."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import Collected, score_answers
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

IS_FINISHED = [True, False, True, False, True, True]


def answers_of(engine: RLHFEngine, finished: list[bool]) -> list[Answer]:
    drawn = engine.generate(PROMPTS, seed=1)
    return [replace(answer, finished=ended) for answer, ended in zip(drawn, finished, strict=True)]


def scored(engine: RLHFEngine, answers: list[Answer]) -> Collected:
    return score_answers(answers, engine.roles, engine.config, kl_coefficient=0.1, with_old_logprobs=True)


def final_rewards(collected: Collected) -> list[float]:
    """The reward at the last token, without its share of the KL penalty."""
    e = collected.experience
    assert e.old_logprobs_T is not None
    without_kl_T = e.rewards_T + 0.1 * (e.old_logprobs_T - e.reference_logprobs_T)
    return without_kl_T[e.last_index_S()].tolist()


@pytest.mark.parametrize(
    ("rule", "penalty", "expected"),
    [
        ("penalise", -7.0, lambda scores: [-7.0, -7.0]),
        ("penalise", None, lambda scores: [min(scores) - 1, min(scores) - 1]),
        ("keep_score", -7.0, lambda scores: [scores[1], scores[3]]),
    ],
)
def test_a_cut_off_answer_is_paid_by_the_rule(rule: str, penalty: float | None, expected: Any) -> None:
    engine = tiny_engine("llama", tiny_config(cut_off_answers=rule, missing_end_penalty=penalty))
    collected = scored(engine, answers_of(engine, IS_FINISHED))
    scores = collected.experience.scores_S.tolist()
    paid = final_rewards(collected)
    assert [paid[1], paid[3]] == pytest.approx(expected(scores), abs=1e-5)
    assert [paid[i] for i in (0, 2, 4, 5)] == pytest.approx([scores[i] for i in (0, 2, 4, 5)], abs=1e-5)


def test_what_is_left_out_changes_neither_loss_nor_advantages_of_the_others() -> None:
    config = tiny_config(cut_off_answers="leave_out")
    engine = tiny_engine("llama", config)
    answers = answers_of(engine, IS_FINISHED)
    whole, others = scored(engine, answers), scored(engine, [a for a in answers if a.finished])
    kept = whole.experience.sequences([i for i, ended in enumerate(IS_FINISHED) if ended])
    for name in ("advantages_T", "returns_T", "mask_T", "old_values_T"):
        found, expected = getattr(kept, name), getattr(others.experience, name)
        assert torch.allclose(found.float(), expected.float(), atol=1e-5), name
    assert whole.experience.target_counts[1] == whole.experience.target_counts[3] == 0
    assert not whole.experience.sequences([1, 3]).mask_T.any()
    # What is reported speaks of all answers but for what is learnt from.
    assert whole.stats["ppo/answer_tokens"] == sum(len(a.answer_ids) for a in answers) / len(answers)
    assert whole.stats["ppo/cut_off_fraction"] == pytest.approx(1 / 3)
    assert whole.stats["ppo/reward_per_answer"] == pytest.approx(
        others.stats["ppo/reward_per_answer"], abs=1e-5
    )


@pytest.mark.parametrize("changes", [{}, {"minibatches": 3, "ppo_epochs": 2}])
def test_a_rollout_of_which_everything_is_left_out_takes_no_step(changes: dict[str, int]) -> None:
    trainer = PPOTrainer(tiny_engine("llama", tiny_config(cut_off_answers="leave_out", **changes)))
    engine = trainer.engine
    before = {name: weight.clone() for name, weight in engine.state_dict()["actor"].items()}
    collected = scored(engine, answers_of(engine, [False] * len(PROMPTS)))
    report = trainer.update(collected)
    assert report.actor_loss == report.critic_loss == 0.0
    assert engine.learners.actor_step == engine.learners.critic_step == 0
    assert all(torch.equal(engine.state_dict()["actor"][name], before[name]) for name in before)


def test_minibatches_without_an_answer_to_learn_from_are_skipped() -> None:
    config = tiny_config(cut_off_answers="leave_out", minibatches=6)
    trainer = PPOTrainer(tiny_engine("llama", config))
    collected = scored(trainer.engine, answers_of(trainer.engine, IS_FINISHED))
    trainer.update(collected)
    assert trainer.engine.learners.actor_step == IS_FINISHED.count(True)
