"""The held-out objective is what training raises, derived by plain loops over transformers' own forward."""

import copy

import pytest
import torch

from dovetail.config.stages import PpoConfig
from dovetail.evaluation.answers import EVALUATION_SEED, evaluate_answers
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.rewards import Answer
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

MESSAGES = [[{"role": "user", "content": text}] for text in PROMPTS]


def nats_to_the_reference(engine: RLHFEngine, answer: Answer) -> float:
    """log p_actor - log p_reference of an answer at the sampling temperature; the two models differ in the test."""
    ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])
    start, total = len(answer.prompt_ids), 0.0
    for model, sign in ((engine.roles.actor, 1.0), (engine.roles.reference, -1.0)):
        alone = copy.deepcopy(model)
        assert alone is not None
        alone.set_attn_implementation("sdpa")  # transformers' own attention, not ours
        with torch.no_grad():
            table = (alone(ids).logits[0] / engine.config.sampling.temperature).log_softmax(-1)
        total += sign * sum(float(table[start + k - 1, token]) for k, token in enumerate(answer.answer_ids))
    return total


def objective(engine: RLHFEngine, config: PpoConfig, scores: list[float], answers: list[Answer]) -> float:
    clipped = [max(-0.05, min(0.05, score)) for score in scores]
    if config.cut_off_answers == "penalise":
        clipped = [score if answer.finished else -0.4 for score, answer in zip(clipped, answers, strict=True)]
    nats = [nats_to_the_reference(engine, answer) for answer in answers]
    return sum(s - config.kl_coefficient * k for s, k in zip(clipped, nats, strict=True)) / len(answers)


@pytest.mark.parametrize("rule", ["penalise", "keep_score"])
def test_the_objective_is_clipped_penalised_and_less_the_kl(rule: str) -> None:
    config = tiny_config(score_clip=0.05, missing_end_penalty=-0.4, cut_off_answers=rule, kl_coefficient=0.3)
    engine = tiny_engine("llama", config)
    with torch.no_grad():  # an actor that has moved
        for weight in engine.roles.actor.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    judged = evaluate_answers(MESSAGES, engine)
    stats = judged.stats
    assert [a.answer_ids for a in judged.answers] == [
        a.answer_ids for a in engine.generate(MESSAGES, seed=EVALUATION_SEED)
    ]
    expected = objective(engine, config, judged.scores, judged.answers)
    assert stats["ppo/held_out_objective"] == pytest.approx(expected, abs=1e-4)
    assert stats["ppo/held_out_reward"] == pytest.approx(sum(judged.scores) / len(judged.scores), abs=1e-6)
    kl = sum(nats_to_the_reference(engine, a) for a in judged.answers) / len(judged.answers)
    assert stats["ppo/held_out_kl_nats_per_answer"] == pytest.approx(kl, abs=1e-4)
    assert abs(kl) > 0.01
    texts = {answer.text for answer in judged.answers}
    assert stats["ppo/held_out_distinct_fraction"] == len(texts) / len(PROMPTS)
    assert stats["ppo/held_out_entropy_nats_per_token"] > 0


def test_without_prompts_there_is_nothing_to_judge() -> None:
    assert evaluate_answers([], tiny_engine()).stats == {}
