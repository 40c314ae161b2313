"""Scalar models, the shape of reward models and critics: a language model's backbone, one number per token.

Responsible for: making one from a causal language model.
Not responsible for: reading them from disk (load.py), using them (forward.py), centring them (heads.py).

They are transformers' own `...ForSequenceClassification` classes with one label, which transformers can load, and
where it has none, a class of the same form for the architecture (scalar_class.py).

Shapes: D width of the hidden states.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dovetail.errors import ModelError
from dovetail.model.copies import copy_of
from dovetail.model.scalar_class import scalar_class_of


def scalar_model_from(causal_lm: Any, *, seed: int, pad_token_id: int | None) -> PreTrainedModel:
    """Return a scalar model on a copy of a causal language model's backbone, adapters left out.

    The head is drawn from N(0, 1 / (D + 1)), as in Stiennon et al. 2020 (arXiv:2009.01325) and InstructGPT.
    """
    copied = copy_of(causal_lm)
    plain = copied.unload() if hasattr(causal_lm, "peft_config") else copied
    return with_scalar_head(plain, seed=seed, pad_token_id=pad_token_id)


def with_scalar_head(causal_lm: PreTrainedModel, *, seed: int, pad_token_id: int | None) -> PreTrainedModel:
    """Return the same as `scalar_model_from`, but on the backbone itself, not on a copy."""
    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    embeddings: Any = causal_lm.get_input_embeddings()
    if pad_token_id is not None and pad_token_id >= embeddings.num_embeddings:
        pad_token_id = (
            None  # transformers makes no class that pads with a missing row; saving finds another token
        )
    config.pad_token_id = pad_token_id
    config.get_text_config().pad_token_id = pad_token_id
    model = _skeleton(config)
    backbone: Any = causal_lm.base_model
    if type(model.base_model) is not type(backbone):
        raise ModelError(
            f"{type(model).__name__} is built on {type(model.base_model).__name__}, "
            f"{type(causal_lm).__name__} on {type(backbone).__name__}: one cannot become the other"
        )
    setattr(model, model.base_model_prefix, backbone)
    # The backbone and its parts must share the configs of the model: both say which attention runs.
    theirs = [causal_lm.config, *(getattr(causal_lm.config, key) for key in config.sub_configs)]
    ours = [config, *(getattr(config, key) for key in config.sub_configs)]
    renewed = {id(old): new for old, new in zip(theirs, ours, strict=True)}
    for module in backbone.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]
    score: Any = model.score
    like = next(backbone.parameters())
    score.weight = nn.Parameter(
        new_score_weight(score.weight.shape[1], seed=seed).to(like.device, like.dtype)
    )
    if score.bias is not None:
        score.bias = nn.Parameter(torch.zeros(1, device=like.device, dtype=like.dtype))
    model.train(causal_lm.training)
    return model


def new_score_weight(width: int, *, seed: int) -> torch.Tensor:
    """Return [1, D], float32, drawn on the CPU so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    std: float = (width + 1) ** -0.5
    return torch.randn(1, width, generator=generator) * std


def _skeleton(config: Any) -> PreTrainedModel:
    """Return a scalar model without memory behind its weights."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: PreTrainedModel = scalar_class_of(config).from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence-classification class for {config.model_type}, "
            "so it can be neither a reward model nor a critic",
            hint="take another architecture for the reward model; any text-only one works as the critic too",
        ) from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear head named `score`")
    return model
