"""Judge models on what was held out from training.

Responsible for: the actor's answers to held-out prompts (objective, reward, KL, length, endings), always with the
same seeds, so that two evaluations differ by the weights alone; how well a language model predicts held-out text; how
often a reward model prefers what people preferred, and whether length alone explains it.
Not responsible for: training (stages/), which rows are held out (data/).

Shapes: T packed tokens, S answers, P preference pairs, G prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, RankedBatch
from dovetail.maths.masked import masked_mean
from dovetail.maths.ranking import ranking_loss, won_pairs
from dovetail.model.forward import last_scores, sequence_logprobs, token_logprobs
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import parts_of
from dovetail.rlhf.api import Conversation, RLHFEngine
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.rollout import shape_scores

EVALUATION_SEED = 20_220_304

Judge = Callable[[Sequence[Answer]], Mapping[str, float]]
"""A second opinion, such as a gold score: names and numbers."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to the held-out prompts with their scores and statistics."""

    answers: list[Answer]
    scores: list[float]
    stats: dict[str, float]


def evaluate_answers(
    prompts: Sequence[Conversation], engine: RLHFEngine, judge: Judge | None = None
) -> Judged:
    """Sample one answer to each held-out prompt and score it; without prompts the result is empty.

    `held_out_objective` is what training raises: the mean score as PPO counts it, less `kl_coefficient` (the setting,
    also where a controller moves the penalty of training, so that evaluations stay comparable) times the KL.
    `held_out_reward` is the mean of the scores as they came.
    """
    if not prompts:
        return Judged([], [], {})
    answers = engine.generate(prompts, seed=EVALUATION_SEED)
    batch, config, roles = engine.pack(answers), engine.config, engine.roles
    actor = roles.actor_logprobs(batch, temperature=config.sampling.temperature)
    assert actor.entropy_T is not None
    gap_T = (actor.logprobs_T - engine.reference_logprobs(batch)).masked_fill(~batch.mask_T, 0.0)
    scores_S = engine.rewards(answers).float()
    shaped_S = shape_scores(scores_S, batch.finished_S, config, score_clip=roles.score_clip)
    kl = float(gap_T.sum()) / len(answers)
    stats = {
        "ppo/held_out_objective": float(shaped_S.mean()) - roles.algorithm.kl_weight(config) * kl,
        "ppo/held_out_reward": float(scores_S.mean()),
        "ppo/held_out_reward_stderr": float(scores_S.std(unbiased=False)) / len(answers) ** 0.5,
        "ppo/held_out_kl_nats_per_answer": kl,
        "ppo/held_out_entropy_nats_per_token": float(masked_mean(actor.entropy_T, batch.mask_T)),
        "ppo/held_out_distinct_fraction": len({answer.text for answer in answers}) / len(answers),
        "ppo/held_out_answer_tokens": batch.num_targets / len(answers),
        "ppo/held_out_cut_off_fraction": 1.0 - float(batch.finished_S.float().mean()),
    }
    if judge is not None:
        stats |= {f"ppo/{name}": value for name, value in judge(answers).items()}
    return Judged(answers, scores_S.tolist(), stats)


@torch.no_grad()
def language_model_quality(
    model: PreTrainedModel, batch: PackedBatch | None, max_tokens: int, device: torch.device
) -> dict[str, float]:
    """Nats per marked token, and their exponential. Nothing where nothing is held out."""
    if batch is None:
        return {}
    was_training = model.training
    model.train(False)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in parts_of(batch.lengths, max_tokens, sharding_of(model).world):
        found = token_logprobs(model, batch.sequences(part.index).to(device))
        if part.counts:
            total -= found.logprobs_T.double().sum()
    sharding_of(model).world.sum(total)
    sharding_of(model).reshard()
    model.train(was_training)
    loss = float(total) / batch.num_targets
    return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700.0))}


def held_out_text_loss(roles: Roles, batch: PackedBatch | None, max_tokens: int) -> dict[str, float]:
    """Nats per token of plain text, which PPO alone lets rise: what it forgets. Nothing where nothing is held out."""
    quality = language_model_quality(roles.actor, batch, max_tokens, roles.device)
    return {"ppo/held_out_text_loss": quality["held_out_loss"]} if quality else {}


@torch.no_grad()
def reward_accuracy(
    model: PreTrainedModel, batch: RankedBatch | None, max_tokens: int, device: torch.device
) -> dict[str, float]:
    """Accuracy (ties count half), ranking loss, mean and spread of the scores, their correlation with the length of
    answers to the same prompt."""
    if batch is None:
        return {}
    scores_S = scores_of(model, batch, max_tokens, device)
    chosen_P, rejected_P = scores_S[batch.chosen_P], scores_S[batch.rejected_P]
    weight_P = batch.weight_P
    right = (won_pairs(chosen_P, rejected_P) * weight_P).sum() / weight_P.sum()
    loss = ranking_loss(chosen_P, rejected_P, batch.margin_P, weight_P) / weight_P.sum()
    lengths_S = torch.tensor(batch.lengths, dtype=torch.float32)
    apart_2S = torch.stack([_within_groups(scores_S, batch), _within_groups(lengths_S, batch)])
    longer = (lengths_S[batch.chosen_P] > lengths_S[batch.rejected_P]).float().mean()
    return {
        "accuracy": float(right),
        "held_out_loss": float(loss),
        "score_mean": float(scores_S.mean()),
        "score_std": float(scores_S.std(unbiased=False)),
        "score_length_correlation": float(torch.corrcoef(apart_2S)[0, 1].nan_to_num()),
        "longer_is_chosen": float(longer),
    }


def _within_groups(values_S: Tensor, batch: RankedBatch) -> Tensor:
    """Subtract from each answer the mean of the answers to its prompt, so that the prompt's length does not count."""
    sizes_G = torch.tensor(batch.group_sizes)
    group_S = torch.arange(len(sizes_G)).repeat_interleave(sizes_G)
    sums_G = torch.zeros(len(sizes_G)).index_add_(0, group_S, values_S)
    return values_S - (sums_G / sizes_G)[group_S]


def scores_of(model: PreTrainedModel, batch: RankedBatch, max_tokens: int, device: torch.device) -> Tensor:
    """Return what a reward model says of each answer, float32 [S] on the CPU."""
    return _of_each_sequence(last_scores, model, batch, max_tokens, device)


def answer_logprobs(
    model: PreTrainedModel, batch: PackedBatch, max_tokens: int, device: torch.device
) -> Tensor:
    """Return the log-probability of the marked tokens of each sequence, float32 [S] on the CPU."""
    return _of_each_sequence(sequence_logprobs, model, batch, max_tokens, device)


@torch.no_grad()
def _of_each_sequence(
    read: Callable[[PreTrainedModel, PackedBatch], Tensor],
    model: PreTrainedModel,
    batch: PackedBatch,
    max_tokens: int,
    device: torch.device,
) -> Tensor:
    """Return what `read` finds of each sequence, in parts that the processes share; float32 [S] on the CPU."""
    was_training = model.training
    model.train(False)
    found_S = torch.zeros(batch.num_sequences, device=device)
    for part in parts_of(batch.lengths, max_tokens, sharding_of(model).world):
        own_S = read(model, batch.sequences(part.index).to(device)).float()
        if part.counts:
            found_S[torch.tensor(part.index, device=device)] = own_S
    sharding_of(model).world.sum(found_S)
    sharding_of(model).reshard()
    model.train(was_training)
    return found_S.cpu()
