"""Load quantised checkpoints as plain weights in the precision that was asked for.

Responsible for: asking transformers to dequantise while it loads, refusing what it cannot, and leaving no trace of
the quantisation in the model, so that it is trained and saved as any other.
Not responsible for: reading weights (load.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from dovetail.errors import ModelError


def ask_for_plain_weights(name: str, config: Any) -> bool:
    """Change a model's config so that loading dequantises; return False if the checkpoint is not quantised.

    Raises ModelError for a quantisation that transformers cannot undo.
    """
    owner, settings = _settings_of(config)
    if settings is None:
        return False
    method = str(settings.get("quant_method"))
    kind = AutoQuantizationConfig.from_dict(settings)  # raises for a method that transformers does not know
    if hasattr(kind, "dequantize"):
        owner.quantization_config = {**settings, "dequantize": True}
        return True
    suffix = "_4bit" if settings.get("load_in_4bit") else "_8bit" if method == "bitsandbytes" else ""
    quantizer: Any = AUTO_QUANTIZER_MAPPING[method + suffix]
    if quantizer._dequantize is HfQuantizer._dequantize:
        raise ModelError(
            f"{name} is quantised with {method}, which cannot be turned back into plain weights",
            hint="give the model that it was quantised from",
        )
    return True


def as_plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with its weights in `dtype`, and nothing left that calls it quantised."""
    kind = getattr(model.config, "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is not None and not getattr(kind, "dequantize", False):
        model = model.dequantize(dtype)  # type: ignore[no-untyped-call]
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    # Not model.to(dtype): that would round the rotary frequencies, too.
    wide = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in wide):
            parameter.data = parameter.data.to(dtype)
    return model


def leftover_scales(model: PreTrainedModel, unexpected: Sequence[str]) -> list[str]:
    """Return the unused keys of a checkpoint that belong to a weight of the model, such as its scales."""
    weights: Iterable[str] = tuple(f"{name}_" for name, _ in model.named_parameters())
    return [key for key in unexpected if key.startswith(tuple(weights))]


def _settings_of(config: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return the config that holds the quantisation settings, and these."""
    for owner in (config, config.get_text_config()):
        settings = getattr(owner, "quantization_config", None)
        if settings is not None:
            return owner, settings if isinstance(settings, dict) else settings.to_dict()
    return config, None
