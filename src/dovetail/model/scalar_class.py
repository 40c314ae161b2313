"""The class of a scalar model for each architecture: transformers' own, or one made in the same way.

Responsible for: `...ForSequenceClassification` classes where transformers has none, so that every text backbone can
be a reward model. Not responsible for: their weights (scalar.py, load.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from dovetail.telemetry.log import say

_CAUSAL = ("ForCausalLM", "LMHeadModel")
SCALAR = "ForSequenceClassification"


def scalar_class_of(config: PreTrainedConfig) -> Any:
    """Return the class that makes (`from_config`) and loads (`from_pretrained`) scalar models.

    It is transformers' auto class, or Dovetail's own. Where neither is possible it is the auto class, whose methods
    raise ValueError.
    """
    kind, causal_classes = type(config), AutoModelForCausalLM._model_mapping
    is_theirs = kind in AutoModelForSequenceClassification._model_mapping
    if is_theirs or kind not in causal_classes or kind not in AutoModel._model_mapping:
        return AutoModelForSequenceClassification
    return _made(causal_classes[kind], config.model_type)


@cache
def _made(causal_class: Any, model_type: str) -> type[PreTrainedModel]:
    """Return a class with transformers' generic head over the architecture's base class, and say so.

    transformers writes its own classes in the same form.
    """
    say(
        f"transformers has no sequence-classification class for {model_type}: a reward model of it has a linear head "
        "of Dovetail's own, and is saved in a form that Dovetail reads and transformers does not"
    )
    family = next(
        base
        for base in causal_class.__mro__
        if issubclass(base, PreTrainedModel) and not base.__name__.endswith(_CAUSAL)
    )
    name = causal_class.__name__
    for ending in _CAUSAL:
        name = name.removesuffix(ending)
    fields = {
        "base_model_prefix": causal_class.base_model_prefix,
        "from_config": classmethod(lambda cls, config: cls._from_config(config)),
        "__module__": family.__module__,  # whose source says which attention and experts the class can have
    }
    made: type[PreTrainedModel] = type(f"{name}{SCALAR}", (GenericForSequenceClassification, family), fields)
    return made
