"""Best-of-n and expert iteration: what is picked, and loss and gradient as cross-entropy of transformers itself."""

import copy
import math

import pytest
import torch

from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.maths.groups import best_of_groups
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.rewards import Scored
from dovetail.rlhf.rollout import Collected
from dovetail.rlhf.update import minibatches, policy_loss
from tests.rlhf.algorithms.test_group import engine_of
from tests.rlhf.tiny import tiny_config

TEMPERATURE = 0.7
REWARDS = [0.5, 0.5, 1.0, 0.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 0.5, 0.75]
"""Of three prompts with four answers each; the second prompt's are equal."""
PICKED = {"best_of_n": [2, 8], "expert_iteration": [2, 8, 9]}


def collected_by(name: str, **changes: object) -> tuple[RLHFEngine, Collected, PpoConfig]:
    """A rollout in float64 whose answers have the rewards above."""
    sampling = SamplingConfig(temperature=TEMPERATURE, max_new_tokens=8)
    config = tiny_config(batch_size=12, cut_off_answers="keep_score", sampling=sampling, **changes)
    engine = engine_of(name, config, torch.float64, answers_per_prompt=4)
    engine.roles.score = lambda answers: Scored(torch.tensor(REWARDS))
    return engine, PPOTrainer(engine).generate_experience(["Hi", "What is two plus two?", "x"]), config


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40])
@pytest.mark.parametrize("name", PICKED)
def test_loss_and_gradient_are_the_cross_entropy_of_the_picked_answers(
    name: str, micro_batch_tokens: int
) -> None:
    # Two minibatches without old log-probabilities; both together are the whole rollout.
    engine, collected, config = collected_by(name, minibatches=2, importance_cap=1e-3)
    assert collected.experience.old_logprobs_T is None
    actor, total, count = copy.deepcopy(engine.roles.actor), torch.zeros(()), 0
    actor.set_attn_implementation("sdpa")
    for place in PICKED[name]:
        answer = collected.answers[place]
        ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])
        logits = actor(ids).logits[0, len(answer.prompt_ids) - 1 : -1] / TEMPERATURE
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer.answer_ids), reduction="sum"
        )
        count += len(answer.answer_ids)
    (total / count).backward()

    algorithm = engine.roles.algorithm
    parts = [
        policy_loss(engine.roles.actor, micro, config=config, algorithm=algorithm)
        for minibatch in minibatches(collected.experience, epochs=1, count=1, seed=0, answers_per_prompt=4)
        for micro in algorithm.prepared(minibatch, config).micro_batches(micro_batch_tokens)
    ]
    loss = sum(part.total for part in parts) / sum(float(part.count) for part in parts)
    loss.backward()
    assert sum(float(part.count) for part in parts) == count
    assert math.isclose(float(loss.detach()), float(total.detach()) / count, rel_tol=1e-6)
    for (label, own), other in zip(engine.roles.actor.named_parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=label)


@pytest.mark.parametrize("name", PICKED)
def test_only_the_picked_answers_are_read_again(name: str) -> None:
    _, collected, _ = collected_by(name)
    (minibatch,) = minibatches(collected.experience, epochs=1, count=1, seed=0, answers_per_prompt=4)
    assert minibatch.num_sequences == len(PICKED[name])
    assert collected.stats["ppo/picked_fraction"] == pytest.approx(len(PICKED[name]) / 12)


def test_an_answer_that_is_left_out_is_never_the_best() -> None:
    rewards_S = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0, 9.0])
    may_learn_S = torch.tensor([False, True, True, False, False, False])
    found = best_of_groups(rewards_S, may_learn_S, 3).tolist()
    assert found == [False, False, True, False, False, False]


def test_minibatches_hold_all_answers_to_their_prompts() -> None:
    _, collected, _ = collected_by("grpo")
    for minibatch in minibatches(collected.experience, epochs=3, count=3, seed=5, answers_per_prompt=4):
        assert minibatch.shared_lengths.count(0) == 1
        assert minibatch.num_sequences == 4
