"""The pieces that `RLHFEngine` offers to algorithms of one's own, each against Hugging Face's own forward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.batches import PackedBatch
from dovetail.config.stages import OptimizerConfig
from dovetail.rlhf.api import RLHFEngine
from dovetail.training.weights import trained_weights
from tests.by_definition import Learner, rate
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine
from tests.tolerance import assert_near

TEMPERATURE = 0.7
"""That of `tiny_config`."""
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="linear", warmup_steps=2, max_grad_norm=0.5, eps=1e-4
)
DECAY, NUM_STEPS = 0.6, 10


@pytest.fixture
def engine() -> RLHFEngine:
    """An engine whose actor has moved away from its reference."""
    engine = tiny_engine("llama", tiny_config(actor_optimizer=OPTIMIZER, ema_decay=DECAY), torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in engine.roles.actor.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return engine


def as_it_is(model: Any) -> Learner:
    """The model with Hugging Face's own attention."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    return Learner(plain, OPTIMIZER)


def actions(rows: list[list[Tensor]], batch: PackedBatch) -> Tensor:
    """Numbers of all tokens but the first of each sequence -> those of the marked tokens, in one row."""
    nothing = torch.zeros((), dtype=torch.float64)
    return torch.stack([number for row in rows for number in (nothing, *row)])[batch.mask_T]


def test_logprobs_values_and_scores_are_those_of_the_roles_at_the_sampling_temperature(
    engine: RLHFEngine,
) -> None:
    batch = engine.pack(engine.generate(PROMPTS, seed=2))
    sequences = [ids.tolist() for ids in batch.token_ids_T.split(list(batch.lengths))]
    roles = engine.roles
    for found_T, role in (
        (engine.logprobs(batch), roles.actor),
        (engine.reference_logprobs(batch), roles.reference),
    ):
        expected = as_it_is(role).logprobs(sequences, TEMPERATURE)
        assert_near(found_T[batch.mask_T], actions(expected, batch))
        assert not found_T[~batch.mask_T].any()
    values = [row[:-1] for row in as_it_is(roles.critic).numbers(sequences)]
    assert_near(engine.values(batch)[batch.mask_T], actions(values, batch))
    assert_near(
        batch.sampled_logprobs_T[batch.mask_T], engine.logprobs(batch)[batch.mask_T], dtype=torch.float32
    )


def test_a_step_on_a_loss_of_ones_own_is_a_step_at_the_sampling_temperature(engine: RLHFEngine) -> None:
    expected = as_it_is(engine.roles.actor)
    average = {name: weight.clone() for name, weight in engine.learners.ema.averages().items()}
    for step in range(2):
        batch = engine.pack(engine.generate(PROMPTS, seed=step))
        sequences = [ids.tolist() for ids in batch.token_ids_T.split(list(batch.lengths))]
        logprobs = actions(expected.logprobs(sequences, TEMPERATURE), batch)
        expected.step((logprobs**2).mean(), rate(step, OPTIMIZER, NUM_STEPS))
        for name, weight in expected.trained.items():
            average[name] = DECAY * average[name] + (1 - DECAY) * weight.detach()
        engine.step_actor(batch, lambda logprobs_T, micro: (logprobs_T**2).sum(), group_size=1)
    for name, weight in trained_weights(engine.roles.actor).items():
        assert_near(weight, expected.trained[name])
        assert_near(engine.learners.ema.averages()[name], average[name])
