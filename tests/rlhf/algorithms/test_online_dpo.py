"""Online DPO: which answers are a pair, and loss and gradient by definition with transformers itself."""

import copy
import math

import pytest
import torch
from torch import Tensor

from dovetail.config.stages import SamplingConfig
from dovetail.rlhf.api import PPOTrainer
from dovetail.rlhf.rewards import Answer, Scored
from dovetail.rlhf.update import minibatches, policy_loss
from tests.rlhf.algorithms.test_group import engine_of
from tests.rlhf.tiny import tiny_config

TEMPERATURE, BETA = 0.7, 0.3
REWARDS = [0.5, 0.25, 1.0, 0.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 0.5, 0.75]
"""Of three prompts with four answers each; the second prompt's are equal."""
PAIRS = [(2, 3), (8, 10)]


def logprob(model: torch.nn.Module, answer: Answer) -> Tensor:
    ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])
    table = (model(ids).logits[0] / TEMPERATURE).log_softmax(-1)
    start = len(answer.prompt_ids) - 1
    return torch.stack([table[start + k, token] for k, token in enumerate(answer.answer_ids)]).sum()


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 1])
def test_loss_and_gradient_are_those_of_dpo_on_best_and_worst(micro_batch_tokens: int) -> None:
    sampling = SamplingConfig(temperature=TEMPERATURE, max_new_tokens=8)
    config = tiny_config(
        batch_size=12,
        cut_off_answers="keep_score",
        sampling=sampling,
        kl_coefficient=BETA,
        importance_cap=1e-3,
    )
    engine = engine_of("online_dpo", config, torch.float64, answers_per_prompt=4)
    noise = torch.Generator().manual_seed(2)
    for weight in engine.roles.actor.parameters():  # away from the reference
        weight.data += 0.02 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
    engine.roles.score = lambda answers: Scored(torch.tensor(REWARDS))
    collected = PPOTrainer(engine).generate_experience(["Hi", "What is two plus two?", "x"])
    answers = collected.answers

    actor, reference = copy.deepcopy(engine.roles.actor), copy.deepcopy(engine.roles.reference)
    assert reference is not None
    losses = []
    for model in (actor, reference):
        model.set_attn_implementation("sdpa")
    for chosen, rejected in PAIRS:
        gap = logprob(actor, answers[chosen]) - logprob(actor, answers[rejected])
        gap = gap - (logprob(reference, answers[chosen]) - logprob(reference, answers[rejected])).detach()
        losses.append((1 + (-BETA * gap).exp()).log())
    expected = sum(losses) / len(losses)
    expected.backward()

    algorithm = engine.roles.algorithm
    (minibatch,) = minibatches(collected.experience, epochs=1, count=1, seed=0, answers_per_prompt=4)
    cut = algorithm.prepared(minibatch, config).micro_batches(micro_batch_tokens)
    assert len(cut) == (1 if micro_batch_tokens > 1 else len(PAIRS))
    parts = [policy_loss(engine.roles.actor, micro, config=config, algorithm=algorithm) for micro in cut]
    loss = sum(part.total for part in parts) / minibatch.num_targets
    loss.backward()
    assert math.isclose(float(loss.detach()), float(expected.detach()), rel_tol=1e-6)
    for (label, own), other in zip(engine.roles.actor.named_parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=label)


def test_an_answer_that_is_left_out_is_in_no_pair() -> None:
    config = tiny_config(batch_size=12, cut_off_answers="leave_out", kl_coefficient=BETA)
    engine = engine_of("online_dpo", config, answers_per_prompt=4)
    engine.roles.score = lambda answers: Scored(torch.tensor(REWARDS))
    collected = PPOTrainer(engine).generate_experience(["Hi", "What is two plus two?", "x"])
    finished = [answer.finished for answer in collected.answers]
    assert 0 < sum(finished) < 12
    for start in range(0, 12, 4):
        left = {REWARDS[i]: i for i in range(start + 3, start - 1, -1) if finished[i]}  # the first of equals
        pair = [left[max(left)], left[min(left)]] if len(left) > 1 else []
        counts = collected.experience.target_counts[start : start + 4]
        assert [start + i for i, count in enumerate(counts) if count] == sorted(pair)
