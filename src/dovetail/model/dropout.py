"""Turn dropout off, for good, and the jitter of routers, which is noise in training as well.

Responsible for: every place where transformers and peft keep a dropout probability or a size of jitter.
Not responsible for: evaluation mode. `model.train()` must not bring dropout back: in reinforcement learning the
same tokens must get the same log-probability in every forward.
"""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def disable_dropout(model: nn.Module) -> None:
    """Set probability 0 in dropout modules, in the plain numbers that attention and layers read, and in the config."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero_probabilities(vars(module))
    for config in _configs(model):
        _zero_probabilities(vars(config))


def _zero_probabilities(attributes: dict[str, Any]) -> None:
    """Set the values named dropout, attention_dropout, attn_pdrop, layerdrop, hidden_dropout_prob, ... to 0."""
    for name, value in attributes.items():
        is_probability = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_probability and (
            "dropout" in name or "jitter" in name or name.endswith(("pdrop", "layerdrop"))
        ):
            attributes[name] = 0.0


def _configs(model: nn.Module) -> list[Any]:
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())
