"""Measure how well a language model predicts held-out answers and held-out plain text.

Responsible for: mean loss and perplexity over the marked tokens. Not responsible for: which rows are held out.

Shapes: T packed tokens.
"""

import math

import torch
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch
from dovetail.model.forward import token_logprobs
from dovetail.parallel.shard import reshard, world_of
from dovetail.parallel.share import parts_of
from dovetail.rlhf.roles import Roles


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
    for part in parts_of(batch.lengths, max_tokens, world_of(model)):
        found = token_logprobs(model, batch.sequences(part.index).to(device))
        if part.counts:
            total -= found.logprobs_T.double().sum()
    world_of(model).sum(total)
    reshard(model)
    model.train(was_training)
    loss = float(total) / batch.num_targets
    return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700.0))}


def held_out_text_loss(roles: Roles, batch: PackedBatch | None, max_tokens: int) -> dict[str, float]:
    """Nats per token of plain text, which PPO alone lets rise: what it forgets. Nothing where nothing is held out."""
    quality = language_model_quality(roles.actor, batch, max_tokens, roles.device)
    return {"ppo/held_out_text_loss": quality["held_out_loss"]} if quality else {}
