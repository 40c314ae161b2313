"""Shift a scalar model's scores so that their mean over demonstrations is zero, inside its saved weights.

Responsible for: the shift, exactly representable in transformers' own class, whose head has no bias.
Not responsible for: which texts to centre on.

Ouyang et al. 2022 (arXiv:2203.02155), section 3.5: the reward model is given a bias such that the labelers'
demonstrations have mean score 0 before PPO. Without a bias in the head there are two ways to get it:
- The backbone ends in a LayerNorm with a bias b: b' = b - c w / (w w), which moves every score by exactly -c.
- Otherwise w' = w - c u, with u h as near to 1 as it can be for the hidden states h of the demonstrations: among
  all u with mean(u h) = 1 the one whose u h varies least, u = K m / (m K m) with m the mean of h and K the
  inverse of its ridge-regularised covariance.

Shapes: N demonstrations, D width of the hidden states.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model.forward import hidden_states, plain_model, scalar_head
from dovetail.model.shards import assign, computing_device, whole


@dataclass(frozen=True, slots=True)
class Centring:
    """The result of centring the scores."""

    mean_before: float
    mean_after: float
    """The mean over the same demonstrations, with the weights as rounded to the model's precision."""
    disturbance: float
    """The standard deviation of u h over the demonstrations: a score moves by -c (1 +- that). 0 where exact."""


@torch.no_grad()
def centre_on(model: Any, hidden_ND: Tensor, scores_N: Tensor) -> Centring:
    """Shift the scalar model's scores so that those of the demonstrations have mean 0.

    hidden_ND: hidden states at the last tokens of the demonstrations (forward.last_hidden_states).
    scores_N: the scores there (forward.scalar_head).
    """
    if len(hidden_ND) == 0:
        raise ModelError("there are no demonstrations to centre the scores on")
    hidden_ND = hidden_ND.double()
    weight_D = whole(_score_parameter(model)).double().squeeze(0)
    mean = scores_N.double().mean()
    norm = None if hasattr(model, "peft_config") else final_layer_norm(model)
    if norm is not None and norm.bias is not None:
        before_D = whole(norm.bias).to(torch.float64, copy=True)
        assign(norm.bias, before_D - mean * weight_D / (weight_D @ weight_D))
        moved = (whole(norm.bias).double() - before_D) @ weight_D
        return Centring(float(mean), float(mean + moved), 0.0)
    unit_D = _nearest_to_one(hidden_ND)
    assign(_score_parameter(model), (weight_D - mean * unit_D)[None])
    after_N = scalar_head(model, hidden_ND)
    return Centring(float(mean), float(after_N.mean()), float((hidden_ND @ unit_D).std(correction=0)))


def final_layer_norm(model: Any) -> nn.LayerNorm | None:
    """Return the LayerNorm that gives the backbone's output, found by running two tokens; None if there is none."""
    backbone = plain_model(model).base_model
    outputs: list[tuple[nn.LayerNorm, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda norm, _, output: outputs.append((norm, output)))
        for module in backbone.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    try:
        last = _two_tokens(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs:
        return None
    norm, output = outputs[-1]
    return norm if torch.equal(output.flatten(), last.flatten()) else None


def _two_tokens(model: Any) -> Tensor:
    device = computing_device(model)
    return hidden_states(model, pack([[0, 1]], [[False, False]]).to(device))


def _nearest_to_one(hidden_ND: Tensor) -> Tensor:
    """Return u [D] with mean(u h) = 1 and the least variance of u h, ridge-regularised; float64."""
    num_rows, width = hidden_ND.shape
    mean_D = hidden_ND.mean(dim=0)
    deviations_ND = hidden_ND - mean_D
    covariance_DD = deviations_ND.T @ deviations_ND / num_rows
    # Few demonstrations say little about the small directions of the covariance: the fewer, the rounder.
    ridge = (0.01 + width / num_rows) * covariance_DD.diagonal().mean()
    ridge = ridge.clamp(min=torch.finfo(torch.float64).eps * float(mean_D @ mean_D) + 1e-300)
    covariance_DD.diagonal().add_(ridge)
    direction_D = torch.linalg.solve(covariance_DD, mean_D)
    scale = direction_D @ mean_D
    if not bool(scale > 0):
        raise ModelError(
            "the hidden states of the demonstrations are all zero: their scores cannot be centred"
        )
    unit_D: Tensor = direction_D / scale
    return unit_D


def _score_parameter(model: Any) -> Tensor:
    """Return the head's weight in use: peft trains a copy of its own."""
    score: Any = plain_model(model).score
    weight: Tensor = score.weight
    return weight
