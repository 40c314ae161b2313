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

from dovetail.batches import PackedBatch, RankedBatch, Rollout
from dovetail.maths.evaluation import brier_score, calibration_error, distinct_ngrams
from dovetail.maths.masked import masked_mean
from dovetail.maths.ranking import ranking_loss, won_pairs
from dovetail.model.forward import LogProbs, last_scores, sequence_logprobs, token_logprobs
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
    scores_S = engine.rewards(answers).float()
    shaped_S = shape_scores(scores_S, batch.finished_S, config, score_clip=roles.score_clip)
    figures = answer_figures(answers, batch, actor, engine.reference_logprobs(batch))
    kl = figures["kl_nats_per_answer"]
    stats = {
        "ppo/held_out_objective": float(shaped_S.mean()) - roles.algorithm.kl_weight(config) * kl,
        "ppo/held_out_reward": float(scores_S.mean()),
        "ppo/held_out_reward_stderr": standard_error(scores_S),
    } | {f"ppo/held_out_{name}": value for name, value in figures.items()}
    if judge is not None:
        stats |= {f"ppo/{name}": value for name, value in judge(answers).items()}
    return Judged(answers, scores_S.tolist(), stats)


def answer_figures(
    answers: Sequence[Answer], batch: Rollout, policy: LogProbs, reference_T: Tensor | None
) -> dict[str, float]:
    """Return the figures of sampled answers that need no judge, the KL to a reference among them if there is one.

    The KL is the mean over answers of sum_t log p(t) - log p_reference(t), which has the expectation
    KL(policy || reference) of whole answers.
    """
    assert policy.entropy_T is not None
    figures: dict[str, float] = {}
    if reference_T is not None:
        gap_T = (policy.logprobs_T - reference_T).masked_fill(~batch.mask_T, 0.0)
        gap_S = torch.stack([own_T.sum() for own_T in gap_T.split_with_sizes(batch.lengths)])
        figures["kl_nats_per_answer"] = float(gap_S.mean())
        figures["kl_nats_per_answer_stderr"] = standard_error(gap_S)
    ids = [answer.answer_ids for answer in answers]
    return figures | {
        "entropy_nats_per_token": float(masked_mean(policy.entropy_T, batch.mask_T)),
        "distinct_fraction": len({answer.text for answer in answers}) / len(answers),
        "distinct_1": distinct_ngrams(ids, 1),
        "distinct_2": distinct_ngrams(ids, 2),
        "answer_tokens": batch.num_targets / len(answers),
        "cut_off_fraction": 1.0 - float(batch.finished_S.float().mean()),
    }


def standard_error(values_S: Tensor) -> float:
    """Return the standard error of the mean."""
    return float(values_S.std(unbiased=False)) / math.sqrt(len(values_S))


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
    """Accuracy (ties count half), ranking loss, mean and spread of the scores, calibration of sigmoid(difference), and
    what length explains: the correlation with it among answers to one prompt, and the accuracy on pairs whose chosen
    answer is the longer or the shorter one."""
    if batch is None:
        return {}
    scores_S = scores_of(model, batch, max_tokens, device)
    chosen_P, rejected_P = scores_S[batch.chosen_P], scores_S[batch.rejected_P]
    weight_P = batch.weight_P
    right_P = won_pairs(chosen_P, rejected_P) * weight_P
    by_prompt_G = torch.zeros(len(batch.group_sizes)).index_add_(0, _groups(batch)[batch.chosen_P], right_P)
    loss = ranking_loss(chosen_P, rejected_P, batch.margin_P, weight_P) / weight_P.sum()
    lengths_S = torch.tensor(batch.lengths, dtype=torch.float32)
    apart_2S = torch.stack([_within_groups(scores_S, batch), _within_groups(lengths_S, batch)])
    longer_P = lengths_S[batch.chosen_P] - lengths_S[batch.rejected_P]
    won_P = (chosen_P - rejected_P).double().sigmoid()
    return {
        "accuracy": float(right_P.sum() / weight_P.sum()),
        "accuracy_stderr": standard_error(by_prompt_G[torch.tensor(batch.is_ranked)]),
        "held_out_loss": float(loss),
        "score_mean": float(scores_S.mean()),
        "score_std": float(scores_S.std(unbiased=False)),
        "score_length_correlation": float(torch.corrcoef(apart_2S)[0, 1].nan_to_num()),
        "longer_is_chosen": float((longer_P > 0).float().mean()),
        "brier_score": float(brier_score(won_P, weight_P)),
        "calibration_error": float(calibration_error(won_P, weight_P)),
    } | _accuracy_by_length(right_P, weight_P, longer_P)


def _accuracy_by_length(right_P: Tensor, weight_P: Tensor, longer_P: Tensor) -> dict[str, float]:
    """Return the accuracy on pairs whose chosen answer is longer, and on those where it is shorter, if there are any.

    longer_P: by how many tokens the chosen answer is longer.
    """
    parts = {"accuracy_longer_chosen": longer_P > 0, "accuracy_shorter_chosen": longer_P < 0}
    return {
        name: float(right_P[kept_P].sum() / weight_P[kept_P].sum())
        for name, kept_P in parts.items()
        if kept_P.any()
    }


def _within_groups(values_S: Tensor, batch: RankedBatch) -> Tensor:
    """Subtract from each answer the mean of the answers to its prompt, so that the prompt's length does not count."""
    sizes_G, group_S = torch.tensor(batch.group_sizes), _groups(batch)
    sums_G = torch.zeros(len(sizes_G)).index_add_(0, group_S, values_S)
    return values_S - (sums_G / sizes_G)[group_S]


def _groups(batch: RankedBatch) -> Tensor:
    """Return the index of each answer's prompt, int64 [S]."""
    return torch.arange(len(batch.group_sizes)).repeat_interleave(torch.tensor(batch.group_sizes))


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
