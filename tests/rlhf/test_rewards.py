"""Scores: whose are clipped, and whose are not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dovetail.data.records import message
from dovetail.rlhf.api import PPOTrainer, RLHFEngine, prompt_of
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rewards import Answer, ClippedScorer, Scored
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_reward_model


def thirty_and_more(answers: list[Answer]) -> list[float]:
    """A score from 30 on, other for each answer."""
    return [30.0 + i for i, _ in enumerate(answers)]


def trainer_of(*, with_model: bool, weight: float | None = None) -> PPOTrainer:
    config = tiny_config(
        score_clip=0.02, reward_function_weight=weight, cut_off_answers="keep_score", kl_coefficient=0.0
    )
    engine = RLHFEngine(
        actor_model=tiny_model("llama"),
        critic_model=tiny_reward_model("llama") if with_model else None,
        tokenizer=byte_tokenizer(),
        total_steps=10,
        config=config,
        reward=thirty_and_more if weight or not with_model else None,
        setup=Setup(device="cpu"),
    )
    return PPOTrainer(engine)


def paid(trainer: PPOTrainer) -> list[float]:
    experience = trainer.generate_experience(PROMPTS).experience
    return experience.rewards_T[experience.last_index_S()].tolist()


def test_a_functions_scores_are_never_clipped() -> None:
    assert paid(trainer_of(with_model=False)) == pytest.approx([30.0 + i for i in range(len(PROMPTS))])


def test_a_reward_models_scores_are_clipped() -> None:
    trainer = trainer_of(with_model=True)
    collected = trainer.generate_experience(PROMPTS)
    scores = collected.experience.scores_S
    assert float(scores.abs().max()) > 0.02
    expected = [max(-0.02, min(0.02, s)) for s in scores.tolist()]
    got = collected.experience.rewards_T[collected.experience.last_index_S()].tolist()
    assert got == pytest.approx(expected)
    share = sum(abs(s) > 0.02 for s in scores.tolist()) / len(PROMPTS)
    assert collected.stats["ppo/score_clipped_fraction"] == pytest.approx(share)


def test_in_a_sum_the_models_share_alone_is_clipped() -> None:
    trainer = trainer_of(with_model=True, weight=2.0)
    answers = trainer.engine.generate(PROMPTS, seed=1)
    model_alone = trainer_of(with_model=True).engine.rewards(answers)
    expected = model_alone.clamp(-0.02, 0.02) + 2.0 * torch.tensor(thirty_and_more(answers))
    assert torch.allclose(trainer.engine.rewards(answers), expected, atol=1e-5)
    assert trainer.engine.roles.score_clip is None


def test_no_limit_leaves_scores_as_they_are() -> None:
    scorer = ClippedScorer(lambda answers: Scored(torch.tensor([-90.0, 0.0, 90.0])), None)
    assert scorer([]).scores_S.tolist() == [-90.0, 0.0, 90.0]


def test_a_reward_function_gets_the_row_of_each_prompt() -> None:
    rows = [{"answer": str(i), "level": i} for i in range(len(PROMPTS))]
    seen: list[Any] = []

    def judge(answers: list[Answer]) -> list[float]:
        seen.extend((answer.messages[-1]["content"], answer.row) for answer in answers)
        return [0.0 for _ in answers]

    engine = RLHFEngine(
        actor_model=tiny_model("llama"),
        tokenizer=byte_tokenizer(),
        total_steps=10,
        config=tiny_config(),
        reward=judge,
        setup=Setup(device="cpu"),
    )
    with_rows = [prompt_of(text) for text in PROMPTS]
    with_rows = [replace(prompt, row=row) for prompt, row in zip(with_rows, rows, strict=True)]
    PPOTrainer(engine).generate_experience([*with_rows, "no row", [message("user", "messages")]])
    assert seen == [*zip(PROMPTS, rows, strict=True), ("no row", {}), ("messages", {})]
