"""A loss of one's own: sequences that belong together are never cut apart."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.batches import Groups, Rollout, pack_ranked
from dovetail.rlhf.api import RLHFEngine
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine


def pair_losses(logprobs_T: Tensor, micro: Rollout) -> list[Tensor]:
    """DPO's loss (arXiv:2305.18290, eq. 7) of each pair of neighbours; the reference's logprobs stand in `sampled`."""
    gains = [
        (own - reference).sum()
        for own, reference in zip(
            logprobs_T.split(list(micro.lengths)),
            micro.sampled_logprobs_T.split(list(micro.lengths)),
            strict=True,
        )
    ]
    return [-torch.nn.functional.logsigmoid(a - b) for a, b in zip(gains[::2], gains[1::2], strict=True)]


def engine_of(micro_batch_tokens: int) -> RLHFEngine:
    return tiny_engine("llama", tiny_config(micro_batch_tokens=micro_batch_tokens))


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 60, 1])
def test_pairs_stay_whole_however_the_batch_is_cut(micro_batch_tokens: int) -> None:
    engine = engine_of(micro_batch_tokens)
    batch = engine.pack(engine.generate(PROMPTS, seed=3))
    at_start = engine.logprobs(batch)
    batch = replace(batch, sampled_logprobs_T=at_start)  # the reference is the actor: every loss is log 2
    tokens = batch.num_targets
    pairs = len(PROMPTS) // 2
    seen: list[float] = []

    def loss_of(logprobs_T: Tensor, micro: Rollout) -> Tensor:
        losses = pair_losses(logprobs_T, micro)
        seen.extend(float(loss.detach()) for loss in losses)
        return torch.stack(losses).sum() * tokens / pairs

    report = engine.step_actor(batch, loss_of, group_size=2)
    assert seen == pytest.approx([math.log(2)] * pairs, abs=1e-5)
    assert report.loss == pytest.approx(math.log(2), abs=1e-5)
    assert engine.learners.actor_step == 1


def test_the_step_is_the_same_however_the_batch_is_cut() -> None:
    weights = []
    for micro_batch_tokens in (10_000, 1):
        engine = engine_of(micro_batch_tokens)
        batch = engine.pack(engine.generate(PROMPTS, seed=3))
        engine.step_actor(
            batch, lambda logprobs_T, micro: torch.stack(pair_losses(logprobs_T, micro)).sum(), group_size=2
        )
        weights.append(copy.deepcopy(engine.state_dict()["actor"]))
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


def test_a_batch_that_does_not_divide_into_groups_is_refused() -> None:
    engine = engine_of(60)
    batch = engine.pack(engine.generate(PROMPTS[:5], seed=3))
    with pytest.raises(ValueError, match="a batch of 5 sequences does not divide into groups of 2"):
        engine.step_actor(batch, lambda logprobs_T, micro: logprobs_T.sum(), group_size=2)


def test_groups_keep_the_order_inside_them() -> None:
    ranked = pack_ranked(
        [[[1, 2], [1, 3, 4]], [[5, 6], [5, 7]], [[8, 9], [8, 1]], [[2, 2], [2, 3]]], [[(0, 1, 0.0)]] * 4
    )
    groups = Groups(ranked, 2)
    assert list(groups.unit_tokens) == [9, 8]
    assert groups.num_targets == 4.0
    for part in groups.micro_batches(9):
        assert len(part.batch.unit_tokens) == 2
    kept = groups.units([1]).batch
    assert kept.token_ids_T.tolist() == [8, 9, 8, 1, 2, 2, 2, 3]
