"""Measure how often a reward model prefers what people preferred.

Responsible for: pairwise accuracy and loss on held-out comparisons, and whether length alone explains the scores.
Not responsible for: training (stages/reward.py).

Shapes: S answers, P preference pairs, G prompts.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import RankedBatch
from dovetail.maths.ranking import ranking_loss, won_pairs
from dovetail.model.forward import last_scores
from dovetail.parallel.shard import reshard, world_of
from dovetail.parallel.share import parts_of


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


@torch.no_grad()
def scores_of(model: PreTrainedModel, batch: RankedBatch, max_tokens: int, device: torch.device) -> Tensor:
    """float32 [S] on the CPU."""
    was_training = model.training
    model.train(False)
    scores_S = torch.zeros(batch.num_sequences, device=device)
    for part in parts_of(batch.lengths, max_tokens, world_of(model)):
        found_S = last_scores(model, batch.sequences(part.index).to(device)).float()
        if part.counts:
            scores_S[torch.tensor(part.index, device=device)] = found_S
    world_of(model).sum(scores_S)
    reshard(model)
    model.train(was_training)
    return scores_S.cpu()
